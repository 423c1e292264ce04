"""LTX-2 Engine: ComfyUI nodes around an embedded LTX-2 core.

ComfyUI names a pack after its folder's path, so this file makes the canonical package ``ltx2_engine`` over its own
folder and hands on the node table. Importing it needs the standard library only.
"""

import pathlib
import sys
import types

_ROOT = str(pathlib.Path(__file__).resolve().parent)
_CANONICAL = "ltx2_engine"

_package = sys.modules.get(_CANONICAL)
if _package is None and __name__ != _CANONICAL:
    _package = types.ModuleType(_CANONICAL)
    _package.__path__ = [_ROOT]
    sys.modules[_CANONICAL] = _package

# Installed as a wheel, or a second copy of the pack in one process: import under the own name.
if __name__ == _CANONICAL or _ROOT not in list(getattr(_package, "__path__", ())):
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
else:
    from ltx2_engine.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
