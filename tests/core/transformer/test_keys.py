"""Every tensor of the released transformers maps onto our modules one to one, at full size."""

import json

import pytest
import torch
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.loading.keymap import checkpoint_name, module_names
from ltx2_engine.ltx2_core.testing import unfold_blocks
from ltx2_engine.ltx2_core.transformer.model import Transformer


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_released_names_and_shapes(request, label):
    keys = json.loads((request.path.parents[2] / "data" / "transformer_keys.json").read_text())[label]
    config = TransformerConfig.from_config({"transformer": keys["config"]})
    released = unfold_blocks(keys["tensors"], config.num_layers)
    assert len(released) == keys["n_tensors"]
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    assert {checkpoint_name("transformer", name): shape for name, shape in ours.items()} == released
    assert module_names("transformer", released) == {checkpoint_name("transformer", name): name for name in ours}


def test_features_are_config_values():
    """Without the timestep module for the text there are no tensors for it."""
    keys = {"cross_attention_adaln": True, "caption_proj_before_connector": True, "num_layers": 1}
    for setting, wanted in ((True, True), (False, False)):
        config = TransformerConfig.from_config({"transformer": keys | {"use_prompt_adaln_single": setting}})
        with torch.device("meta"):
            names = Transformer(config).state_dict()
        assert any(".prompt_adaln." in name for name in names) is wanted
        assert any("prompt_scale_shift_table" in name for name in names)
