"""The transformer of LTX-2.3 in diffusers and in ltx-core, as black boxes with random weights."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pack
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.shapes import ClipShape
from own_model import SIGMA, Output, drawing, fill, random_prompt, random_states
from torch.nn.attention import SDPBackend, sdpa_kernel


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def diffusers_transformer(config: dict[str, Any], device: torch.device) -> Any:
    """config: of a checkpoint; its sizes replace the released ones."""
    from diffusers import LTX2VideoTransformer3DModel

    path = pack.ROOT / "tests" / "data" / "transformer_keys.json"
    released = json.loads(path.read_text(encoding="utf-8"))["2.3"]["diffusers_config"]
    own = config["transformer"]
    sizes = {name: own[name] for name, value in released.items() if type(value) is int and name in own}
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**(released | sizes))
    return _with_memory(fill(model, device).train(False))


def diffusers_step(model: Any, config: ModelConfig, clip: ClipShape, device: torch.device) -> Callable[[], Output]:
    draw = drawing(device)
    states, prompt = random_states(config, clip, draw), random_prompt(config, draw)
    sigma = torch.full((1,), 1000 * SIGMA, device=device)
    times = states.map(lambda state: sigma.expand(1, state.latent.shape[1]))
    arguments = {
        "hidden_states": states.video.latent,
        "audio_hidden_states": states.audio.latent,
        "encoder_hidden_states": prompt.video,
        "audio_encoder_hidden_states": prompt.audio,
        "timestep": times.video,
        "audio_timestep": times.audio,
        "sigma": sigma,
        "audio_sigma": sigma,
        "video_coords": states.video.positions,
        "audio_coords": states.audio.positions,
        "use_cross_timestep": True,
        "return_dict": False,
    }
    return lambda: list(with_fastest_attention(model, **arguments))


class Compiled:
    """A model of diffusers with compiled blocks, for one shape after another."""

    def __init__(self, model: Any, device: torch.device):
        # the compiler for the CPU takes minutes: a trial without a GPU traces only, which also finds graph breaks
        backend = "inductor" if device.type == "cuda" else "eager"
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        self.model = model

    def fresh(self) -> Any:
        """The model, with nothing kept of other shapes."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return self.model

    @staticmethod
    def refuse_breaks() -> None:
        """Raise SystemExit unless blocks were compiled, without a graph break and for one set of sizes."""
        counters = torch._dynamo.utils.counters
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        if breaks or not graphs:
            raise SystemExit(f"diffusers compiled: {breaks} graph breaks in {graphs} graphs: no figures")


def ltx_core_transformer(config: dict[str, Any], device: torch.device) -> Any:
    stand_in_for_torchaudio()
    from ltx_core.model.transformer import LTXModelConfigurator

    with torch.device("meta"):
        model = LTXModelConfigurator.from_config({"transformer": config["transformer"]})
    return _with_memory(fill(model, device).train(False))


def ltx_core_step(model: Any, config: ModelConfig, clip: ClipShape, device: torch.device) -> Callable[[], Output]:
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationConfig
    from ltx_core.model.transformer import Modality

    draw = drawing(device)
    states, prompt = random_states(config, clip, draw), random_prompt(config, draw)
    sigma = torch.full((1,), SIGMA, device=device)

    def modality(state: Any, context: torch.Tensor) -> Any:
        times = sigma.expand(1, state.latent.shape[1])
        return Modality(latent=state.latent, sigma=sigma, timesteps=times, positions=state.positions, context=context)

    both: AV[Any] = states.map(modality, prompt)
    unperturbed = BatchedPerturbationConfig([PerturbationConfig(None)])
    return lambda: list(with_fastest_attention(model, both.video, both.audio, unperturbed))


def with_fastest_attention(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's output. Where it leaves the choice of an attention to PyTorch, that is cuDNN's before flash, as is ours:
    PyTorch's own order differs from version to version, and flash attention takes 1.7 times as long here."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return model(*args, **kwargs)


def _with_memory(model: Any) -> Any:
    """The model, if every tensor of it has memory. Raises SystemExit otherwise."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise SystemExit(f"{type(model).__name__}: no memory for {', '.join(missing[:5])}")
    return model


def stand_in_for_torchaudio() -> None:
    """ltx-core imports torchaudio for its mel front end only, and it cannot be loaded beside every build of torch."""
    # these ask what is installed when they are imported
    import transformers  # noqa: F401

    if installed("diffusers"):
        import diffusers  # noqa: F401

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        for name in ("torchaudio", "torchaudio.transforms", "torchaudio.functional"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
