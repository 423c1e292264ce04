"""What bench_load.py measures, through diffusers, accelerate and peft: a transformer, a LoRA on it, and their fusion.

python benchmarks/bench_load_diffusers.py
python benchmarks/bench_load_diffusers.py --tiny --out FOLDER    (a trial of the script in seconds, also without a GPU)

Files are random, in the layout of diffusers, written once and read from the page cache; every figure is the median of
the repetitions. Checks before it reports: nothing missing or unexpected, bits of loaded tensors against the safetensors
library, an adapter on every linear layer of the blocks, and the change of fused weights against B @ A. Where the result
of bench_load.py lies in the output folder or in results/, from the same hardware and of the same size, the ratios to it
are reported too.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import pack
import torch
from diffusers import LTX2VideoTransformer3DModel
from random_files import write_random
from report import RESULTS, Row, hardware, write
from safetensors import safe_open
from temporary import temporary_folder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = "diffusion_pytorch_model"
LORA = "pytorch_lora_weights.safetensors"
PREFIX = "transformer"
FILES = 4  # below 10 GB each at full size, the limit of save_pretrained
TINY = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "cross_attention_dim": 128,
    "audio_cross_attention_dim": 64,
    "caption_channels": 48,
}
T = TypeVar("T")


def released_config(version: str) -> dict[str, Any]:
    """The released transformer as arguments of diffusers' class."""
    path = pack.ROOT / "tests" / "data" / "transformer_keys.json"
    return json.loads(path.read_text(encoding="utf-8"))[version]["diffusers_config"]


def write_transformer(folder: Path, model: LTX2VideoTransformer3DModel) -> int:
    """config.json, shards and their index; returns the bytes of all tensors."""
    model.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {name: 2 * tensor.numel() for name, tensor in model.state_dict().items()}
    total, position = sum(sizes.values()), 0
    files: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        number = 1 + FILES * position // total
        files[f"{NAME}-{number:05}-of-{FILES:05}.safetensors"][name] = shape
        position += sizes[name]
    for seed, (file, part) in enumerate(files.items()):
        write_random(folder / file, part, {"format": "pt"}, seed)
    index = {name: file for file, part in files.items() for name in part}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / f"{NAME}.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def linear_layers(model: LTX2VideoTransformer3DModel) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("transformer_blocks.") and isinstance(module, torch.nn.Linear)
    }


def write_lora(path: Path, model: LTX2VideoTransformer3DModel, rank: int) -> int:
    """A LoRA for every linear layer of the blocks, as the distilled one has; returns its size in bytes."""
    shapes = {}
    for name, layer in linear_layers(model).items():
        shapes[f"{PREFIX}.{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{PREFIX}.{name}.lora_B.weight"] = (layer.out_features, rank)
    write_random(path, shapes, {"format": "pt"}, seed=FILES)
    return path.stat().st_size


def load(folder: Path, **options: Any) -> Any:
    return LTX2VideoTransformer3DModel.from_pretrained(
        folder, dtype=torch.bfloat16, low_cpu_mem_usage=True, device_map=DEVICE.type, use_safetensors=True, **options
    )


def add_lora(model: LTX2VideoTransformer3DModel, folder: Path) -> None:
    # low_cpu_mem_usage is what pipelines choose; without it peft draws random factors first
    model.load_lora_adapter(str(folder), prefix=PREFIX, weight_name=LORA, low_cpu_mem_usage=True)


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the device is done, and the result."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def repetition(folder: Path) -> tuple[float, float, float]:
    """Seconds of loading, of adding the LoRA and of fusing it, from nothing."""
    gc.collect()
    torch.cuda.empty_cache()
    alone, model = timed(lambda: load(folder))
    lora, _ = timed(lambda: add_lora(model, folder))
    fuse, _ = timed(lambda: model.fuse_lora())
    return alone, lora, fuse


def check(folder: Path) -> None:
    """One load, LoRA and fusion that are not timed; also touches the page cache and the device once."""
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    expect_bits(folder, model)
    layers = list(linear_layers(model))
    add_lora(model, folder)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(layers), sorted(adapted ^ set(layers))
    elsewhere = [name for name, tensor in model.named_parameters() if tensor.device.type != DEVICE.type]
    assert not elsewhere, f"not on {DEVICE}: {elsewhere[:5]}"
    model.fuse_lora()
    error = max(fusion_error(folder, model, layer) for layer in layers[::31])
    print(f"change of weights by the fusion: within {error:.2%} of B @ A")
    assert error < 0.05, error


def expect_bits(folder: Path, model: LTX2VideoTransformer3DModel) -> None:
    for name, tensor in list(model.state_dict().items())[::97]:
        assert torch.equal(tensor.cpu().bfloat16(), from_file(folder, name)), name


def fusion_error(folder: Path, model: LTX2VideoTransformer3DModel, layer: str) -> float:
    """How far a weight's change is from B @ A, relative; bfloat16 rounds away about 0.5 % at rank 384."""
    with safe_open(folder / LORA, framework="pt") as file:
        a, b = (file.get_tensor(f"{PREFIX}.{layer}.lora_{factor}.weight").to(DEVICE).float() for factor in "AB")
    base = from_file(folder, f"{layer}.weight").to(DEVICE).float()
    fused = model.get_submodule(layer).get_base_layer().weight.float()
    return float((fused - base - b @ a).norm() / (b @ a).norm())


def from_file(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / f"{NAME}.safetensors.index.json").read_text(encoding="utf-8"))
    with safe_open(folder / index["weight_map"][name], framework="pt") as file:
        return file.get_tensor(name)


def ratios(path: Path, size: int, alone: float, total: float) -> list[Row]:
    """Our times over these, where the result of bench_load.py is there and comparable."""
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    ours = {row["id"]: row["value"] for row in result["rows"]}
    if result["hardware"] != hardware() or abs(ours["transformer"] / size * 1e9 - 1) > 0.01:
        print(f"no ratios: {path} is of {ours['transformer']:.1f} GB on {result['hardware']}")
        return []
    merged = ours["transformer + LoRA, overlapped: time"]
    return [
        Row("ours / diffusers, transformer", ours["transformer: time"] / alone, "1"),
        Row("ours / diffusers, transformer + LoRA", merged / total, "1", "<= 0.25"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="2.3")
    parser.add_argument("--rank", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer blocks, for a small card")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks, four unless --layers says otherwise")
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = released_config(options.version) | (TINY if options.tiny else {})
    if options.layers:
        config["num_layers"] = options.layers
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**config)
    with temporary_folder(options.folder) as folder, torch.no_grad():
        writing, size = timed(lambda: write_transformer(folder, model))
        lora_size = write_lora(folder / LORA, model, options.rank)
        check(folder)
        seconds = [repetition(folder) for _ in range(options.repeat)]
    alone, lora, fuse = map(median, zip(*seconds, strict=True))
    total = median(map(sum, seconds))
    file = f"load_{options.version}.json"
    known = next((path for path in (options.out / file, RESULTS / file) if path.exists()), options.out / file)
    rows = [
        Row("writing the files", writing, "s"),
        Row("transformer", size / 1e9, "GB"),
        Row("LoRA", lora_size / 1e9, "GB"),
        Row("transformer: time", alone, "s"),
        Row("transformer: rate", size / alone / 1e9, "GB/s"),
        Row("LoRA loaded onto it: time", lora, "s"),
        Row("LoRA fused: time", fuse, "s"),
        Row("transformer + LoRA, fused: time", total, "s"),
        *ratios(known, size, alone, total),
    ]
    packages = ("diffusers", "accelerate", "peft", "safetensors")
    print(write(options.out, f"load_diffusers_{options.version}", rows, packages).read_text())


if __name__ == "__main__":
    main()
