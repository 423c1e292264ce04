"""One rank of ``test_enhance_ranks.py``: enhances prompts with a tiny text encoder in every topology; results into a file.

Started as ``enhance_rank.py RANK WORLD FOLDER``; the test loads it too, for the encoders, the requests and one rank's answers.
"""

import datetime
import json
import pathlib
import sys
import types
from dataclasses import replace

import torch

if "ltx2_engine" not in sys.modules:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(pathlib.Path(__file__).resolve().parents[3])]
    sys.modules["ltx2_engine"] = package

from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.parallel.helix_topology import Topology
from ltx2_engine.ltx2_core.text.enhance import EnhanceRequest, writer

WORLD = 4
TOPOLOGIES = {topology.name: topology for topology in (Topology(2), Topology(4), Topology(1, 2), Topology(1, 4))}
PACKED = {"Helix 1x2", "TP4"}
# longer than the tiny encoder's window of 32
REQUEST = EnhanceRequest("a fox runs over snow", seed=2, max_new_tokens=4, instructions="Say more of it, in order.")


def load(path):
    """A text encoder and its tokenizer, by which every token that is written can be told."""
    from ltx2_engine.ltx2_core.loading.build import Source
    from ltx2_engine.ltx2_core.loading.store import WeightStore
    from ltx2_engine.ltx2_core.text import encoder_files, gemma
    from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer

    files, cpu = encoder_files.read_text_encoder(path), torch.device("cpu")
    with torch.device("meta"):
        module = encoder_files.build(files)
    sources = [Source(name, file, weight) for file, weight, name in files.needed()]
    keeps = {"keeps_packed": lambda name: name.startswith("layers.")}
    store = WeightStore(module, sources, device=cpu, dtype=torch.float32, **keeps)
    store.converge(lambda: (), overlap=False, on_bytes=lambda count: None, stopped=lambda: False)
    gemma.fill_buffers(module, cpu)
    tokenizer = load_tokenizer(files.tokenizer)
    return module, replace(tokenizer, decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids))


def picture():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def forced():
    """A prompt [1, 40] and tokens that are forced after it [1, 5]."""
    ids = torch.randint(10, 300, (1, 45), generator=torch.Generator().manual_seed(1))
    return ids[:, :40], ids[:, 40:]


def forced_scores(model, cache=None):
    """Scores [1, 40 + 5, V] of a prompt in one call and of the forced tokens one by one."""
    from transformers import DynamicCache

    prompt, following = forced()
    cache = DynamicCache(config=model.get_decoder().config) if cache is None else cache
    scores = [model(input_ids=ids, past_key_values=cache).logits for ids in (prompt, *following.split(1, dim=1))]
    return torch.cat(scores, dim=1)


def shared_scores(text, ranks):
    """The same by several ranks, and how many rows the feed-forwards of this one were given, call by call."""
    from ltx2_engine.ltx2_core.enhancing_over_ranks import twin
    from ltx2_engine.ltx2_core.parallel.helix_gemma import share_model

    rows = []
    model = writer(twin(text))
    shared = share_model(model, ranks, copies=False)
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    scores = forced_scores(model, shared.new_cache())
    shared.forget()
    return scores, rows


def run(name, ranks, encoder, packed):
    from ltx2_engine.ltx2_core.enhancing_over_ranks import enhance_over_ranks

    text, tokenizer = encoder
    results = {
        "words": enhance_over_ranks(text, tokenizer, REQUEST, ranks),
        "picture": enhance_over_ranks(text, tokenizer, REQUEST, ranks, picture()),
    }
    if name in PACKED:
        results["packed"] = enhance_over_ranks(*packed, REQUEST, ranks)
    told = []
    last = ranks.everyone.rank == ranks.everyone.size - 1
    try:
        enhance_over_ranks(
            text,
            tokenizer,
            REQUEST,
            ranks,
            on_token=lambda: told.append(1),
            interrupted=lambda: last and len(told) == 2,
        )
    except Interrupted:
        results["stopped after"] = len(told)
    return results


def main(rank, world, folder):
    import torch.distributed as dist
    from ltx2_engine.ltx2_core.parallel.helix_collectives import connect
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    texts, scores = {}, {}
    encoder, packed = load(folder / "gemma"), load(folder / "gemma.safetensors")
    for name, topology in TOPOLOGIES.items():
        # smaller groups run the same side by side
        size = topology.size
        groups = [connect(topology, range(first, first + size)) for first in range(0, world, size)]
        ranks = next(group for group in groups if group is not None)
        with torch.inference_mode():
            texts[name] = run(name, ranks, encoder, packed)
            scores[name], texts[name]["rows"] = shared_scores(encoder[0], ranks)
    with torch.inference_mode():
        scores["encoder afterwards"] = forced_scores(writer(encoder[0]))
    (folder / f"rank{rank}.json").write_text(json.dumps(texts))
    save_file({name: tensor.contiguous() for name, tensor in scores.items()}, folder / f"rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
