"""Previews: the colours are the linear map of the first latent frame, and no step waits for them."""

import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core.conditioning.state import patchify_video, video_state
from ltx2_engine.ltx2_core.host import PreviewSpec
from ltx2_engine.ltx2_core.preview import Previewer
from ltx2_engine.ltx2_core.shapes import ClipShape

CLIP = ClipShape(9, 64, 96, 24.0)


def spec(channels):
    numbers = np.random.default_rng(0).normal(size=(channels, 3)) * 0.2
    return PreviewSpec(tuple(map(tuple, numbers.tolist())), (0.1, -0.2, 0.0))


def previewer(device):
    latents = torch.randn(1, 16, *CLIP.grid, generator=torch.Generator().manual_seed(0))
    return latents, Previewer(spec(16), video_state(latents.to(device), CLIP), CLIP)


def expected(latents):
    first = latents[0, :, 0].permute(1, 2, 0).double().numpy()
    colours = first @ np.array(spec(16).factors) + np.array(spec(16).bias)
    return ((colours + 1) * 127.5).clip(0, 255)


def test_colours_are_those_of_the_first_latent_frame():
    latents, one = previewer("cpu")
    assert one.take() is None
    one.offer(patchify_video(latents))
    picture = one.take()
    assert picture.shape == (2, 3, 3)
    assert np.abs(picture - expected(latents)).max() <= 1
    assert one.take() is None, "a picture is shown once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_no_offer_waits_for_the_device():
    latents, one = previewer("cuda")
    tokens = patchify_video(latents.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            one.offer(tokens)
            one.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    one.offer(tokens)
    torch.cuda.synchronize()
    assert np.abs(one.take() - expected(latents)).max() <= 1
