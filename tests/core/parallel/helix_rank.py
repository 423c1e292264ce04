"""One rank of the fleet of ``test_helix_gemma.py``: every case on its share of a tiny Gemma 3, results into a file.

Started as ``helix_rank.py RANK WORLD FOLDER``; the test loads it too, for the model, the prompts and the list of cases.
"""

import copy
import datetime
import pathlib
import sys
import types
from dataclasses import dataclass

import torch

if "ltx2_engine" not in sys.modules:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(pathlib.Path(__file__).resolve().parents[3])]
    sys.modules["ltx2_engine"] = package

from ltx2_engine.ltx2_core.parallel.helix_topology import Topology

WORLD, LAYERS = 4, 3
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 90,  # shared unevenly by four
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "vocab_size": 97,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
IMAGE = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92, "mm_tokens_per_image": 4}


@dataclass(frozen=True)
class Case:
    topology: Topology
    split: str = "auto"
    block: int = 4
    with_image: bool = False
    samples: bool = False


CASES = {
    "helix 1x4": Case(Topology(1, 4)),
    "helix 1x4 by tokens": Case(Topology(1, 4), "tokens"),
    "helix 1x4 by weights": Case(Topology(1, 4), "weights"),
    "helix 1x4 with empty ranks": Case(Topology(1, 4), block=16),
    "helix 1x4 in blocks of one": Case(Topology(1, 4), block=1),
    "helix 2x2": Case(Topology(2, 2), samples=True),
    "helix 2x2 by tokens": Case(Topology(2, 2), "tokens"),
    "helix 1x2": Case(Topology(1, 2), block=3),
    "helix 1x2 by tokens": Case(Topology(1, 2), "tokens", block=3),
    "tensor 2": Case(Topology(2, 1), "weights"),
    "tensor 4 with repeated keys": Case(Topology(4, 1)),
    "helix 1x4 with an image": Case(Topology(1, 4), with_image=True),
}


def build(with_image=False):
    """A Gemma 3 in float32 with weights of a fixed seed, large enough that every layer matters."""
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

    if with_image:
        config = Gemma3Config(text_config=copy.deepcopy(TEXT), vision_config=copy.deepcopy(VISION), **IMAGE)
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def prompts(with_image=False):
    """Three prompts of uneven lengths, padded on the left to 21 tokens, and five tokens that are forced after each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (3, 21), generator=generator)
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :9], mask[2, :14] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if with_image:
        ids[:, 15], ids[:, 16:20], ids[:, 20] = 90, 92, 91
        inputs["token_type_ids"] = (ids == 92).long()
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    return inputs, torch.randint(3, 90, (3, 5), generator=generator)


def forced_logits(model, new_cache, with_image):
    """Scores [3, 21 + 5, V] of a prompt in one call and of the forced tokens one by one, through a cache."""
    inputs, forced = prompts(with_image)
    cache, mask = new_cache(), inputs["attention_mask"]
    logits = [model(**inputs, past_key_values=cache).logits]
    for i in range(forced.shape[1]):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": forced[:, i : i + 1], "attention_mask": mask}
        logits.append(model(**step, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def generated(model, new_cache, with_image, **options):
    torch.manual_seed(7)
    inputs, _ = prompts(with_image)
    return model.generate(**inputs, max_new_tokens=5, past_key_values=new_cache(), eos_token_id=-1, **options)


def run(case, ranks):
    """What one rank computes in a case, and how many rows its feed-forwards were given in the forced run."""
    from ltx2_engine.ltx2_core.parallel.helix_gemma import share_model

    model, rows = build(case.with_image), []
    shared = share_model(model, ranks, split=case.split, block=case.block)
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    logits = forced_logits(model, shared.new_cache, case.with_image)
    results = {"logits": logits, "rows": torch.tensor(rows)}
    if not case.with_image:
        inputs, _ = prompts()
        results["logits_without_cache"] = model(**inputs, use_cache=False).logits
    results["greedy"] = generated(model, shared.new_cache, case.with_image, do_sample=False)
    if case.samples:
        results["sampled"] = generated(model, shared.new_cache, case.with_image, do_sample=True, temperature=0.7)
    return results


def main(rank, world, folder):
    import torch.distributed as dist
    from ltx2_engine.ltx2_core.parallel.helix_collectives import connect
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    results = {}
    for name, case in CASES.items():
        # smaller groups run the same side by side
        size = case.topology.size
        groups = [connect(case.topology, range(first, first + size)) for first in range(0, world, size)]
        with torch.inference_mode():
            values = run(case, next(ranks for ranks in groups if ranks is not None))
        results |= {f"{name}/{key}": value.contiguous() for key, value in values.items()}
    save_file(results, folder / f"rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
