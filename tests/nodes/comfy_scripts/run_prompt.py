"""Run one API-format prompt through ComfyUI's own validation and executor, in this process and on CPU.

    python run_prompt.py --comfy TREE --pack PACK [PACK ...] --base FOLDER --prompt PROMPT.json \
        [--models FOLDER] [--core nodes_video] [--capture NODE:SLOT ...] [--save TENSORS.safetensors] \
        [--interrupt-after N [--interrupt-node NODE]]

`--base` holds the input, output and temp folders (and models, unless `--models` names another). `--capture` adds an
output node that keeps what the slot carries: a tensor is saved as "NODE:SLOT", an AUDIO's waveform as
"NODE:SLOT.waveform", a LATENT's samples as "NODE:SLOT.samples". `--interrupt-after N` asks ComfyUI to interrupt at the
N-th progress event, of `--interrupt-node` if given. The last line of output is one JSON object.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from comfy_process import ServerStub, answer, load_core, load_pack, start


class HostTestCapture:
    """Keeps the value of one slot."""

    RETURN_TYPES = ()
    FUNCTION = "execute"
    CATEGORY = "testing"
    OUTPUT_NODE = True
    kept: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"label": ("STRING", {}), "value": ("*", {})}}

    @classmethod
    def execute(cls, label: str, value: Any) -> tuple[()]:
        cls.kept[label] = value
        return ()


def with_captures(prompt: dict[str, Any], slots: list[str]) -> dict[str, Any]:
    """The prompt with one capture node for each "NODE:SLOT"."""
    captures = {}
    for label in slots:
        node, _, slot = label.rpartition(":")
        link = [node, int(slot)]
        captures[f"capture {label}"] = {"class_type": "HostTestCapture", "inputs": {"label": label, "value": link}}
    return {**prompt, **captures}


def tensors(label: str, value: Any) -> dict[str, Any]:
    """The tensors of one captured value under names that say where they came from."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(f"{label}.{key}", item).items()}
    if getattr(value, "is_nested", False):
        return {f"{label}.{i}": part.contiguous().cpu() for i, part in enumerate(value.unbind())}
    return {label: value.contiguous().cpu()} if hasattr(value, "contiguous") else {}


def record_progress(interrupt_after: int | None, interrupt_node: str | None) -> list[dict[str, Any]]:
    """Hook into progress bars as ComfyUI's main does: the hook polls the interrupt, then reports."""
    import comfy.model_management
    import comfy.utils
    from comfy_execution.utils import get_executing_context

    import nodes

    events: list[dict[str, Any]] = []

    def hook(
        value: float, total: float, preview: Any, prompt_id: str | None = None, node_id: str | None = None
    ) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        context = get_executing_context()
        if node_id is None and context is not None:
            node_id = context.node_id
        events.append({"node": node_id, "value": value, "max": total})
        counted = [event for event in events if interrupt_node in (None, event["node"])]
        if len(counted) == interrupt_after and counted[-1] is events[-1]:
            nodes.interrupt_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    return events


def run(
    prompt: dict[str, Any], interrupt_after: int | None = None, interrupt_node: str | None = None
) -> dict[str, Any]:
    """Validate and execute; ComfyUI and the pack are loaded. Returns what the script answers."""
    import execution

    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("host-test", prompt, None))
    result = {"valid": valid, "error": error, "node_errors": node_errors, "success": False, "status": None}
    if not valid or node_errors:
        return result
    events = record_progress(interrupt_after, interrupt_node)
    sizes = {"ram": 0, "ram_inactive": 0, "lru": 0}
    executor = execution.PromptExecutor(ServerStub(), cache_type=execution.CacheType.CLASSIC, cache_args=sizes)
    began = time.monotonic()
    executor.execute(prompt, "host-test", {"client_id": "host-test"}, outputs)
    status, detail = executor.status_messages[-1]
    return {
        **result,
        "success": executor.success,
        "status": status,
        "message": {k: detail.get(k) for k in ("node_id", "node_type", "exception_type", "exception_message")},
        "traceback": detail.get("traceback", []),
        "outputs": executor.history_result.get("outputs", {}),
        "progress": events,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--pack", type=Path, nargs="+", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompt", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--core", nargs="*", default=["nodes_video", "nodes_audio", "nodes_images"])
    parser.add_argument("--capture", nargs="*", default=[])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--interrupt-after", type=int)
    parser.add_argument("--interrupt-node")
    options = parser.parse_args()
    sys.argv[1:] = []

    log = start(options.comfy, options.base, options.models)
    import nodes

    load_core(options.comfy, *options.core)
    loaded = [load_pack(pack) for pack in options.pack]
    nodes.NODE_CLASS_MAPPINGS["HostTestCapture"] = HostTestCapture
    prompt = json.loads(options.prompt.read_text())
    prompt = with_captures(prompt.get("prompt", prompt), options.capture)
    result = run(prompt, options.interrupt_after, options.interrupt_node)
    named = {k: v for label, value in HostTestCapture.kept.items() for k, v in tensors(label, value).items()}
    if options.save is not None and named:
        from safetensors.torch import save_file

        save_file(named, options.save)
    captured = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in named.items()}
    answer({"loaded": loaded, "captured": captured, "log": log.lines, **result})


if __name__ == "__main__":
    main()
