"""Run one API-format prompt through the pack's own runner and save what slots carry, as run_prompt.py does.

python run_headless.py --pack PACK --base FOLDER --prompt PROMPT.json --capture NODE:SLOT ... --save TENSORS.safetensors
"""

import argparse
import json
import sys
import types
from pathlib import Path

from comfy_process import answer
from run_prompt import HostTestCapture, tensors, with_captures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompt", type=Path, required=True)
    parser.add_argument("--capture", nargs="+", required=True)
    parser.add_argument("--save", type=Path, required=True)
    options = parser.parse_args()

    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(options.pack)]
    sys.modules["ltx2_engine"] = package
    from ltx2_engine.ltx2_core.host import use_host
    from ltx2_engine.ltx2_core.standalone import StandaloneHost
    from ltx2_engine.nodes import NODE_CLASS_MAPPINGS
    from ltx2_engine.nodes.runner.core_nodes import CORE_NODES
    from ltx2_engine.nodes.runner.execute import execute
    from ltx2_engine.nodes.runner.validate import validate
    from safetensors.torch import save_file

    nodes = {**CORE_NODES, **NODE_CLASS_MAPPINGS, "HostTestCapture": HostTestCapture}
    base = options.base
    host = StandaloneHost([base / "models"], base / "input", base / "headless", progress="quiet")
    prompt = with_captures(json.loads(options.prompt.read_text()), options.capture)
    with use_host(host):
        result = execute(validate(prompt, nodes), nodes, host)
    save_file(
        {k: v for label, value in HostTestCapture.kept.items() for k, v in tensors(label, value).items()}, options.save
    )
    answer({"executed": result.executed, "files": result.files, "comfy": "comfy" in sys.modules})


if __name__ == "__main__":
    main()
