"""Plans, tiles and their blending."""

from __future__ import annotations

import copy
import itertools
import json
import pathlib

import pytest
import torch
from ltx2_engine.ltx2_core.config.video_vae import VideoVAEConfig
from ltx2_engine.ltx2_core.testing import LiveBytes, assert_close
from ltx2_engine.ltx2_core.vae.tiling import (
    CHUNK_SIZES,
    Interval,
    TilePlan,
    decode,
    encode,
    intervals,
    plan_decode,
    plan_encode,
)
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder
from ltx2_engine.ltx2_core.vae.video_encoder import VideoEncoder
from ltx2_engine.ltx2_core.vae.video_memory import decode_stream_bytes, decoder_costs, whole_bytes
from ltx2_engine.ltx2_core.vae.video_streaming import TOLERANCE, Memory, Step, flow

KEYS = json.loads((pathlib.Path(__file__).parents[2] / "data" / "video_vae_keys.json").read_text())
GIB = 2**30
WIDTH = 8


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny convolutions: the threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(layout: str, *, tiny: bool) -> VideoVAEConfig:
    values = copy.deepcopy(KEYS[layout]["config"])
    if tiny:
        values.update(latent_channels=WIDTH, encoder_base_channels=WIDTH, decoder_base_channels=WIDTH)
        for _, params in (*values["encoder_blocks"], *values["decoder_blocks"]):
            if "num_layers" in params:
                params["num_layers"] = 1
    return VideoVAEConfig.from_config({"vae": values})


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        scale = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.2
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1))
    return module.requires_grad_(False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def trapezoid(length: int, left: int, right: int) -> torch.Tensor:
    mask = torch.ones(length)
    mask[:left] *= torch.linspace(0, 1, left + 2)[1:-1]
    mask[length - right :] *= torch.linspace(1, 0, right + 2)[1:-1]
    return mask


@pytest.mark.parametrize(("tile", "overlap"), [(4, 2), (5, 1), (7, 3), (24, 2), (8, 4)])
def test_intervals_cover_the_axis_and_their_masks_sum_to_exactly_one(tile: int, overlap: int):
    for length in range(1, 70):
        for factor in (1, 32):
            total = torch.zeros(length * factor)
            for interval in (i.scaled(factor) for i in intervals(length, tile, overlap)):
                assert overlap * factor < interval.end - interval.begin <= tile * factor or length <= overlap
                want = trapezoid(interval.end - interval.begin, interval.left, interval.right)
                torch.testing.assert_close(interval.mask(), want)
                total[interval.cells] += interval.mask()
            assert torch.equal(total, torch.ones(length * factor)), length


def test_intervals_follow_the_formula():
    assert intervals(16, 10, 3) == (Interval(0, 10, 0, 3), Interval(7, 16, 3, 0))
    assert intervals(10, 10, 3) == (Interval(0, 10),)


@pytest.mark.parametrize("layout", ["2.0", "2.3"])
@pytest.mark.parametrize("chunk", [None, 8, 16])
def test_tiled_decode_blends_the_tiles_and_equals_the_whole_away_from_seams(layout: str, chunk: int | None):
    decoder = seeded(VideoDecoder(config(layout, tiny=True)))
    z = random(1, WIDTH, 2 if chunk is None else 3, 2, 20)
    plan = TilePlan(chunk, tile=(4, 12), overlap=2, park=chunk == 8)
    with torch.no_grad():
        got = torch.cat(list(decode(decoder, z, plan)), dim=2)
        left, right = decoder(z[..., :12]), decoder(z[..., 10:])
        whole = decoder(z)
    blended = torch.zeros_like(got)
    blended[..., : 12 * 32] += left * trapezoid(12 * 32, 0, 64)
    blended[..., 10 * 32 :] += right * trapezoid(10 * 32, 64, 0)
    assert_close("blend", got, blended, 1e-5)
    # the narrow network sees at most 8 latent columns to each side
    far = torch.cat((torch.arange(4 * 32), torch.arange(18 * 32, 20 * 32)))
    assert_close("away from the seam", got[..., far], whole[..., far], 1e-5)
    assert not torch.allclose(got, whole, atol=1e-2)


@pytest.mark.parametrize("chunk", [None, 8])
def test_tiled_encode_blends_the_tiles_and_equals_the_whole_away_from_seams(chunk: int | None):
    encoder = seeded(VideoEncoder(config("2.0", tiny=True)))
    x = random(1, 3, 17, 20 * 32, 32).clamp(-1, 1)
    with torch.no_grad():
        got = encode(encoder, x, TilePlan(chunk, tile=(12, 4), overlap=2))
        top, bottom, whole = encoder(x[:, :, :, : 12 * 32]), encoder(x[:, :, :, 10 * 32 :]), encoder(x)
    blended = torch.zeros_like(got)
    blended[..., :12, :] += top * trapezoid(12, 0, 2)[:, None]
    blended[..., 10:, :] += bottom * trapezoid(10, 2, 0)[:, None]
    assert_close("blend", got, blended, 1e-5)
    far = [0, 1, 2, 3, 4, 17, 18, 19]
    assert_close("away from the seam", got[..., far, :], whole[..., far, :], 1e-5)


def test_untiled_plans_equal_the_whole_pass():
    vae = config("2.3", tiny=True)
    encoder, decoder = seeded(VideoEncoder(vae)), seeded(VideoDecoder(vae))
    x, z = random(1, 3, 17, 32, 64), random(1, WIDTH, 2, 1, 2)
    with torch.no_grad():
        for plan in (TilePlan(), TilePlan(8)):
            assert_close("encode", encode(encoder, x, plan), encoder(x), 1e-5)
            assert_close("decode", torch.cat(list(decode(decoder, z, plan)), 2), decoder(z), 1e-5)


@pytest.mark.parametrize("tile", [None, (4, 4)])
@pytest.mark.parametrize("layers", [0, 1, 5, 12])
def test_a_check_that_raises_stops_a_decode_before_the_next_layer(tile: tuple[int, int] | None, layers: int):
    decoder = seeded(VideoDecoder(config("2.3", tiny=True)))
    convolutions, checks = [], []

    def check() -> None:
        checks.append(len(convolutions))
        if len(checks) > layers:
            raise InterruptedError

    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda *_: convolutions.append(1))
    with torch.no_grad(), pytest.raises(InterruptedError):
        list(decode(decoder, random(1, WIDTH, 3, 2, 5), TilePlan(8, tile), check=check))
    assert len(checks) == layers + 1
    assert checks[-1] == len(convolutions), "a layer ran after the check"
    assert all(after - before <= 2 for before, after in itertools.pairwise(checks)), "more than a layer between checks"


@pytest.mark.parametrize("tile", [None, (4, 4)])
def test_encode_progress_ends_at_the_total(tile: tuple[int, int] | None):
    encoder = seeded(VideoEncoder(config("2.3", tiny=True)))
    calls = []
    with torch.no_grad():
        encode(encoder, random(1, 3, 17, 32, 160), TilePlan(8, tile), lambda *seen: calls.append(seen))
    tiles = 1 if tile is None else 2
    assert [done for done, _ in calls] == [9, 17, 26, 34][: 2 * tiles]
    assert {total for _, total in calls} == {17 * tiles}


@pytest.mark.parametrize("layout", ["2.0", "2.3"])
def test_no_layer_of_a_stream_gets_much_more_than_a_chunk(layout: str):
    decoder = seeded(VideoDecoder(config(layout, tiny=True)))
    seen = []

    def watched(step: Step) -> Step:
        def run(x, memory, last):
            y = step.run(x, memory, last)
            seen.append((x.shape[2], x.shape[2] * step.relative_size))
            return y

        return Step(run, step.relative_size)

    with torch.no_grad():
        z = decoder.prepare(random(1, WIDTH, 4, 2, 2))
        list(flow([watched(step) for step in decoder.steps()], z, Memory(), True, 8))
    assert all(size <= TOLERANCE * 8 or frames == 1 for frames, size in seen)
    assert max(size for _, size in seen) > 4


@pytest.mark.parametrize(
    ("layout", "height", "width", "kept_gib", "whole_gib"),
    [
        ("2.0", 24, 40, 0.89, (7, 8)),
        ("2.3", 24, 40, 1.12, (5, 6)),
        ("2.0", 34, 60, 1.89, (15, 16)),
        ("2.3", 34, 60, 2.37, (11, 12)),
    ],
)
def test_estimates_are_those_counted_by_hand(layout, height, width, kept_gib, whole_gib):
    costs = decoder_costs(config(layout, tiny=False).decoder)
    kept = sum(cost.kept for cost in costs) * height * width * 2 / GIB
    assert kept == pytest.approx(kept_gib, abs=0.006)
    assert whole_gib[0] <= whole_bytes(costs, height * width, 16, 2) / GIB <= whole_gib[1]


def test_kept_estimate_is_what_a_stream_keeps():
    vae = config("2.0", tiny=True)
    decoder, memory = seeded(VideoDecoder(vae)), Memory()
    with torch.no_grad():
        list(flow(decoder.steps(), random(1, WIDTH, 14, 2, 3), memory, False, 8))
    kept = sum(frames.numel() for frames in memory._frames.values())
    assert kept == sum(cost.kept for cost in decoder_costs(vae.decoder)) * 6


@pytest.mark.parametrize("layout", ["2.0", "2.3"])
@pytest.mark.parametrize("clip", [(16, 24, 40), (33, 16, 24)])
@pytest.mark.parametrize("chunk", [None, *CHUNK_SIZES])
def test_the_estimate_of_a_decode_bounds_the_tensors_that_live(layout: str, clip: tuple[int, ...], chunk: int | None):
    """Of full-size networks on the meta device; what a convolution takes inside itself is not seen there."""
    vae = config(layout, tiny=False)
    with torch.device("meta"):
        decoder, z = VideoDecoder(vae).bfloat16(), torch.zeros(1, 128, *clip, dtype=torch.bfloat16)
    with torch.inference_mode(), LiveBytes() as live:
        for _ in decoder.stream(z, chunk):
            pass
    costs, (frames, height, width) = decoder_costs(vae.decoder), clip
    cells = height * width
    if chunk is None:
        planned = whole_bytes(costs, cells, frames, 2)
    else:
        planned = decode_stream_bytes(costs, cells, frames, chunk / 8, 2)
    assert 0.97 <= planned / live.peak <= 1.3


@pytest.mark.parametrize("layout", ["2.0", "2.3"])
@pytest.mark.parametrize("clip", [(16, 24, 40), (16, 34, 60), (126, 16, 24)])
def test_a_stream_takes_at_most_half_of_a_whole_decode_however_much_is_free(layout: str, clip: tuple[int, ...]):
    vae, shape = config(layout, tiny=False), (1, 128, *clip)
    whole, plan = plan_decode(vae, shape, 2, None, "none"), plan_decode(vae, shape, 2, 1000 * GIB)
    assert plan.chunk_frames >= 16
    assert plan.work_bytes <= whole.work_bytes / 2


def test_a_small_picture_is_not_cut_into_short_pieces():
    assert plan_decode(config("2.3", tiny=False), (1, 128, 16, 4, 4), 2, 80 * GIB) == TilePlan(64)


def test_auto_takes_the_first_plan_that_fits():
    vae, shape = config("2.3", tiny=False), (1, 128, 16, 34, 60)
    assert plan_decode(vae, shape, 2, 80 * GIB) == plan_decode(vae, shape, 2, 8 * GIB) == TilePlan(16)
    assert plan_decode(vae, shape, 2, 6 * GIB) == TilePlan(8)
    assert plan_decode(vae, shape, 2, None) == TilePlan(8)
    assert plan_decode(vae, shape, 2, 0) == TilePlan(8, (5, 8), park=True)
    small = plan_decode(vae, shape, 2, 3 * GIB)
    assert small.tile is not None
    assert small.park
    assert plan_encode(vae, (1, 3, 121, 1088, 1920), 2, 80 * GIB) == TilePlan()
    assert plan_encode(vae, (1, 3, 121, 1088, 1920), 2, 16 * GIB).chunk_frames is not None
    assert plan_encode(vae, (1, 3, 121, 1088, 1920), 2, 3 * GIB).tile is not None


def test_a_choice_is_obeyed_whatever_the_memory():
    vae, shape = config("2.0", tiny=False), (1, 128, 16, 34, 60)
    for free in (None, GIB, 80 * GIB):
        assert plan_decode(vae, shape, 2, free, "none") == TilePlan()
        temporal = plan_decode(vae, shape, 2, free, "temporal")
        assert temporal.chunk_frames is not None
        assert temporal.tile is None
        spatial = plan_decode(vae, shape, 2, free, "spatial")
        assert spatial.chunk_frames is not None
        assert spatial.tile is not None
    with pytest.raises(ValueError, match="'both' is not known; choose one of auto, none, temporal, spatial"):
        plan_decode(vae, shape, 2, None, "both")


def test_less_memory_never_gives_a_larger_plan():
    vae = config("2.3", tiny=False)
    for plan, shape in ((plan_decode, (1, 128, 16, 34, 60)), (plan_encode, (1, 3, 121, 1088, 1920))):
        for choice in ("auto", "temporal", "spatial"):
            plans = [plan(vae, shape, 2, free, choice) for free in range(0, 64 * GIB, GIB)]
            sizes = [plan.work_bytes for plan in plans]
            assert sizes == sorted(sizes)
            assert sizes[0] > 0
            assert all(plan.work_bytes <= gib * GIB for gib, plan in enumerate(plans) if gib >= 8)


def test_plans_that_cannot_blend_are_refused():
    with pytest.raises(ValueError, match="overlap must be at least 1 and at most half a tile"):
        TilePlan(tile=(4, 3), overlap=2)
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        TilePlan(0)
