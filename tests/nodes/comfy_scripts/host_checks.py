"""Exercise ComfyHost inside ComfyUI and answer what happened, one entry a scenario.

python host_checks.py TREE PACK BASE
"""

import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any

from comfy_process import answer, load_pack, start

MIB = 2**20


class FakeResident:
    """Claims to hold bytes on devices and notes every release."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.held: dict[str, int] = {}
        self.released: list[tuple[str, int | None]] = []

    def bytes_on(self, device: str) -> int:
        return self.held.get(device, 0)

    def release(self, device: str, wanted: int | None) -> int:
        self.released.append((device, wanted))
        freed = self.bytes_on(device) if wanted is None else min(wanted, self.bytes_on(device))
        self.held[device] = self.bytes_on(device) - freed
        return freed


def listed() -> list[str]:
    """Labels in ComfyUI's list of loaded models, as its log would print them."""
    import comfy.model_management as mm

    return [type(entry.model.model).__name__ for entry in mm.current_loaded_models]


def admitted(host: Any, label: str, size: int = 10 * MIB) -> FakeResident:
    resident = FakeResident(label)
    host.admit(resident, "cpu", size, MIB)
    resident.held["cpu"] = size
    return resident


def progress(host: Any) -> dict[str, Any]:
    """Values that reach ComfyUI's hook, with the first, the last and a changed total among them."""
    import comfy.utils

    events: list[list[Any]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, prompt_id=None, node_id=None: events.append([node_id, value, total])
    )
    with host.progress(4, "test", node_id="7") as bar:
        bar.step()
        bar.to(2, total=5)
        bar.step(3)
        bar.to(5)
    return {"events": events}


def interrupt(host: Any) -> dict[str, Any]:
    """Stop during a step that ComfyUI's bar would not draw; then the flag must be down again."""
    import comfy.utils

    import nodes

    comfy.utils.set_progress_bar_global_hook(None)
    steps, raised = 0, ""
    try:
        with host.progress(100_000, "test") as bar:
            for _ in range(3):
                bar.step()
                steps += 1
                nodes.interrupt_processing(steps == 2)
                seen = host.interrupted()
    except BaseException as error:
        raised = type(error).__name__
        is_exception = isinstance(error, Exception)
    host.check_interrupt()
    return {"raised": raised, "is_exception": is_exception, "steps": steps, "seen": seen, "after": host.interrupted()}


def unload_all(host: Any) -> dict[str, Any]:
    import comfy.model_management as mm

    resident = admitted(host, "LTX-2 transformer")
    before, sizes = listed(), sizes_of("LTX-2 transformer")
    host.admit(resident, "cpu", 10 * MIB, MIB)
    again, kept = listed(), list(resident.released)
    mm.unload_all_models()
    result = {"before": before, "again": again, "kept": kept, "sizes": sizes, "after": listed()}
    result |= {"released": resident.released[:], "held": resident.bytes_on("cpu")}
    host.retire(resident)
    return result


def sizes_of(label: str) -> dict[str, Any]:
    import comfy.model_management as mm

    (patcher,) = (entry.model for entry in mm.current_loaded_models if type(entry.model.model).__name__ == label)
    return {"model": patcher.model_size(), "loaded": patcher.loaded_size(), "dynamic": patcher.is_dynamic()}


def free_some(host: Any) -> dict[str, Any]:
    """ComfyUI wants memory back: a part of it, then more than there is."""
    import comfy.model_management as mm

    resident = admitted(host, "LTX-2 text encoder")
    free = mm.get_free_memory
    mm.get_free_memory = lambda dev=None, torch_free_too=False: (MIB, 0) if torch_free_too else MIB
    try:
        mm.free_memory(4 * MIB, mm.get_torch_device())
        part = {"released": resident.released[:], "held": resident.bytes_on("cpu"), "listed": listed()}
        host.make_room({"cpu": 100 * MIB})
        rest = {"released": resident.released[1:], "held": resident.bytes_on("cpu"), "listed": listed()}
    finally:
        mm.get_free_memory = free
    host.retire(resident)
    return {"part": part, "rest": rest}


def admit_evicts(host: Any) -> dict[str, Any]:
    """A second resident pushes the first one out, and a third finds no room at all."""
    import comfy.model_management as mm

    first = admitted(host, "first")
    free = mm.get_free_memory

    def crowded(dev: Any = None, torch_free_too: bool = False) -> Any:
        left = 20 * MIB - first.bytes_on("cpu")
        return (left, 0) if torch_free_too else left

    mm.get_free_memory = crowded
    second, third = FakeResident("second"), FakeResident("third")
    try:
        host.admit(second, "cpu", 15 * MIB, MIB)
        evicted, message = first.released[:], ""
        try:
            host.admit(third, "cpu", 64 * MIB, 2048 * MIB)
        except RuntimeError as error:
            message = f"{type(error).__name__}: {error}"
    finally:
        mm.get_free_memory = free
    gc.collect()
    result = {"evicted": evicted, "message": message, "listed": listed()}
    for resident in (first, second, third):
        host.retire(resident)
    return result


def retire(host: Any) -> dict[str, Any]:
    """Without the garbage collector: a proxy in a reference cycle would be reported as a leak."""
    import comfy.model_management as mm

    gc.collect()
    gc.disable()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    resident = admitted(host, "LTX-2 decoder")
    before = listed()
    host.retire(resident)
    result = {"before": before, "after": listed(), "released": resident.released[:]}
    mm.cleanup_models_gc()
    gc.enable()
    logging.getLogger().removeHandler(handler)
    return {**result, "leaks": [line for line in lines if "leak" in line]}


def refused(call: Any, *arguments: Any) -> str:
    try:
        return f"accepted: {call(*arguments)}"
    except Exception as error:
        return type(error).__name__


def paths(host: Any, base: Path) -> dict[str, Any]:
    models, outside = base / "models", base / "outside"
    gemma = models / "text_encoders" / "gemma" / "tiny"
    unet, clip = models / "unet" / "quantised", models / "clip"
    for folder in (models / "loras" / "sub", models / "checkpoints", unet, clip, gemma, outside):
        folder.mkdir(parents=True)
    for file in (
        models / "loras" / "sub" / "a.safetensors",
        models / "loras" / "b.pt",
        models / "text_encoders" / "single.safetensors",
        models / "text_encoders" / "gemma" / "q4.gguf",
        clip / "old.GGUF",
        unet / "t.gguf",
        models / "checkpoints" / "c.gguf",
        models / "loras" / "l.gguf",
        gemma / "model.safetensors",
        gemma / "config.json",
        outside / "secret.safetensors",
        outside / "secret.gguf",
        base / "input" / "photo.png",
        base / "output" / "made.png",
    ):
        file.write_bytes(b"x")
    (models / "loras" / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (models / "checkpoints" / "shared.safetensors").symlink_to(models / "loras" / "sub" / "a.safetensors")
    (models / "checkpoints" / "leak.gguf").symlink_to(outside / "secret.gguf")
    (base / "input" / "link.png").symlink_to(outside / "secret.safetensors")
    (base / "output" / "leak").symlink_to(outside)
    tricks = (
        "../outside/secret.safetensors",
        "/etc/passwd",
        "link.safetensors",
        "sub/../b.pt",
        "b.pt",
        "",
        "a\0b",
        "~/x",
    )
    saved = host.save_path("clips/take", "mp4", 64, 32)
    saved.path.write_bytes(b"x")
    return {
        "loras": host.list_models("loras"),
        "text_encoders": host.list_text_encoders(),
        "ggufs": {kind: host.list_models(kind) for kind in ("checkpoints", "diffusion_models", "text_encoders")},
        "resolved": str(host.resolve_model("loras", "sub/a.safetensors").relative_to(models)),
        "shared": str(host.resolve_model("checkpoints", "shared.safetensors").relative_to(models)),
        "encoder": str(host.resolve_text_encoder("gemma/tiny").relative_to(models)),
        "encoders": [str(host.resolve_text_encoder(name).relative_to(models)) for name in host.list_text_encoders()],
        "input": str(host.input_path("photo.png").relative_to(base)),
        "marked": str(host.input_path("made.png [output]").relative_to(base)),
        "saved": [saved.ui(), host.save_path("clips/take", "mp4", 64, 32).ui()["filename"]],
        "temp": str(host.temp_dir().relative_to(base)),
        "refused": {
            **{f"lora {name!r}": refused(host.resolve_model, "loras", name) for name in tricks},
            **{
                f"encoder {n!r}": refused(host.resolve_text_encoder, n)
                for n in ("..", "gemma", "../loras/sub", "gemma/tiny/config.json")
            },
            "gguf": refused(host.resolve_model, "loras", "l.gguf"),
            "gguf link": refused(host.resolve_model, "checkpoints", "leak.gguf"),
            **{
                f"input {n!r}": refused(host.input_path, n)
                for n in ("../outside", "link.png", "[output]", "../x [temp]")
            },
            **{f"save {n!r}": refused(host.save_path, n, "png") for n in ("../x", "/x", "leak/x", "a\\b", "")},
            "kind": refused(host.list_models, "custom_nodes"),
        },
    }


def nested() -> dict[str, Any]:
    import torch
    from comfy.nested_tensor import NestedTensor
    from ltx2_engine.nodes.host import nested_latent, split_nested

    video, audio = torch.zeros(1, 2, 3, 4, 5), torch.ones(1, 2, 3, 4)
    samples = nested_latent(video, audio)
    parts = split_nested(samples)
    return {"theirs": type(samples) is NestedTensor, "same": parts[0] is video and parts[1] is audio}


def main() -> None:
    tree, pack, base = map(Path, sys.argv[1:])
    sys.argv[1:] = []
    log = start(tree, base)
    before = set(sys.modules)
    began = time.process_time()
    loaded = load_pack(pack)
    took = time.process_time() - began
    added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
    from ltx2_engine import nodes as ours
    from ltx2_engine.ltx2_core.host import host
    from ltx2_engine.nodes.host import ComfyHost, install

    import nodes

    install()
    chosen = host()
    install()
    result = {
        "loaded": loaded,
        "seconds": took,
        "added": added,
        "ids": sorted(ours.NODE_CLASS_MAPPINGS),
        "registered": sorted(
            name for name, node in ours.NODE_CLASS_MAPPINGS.items() if nodes.NODE_CLASS_MAPPINGS.get(name) is node
        ),
        "log": log.lines,
        "host": {"ours": isinstance(chosen, ComfyHost), "one": host() is chosen, "name": chosen.name},
        "devices": [chosen.compute_devices(), chosen.default_device(), chosen.offload_device()],
        "free": chosen.free_bytes("cpu"),
        "progress": progress(chosen),
        "interrupt": interrupt(chosen),
        "unload_all": unload_all(chosen),
        "free_some": free_some(chosen),
        "admit_evicts": admit_evicts(chosen),
        "retire": retire(chosen),
        "paths": paths(chosen, base),
        "nested": nested(),
    }
    answer(result)


if __name__ == "__main__":
    main()
