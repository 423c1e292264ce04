"""The starting noise of the layout `comfy` against ComfyUI's own, on CPU.

noise_layout.py TREE BASE PACK  ->  {"video": equal, "audio": equal, "plain": equal}
"""

import sys
from pathlib import Path

from comfy_process import answer, start


def main(tree: Path, base: Path, pack: Path) -> None:
    start(tree, base)
    import importlib.util

    import torch
    from comfy.nested_tensor import NestedTensor
    from comfy.sample import prepare_noise

    spec = importlib.util.spec_from_file_location(
        "ltx2_pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from ltx2_engine.ltx2_core.av import AV
    from ltx2_engine.ltx2_core.conditioning.state import (
        audio_state,
        unpatchify_audio,
        unpatchify_video,
        video_state,
    )
    from ltx2_engine.ltx2_core.sampling.noise import noise_source
    from ltx2_engine.ltx2_core.shapes import ClipShape

    clip = ClipShape(17, 64, 96, 24.0)
    video, audio = torch.zeros(1, 128, *clip.grid), torch.zeros(1, 8, clip.audio_latents, 16)
    theirs = prepare_noise(NestedTensor([video, audio]), 7).unbind()
    states = AV(video_state(video, clip), audio_state(audio))
    ours = noise_source("comfy", 7, torch.device("cpu"), audio_channels=8)(states)
    alone = noise_source("comfy", 7, torch.device("cpu"), audio_channels=8)(AV(states.video))
    answer(
        {
            "video": torch.equal(unpatchify_video(ours.video, clip.grid), theirs[0]),
            "audio": torch.equal(unpatchify_audio(ours.audio, 8), theirs[1]),
            "plain": torch.equal(unpatchify_video(alone.video, clip.grid), prepare_noise(video, 7)),
        }
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
