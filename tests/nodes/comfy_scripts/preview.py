"""Previews through ComfyUI's progress, on CPU.

preview.py TREE BASE PACK  ->  what the host says with previews on and off, and what its progress bar was given
"""

import importlib.util
import sys
import time
from pathlib import Path

from comfy_process import answer, start


def main(tree: Path, base: Path, pack: Path) -> None:
    start(tree, base)
    import comfy.utils
    import numpy as np
    from comfy.cli_args import LatentPreviewMethod, args

    spec = importlib.util.spec_from_file_location(
        "ltx2_pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from ltx2_engine.ltx2_core.host import host

    args.preview_method = LatentPreviewMethod.NoPreviews
    off = host().wants_preview(128)
    args.preview_method = LatentPreviewMethod.Latent2RGB
    on = host().wants_preview(128)

    given = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: given.append((value, total, preview)))
    with host().progress(3, "sampling") as progress:
        time.sleep(0.2)  # ComfyUI leaves out reports that follow within a tenth of a second
        progress.step()
        time.sleep(0.2)
        progress.step(picture=np.full((2, 3, 3), 200, dtype=np.uint8))
    kind, image, largest = given[-1][2]
    answer(
        {
            "off": off is None,
            "factors": len(on.factors),
            "bias": len(on.bias),
            "other_channels": host().wants_preview(16) is None,
            "steps": [value for value, _, _ in given],
            "without_picture": given[1][2] is None,
            "kind": kind,
            "size": list(image.size),
            "largest": largest,
        }
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
