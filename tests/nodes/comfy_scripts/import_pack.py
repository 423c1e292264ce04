"""Import a pack by path in a bare Python and answer what it cost and what came along: `python import_pack.py PACK`."""

import importlib.util
import json
import sys
import time
from pathlib import Path


def import_once(pack: Path) -> float:
    """Processor seconds of one import, with the pack's own modules forgotten first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ltx2_engine"]:
        del sys.modules[name]
    name = str(pack).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    began = time.process_time()
    spec.loader.exec_module(module)
    return time.process_time() - began


before = set(sys.modules)
seconds = [import_once(Path(sys.argv[1])) for _ in range(3)]
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
sys.stdout.write("\n" + json.dumps({"seconds": min(seconds), "added": added}) + "\n")
