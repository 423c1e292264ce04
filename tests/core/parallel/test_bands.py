"""A clip decoded by several ranks, a band of rows each, is that of one: no seams, whatever the pieces and the rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.video_vae import VideoVAEConfig
from ltx2_engine.ltx2_core.parallel.bands import WHOLE, Bands, deal
from ltx2_engine.ltx2_core.parallel.placement import total_bytes
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment
from ltx2_engine.ltx2_core.testing import LiveBytes, assert_close
from ltx2_engine.ltx2_core.vae.tiling import TilePlan, plan_decode
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder
from ltx2_engine.ltx2_core.vae.video_memory import decode_stream_bytes, decoder_costs, whole_bytes

from .band_cases import CASES, Case, decode, decoder_of, exact_convolutions, on_threads, places
from .together import run_together

SIZES = (2, 4)
GIB = 2**30
# of frames from 0 to 1: of the same numbers in another order of sums, rounded to 8 bits at every step, in whole steps
TOLERANCES = {"bfloat16": 2**-6, "uint8": 1.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many tiny convolutions: the threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_rank():
    """Case -> its frames from one rank."""
    return {name: decode(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Number of ranks -> case -> its frames. Processes of their own, over Gloo, that write into memory they share."""
    folder = tmp_path_factory.mktemp("bands")
    folder.chmod(0o700)
    script, where = Path(__file__).with_name("band_rank.py"), places()
    segments = {size: Segment.reserve(total_bytes(where)) for size in SIZES}
    frames = {size: {name: segments[size].tensor(place) for name, place in where.items()} for size in SIZES}
    for clips in frames.values():
        for clip in clips.values():
            clip.fill_(float("nan") if clip.is_floating_point() else 128)
    descriptors = [segment.descriptor for segment in segments.values()]
    try:
        run_together({f"rank {rank}": (script, rank, folder, *descriptors) for rank in range(max(SIZES))}, descriptors)
    finally:
        for segment in segments.values():
            segment.close()
    return frames


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_processes_write_the_frames_of_one(processes, one_rank, name, size):
    want, got = one_rank[name].float(), processes[size][name].float()
    assert float(want.std()) > 0.05, "there is something to compare"
    assert_close(name, got, want, TOLERANCES.get(name, 1e-5) / max(float(want.max()), 1))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_where_nothing_is_rounded_the_bits_are_those_of_one_rank(name):
    case = replace(CASES[name], dtype=torch.float64)
    with exact_convolutions():
        want = decode(case)
        for size in SIZES:
            parts, _ = on_threads(size, case.rows, lambda bands: decode(case, bands))
            for rank, part in enumerate(parts):
                rows = Bands(rank, deal(case.rows, size), object()).rows(32)
                assert torch.equal(part[:, :, rows], want[:, :, rows])
                part[:, :, rows] = 0
                assert not part.any(), "rows of another rank were written"


# exchanges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_every_convolution_exchanges_its_edges_once(label):
    case, size = Case(label, rows=3), 3
    decoder = decoder_of(label)
    _, neighbours = on_threads(size, case.rows, lambda bands: decode(case, bands))
    convolutions = [module for module in decoder.modules() if isinstance(module, torch.nn.Conv3d)]
    for rank, one in enumerate(neighbours):
        assert len(one.sent) == len(convolutions)
        assert {tuple(edge is not None for edge in edges) for edges in one.sent} == {(rank > 0, rank < size - 1)}
    middle = neighbours[1].sent
    assert sorted(top[1] for top, _ in middle) == sorted(conv.in_channels for conv in convolutions)
    assert all(top == bottom for top, bottom in middle)
    # a row of the coarsest and of the finest feature map, of all frames
    assert middle[0] == 2 * ((1, decoder.config.latent_channels, 2, 2),)
    assert middle[-1] == 2 * ((1, decoder.config.last_channels, 9, 16),)


def test_in_pieces_every_frame_is_exchanged_once():
    """What a convolution keeps of the piece before has its neighbours' rows already."""

    def frames_sent(plan):
        case = Case(rows=2, frames=4, plan=plan)
        _, (first, _) = on_threads(2, case.rows, lambda bands: decode(case, bands))
        return len(first.sent), sum(bottom[2] for _, bottom in first.sent)

    (few, once), (many, in_pieces) = frames_sent(TilePlan()), frames_sent(TilePlan(8))
    assert many > few
    assert in_pieces == once


def test_one_rank_exchanges_nothing():
    case = CASES["2.3"]
    want = decode(case, WHOLE)
    for bands in (Bands(), Bands(0, (case.rows,)), Bands(0, (case.rows, 0))):
        assert_close("alone", decode(case, bands), want, 1e-5 if bands.size > 1 else 0)


# stops -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["short pieces", "columns as tiles", "fewer rows than ranks"])
def test_all_ranks_are_asked_equally_often_at_the_same_places(name):
    """Also one that has no rows, so that a check may be an exchange of all ranks."""
    case, size, asked = CASES[name], 4, {}

    def run(bands):
        places = asked.setdefault(bands.rank, [])
        decode(case, bands, check=lambda: places.append(len(bands.neighbours.sent)))

    on_threads(size, case.rows, run)
    with_rows = [asked[rank] for rank in range(min(size, case.rows))]
    assert all(places == with_rows[0] for places in with_rows)
    assert {len(places) for places in asked.values()} == {len(with_rows[0])}


@pytest.mark.parametrize("layers", [0, 1, 5, 12])
def test_a_check_that_stops_all_ranks_leaves_no_message_behind(layers):
    case = CASES["short pieces"]

    def run(bands):
        asked = []

        def check():
            asked.append(1)
            if len(asked) > layers:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            decode(case, bands, check=check)

    _, neighbours = on_threads(3, case.rows, run)
    assert len({len(one.sent) for one in neighbours}) == 1
    assert all(box.empty() for box in neighbours[0].mailboxes.values())


def test_progress_is_of_whole_frames_on_every_rank():
    case, seen = CASES["short pieces"], {}
    on_threads(2, case.rows, lambda bands: decode(case, bands, on_frames=seen.setdefault(bands.rank, []).append))
    assert seen[0] == seen[1]
    assert seen[0][-1] == 8 * case.frames - 7


class Sound:
    """Stands in for the sound of a clip: it notes which check it was given."""

    def beside(self, pieces, check=None):
        self.check = check
        yield from pieces


def test_sound_beside_a_band_asks_for_no_interrupt():
    """Other ranks would not ask as often."""
    case, sounds = CASES["2.3"], [Sound(), Sound()]
    decode(case, sound=sounds[0])
    assert sounds[0].check is None, "the user's interrupt"
    on_threads(2, case.rows, lambda bands: decode(case, bands, sound=sounds[1] if bands.rank else None))
    assert sounds[1].check() is None


# bands and plans -------------------------------------------------------------------------------------------------------


def test_rows_are_dealt_in_bands_that_differ_by_one():
    assert deal(34, 4) == (9, 9, 8, 8)
    assert deal(3, 4) == (1, 1, 1, 0)
    for rows in range(1, 40):
        for ranks in range(1, 9):
            heights = deal(rows, ranks)
            assert sum(heights) == rows
            assert max(heights) - min(heights) <= 1
            slices = [Bands(rank, heights, object()).rows(32) for rank in range(ranks)] if ranks > 1 else []
            assert [n for part in slices for n in range(rows * 32)[part]] == (list(range(rows * 32)) if slices else [])
    with pytest.raises(ValueError, match="0 rows cannot be dealt to 2 ranks"):
        deal(0, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((2, (3, 3), object()), "rank 2 is not among 2 ranks"),
        ((0, (3, 3), None), "2 bands need neighbours"),
        ((0, (3, 0, 3), object()), "the first ranks have 1 row or more, the others none"),
        ((0, (0, 0), object()), "the first ranks have 1 row or more"),
        ((0, (3, -1), object()), "the first ranks have 1 row or more"),
    ],
)
def test_bands_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Bands(*fields)


def test_what_does_not_fit_the_picture_is_refused():
    case = CASES["2.3"]
    two = Bands(0, (3, 3), object())
    with pytest.raises(ValueError, match=r"bands of \(3, 3\) rows are not those of a picture with 5"):
        decode(case, two)
    tiles = replace(case, plan=TilePlan(8, (4, 4)))
    with pytest.raises(ValueError, match="a picture of 5 rows on 2 ranks has tiles of all rows"):
        decode(tiles, Bands(0, (3, 2), object()))
    for frames in (torch.zeros(1, 9, 160, 64, 4), torch.zeros(case.frames_shape, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"these latents become frames \(1, 9, 160, 64, 3\) of float32 or uint8"):
            decode(case, frames=frames)


def test_the_log_says_how_many_ranks_have_no_rows(caplog):
    case = CASES["fewer rows than ranks"]
    with caplog.at_level("INFO", logger="ltx2.engine"):
        on_threads(4, case.rows, lambda bands: decode(case, bands))
    assert [record.message for record in caplog.records if record.name == "ltx2.engine"] == [
        "decoding video the whole clip at once, in bands of 1, 1, 1, 0 latent rows",
        "1 of 4 ranks have no rows: the picture has too few",
    ]


@pytest.fixture(scope="module")
def released():
    return VideoVAEConfig.from_config(released_config("2.3"))


SHAPE = (1, 128, 16, 34, 60)  # 121 frames of 1088 x 1920


def test_bands_take_longer_pieces_in_the_same_memory(released):
    lengths = [plan_decode(released, SHAPE, 2, 6 * GIB, ranks=ranks).chunk_frames for ranks in (1, 2, 4)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    assert plan_decode(released, SHAPE, 2, None, ranks=4).work_bytes < plan_decode(released, SHAPE, 2, None).work_bytes
    for ranks in (1, 2, 4, 40):
        assert plan_decode(released, SHAPE, 2, GIB * 3, ranks=ranks).work_bytes <= 3 * GIB


def test_where_a_band_does_not_fit_it_is_cut_into_columns(released):
    plan = plan_decode(released, SHAPE, 2, GIB // 4, ranks=4)
    assert plan.tile[0] == 34
    assert plan.tile[1] < 60
    for ranks in (2, 4):
        plans = [plan_decode(released, SHAPE, 2, free, ranks=ranks) for free in range(0, 8 * GIB, GIB // 2)]
        sizes = [plan.work_bytes for plan in plans]
        assert sizes == sorted(sizes)
        assert all(plan.tile is None or plan.tile[0] == 34 for plan in plans)
    assert plan_decode(released, (1, 128, 16, 2, 60), 2, 0, ranks=2).tile[0] == 4


class Mirror:
    """Neighbours that give back what they get."""

    def exchange_edges(self, top, bottom):
        return torch.empty_like(top), torch.empty_like(bottom)


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize(("chunk", "height", "most"), [(None, 9, 1.2), (64, 9, 1.35), (16, 9, 1.35), (32, 2, 1.6)])
def test_the_estimate_of_a_band_bounds_the_tensors_that_live(label, chunk, height, most):
    """Of full-size networks on the meta device, without the frames."""
    config = VideoVAEConfig.from_config(released_config(label))
    with torch.device("meta"):
        decoder = VideoDecoder(config).bfloat16()
        z = torch.zeros(1, 128, 16, 3 * height, 40, dtype=torch.bfloat16)
    with torch.inference_mode(), LiveBytes() as live:
        for _ in decoder.stream(z, chunk, bands=Bands(1, (height,) * 3, Mirror())):
            pass
    costs, cells = decoder_costs(config.decoder), (height + 1) * 40
    planned = whole_bytes(costs, cells, 16, 2) if chunk is None else decode_stream_bytes(costs, cells, 16, chunk / 8, 2)
    assert 1 <= planned / live.peak <= most
