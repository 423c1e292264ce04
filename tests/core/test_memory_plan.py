"""Plans of memory: the most blocks resident that fit, every phase within what is free, and ways out that do what they say."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.host import HostOutOfMemory
from ltx2_engine.ltx2_core.memory_plan import SLOTS, plan_memory
from ltx2_engine.ltx2_core.memory_sizes import HOST_RESERVE_BYTES, RESERVE_BYTES, Needs, Room, Stack
from ltx2_engine.ltx2_core.sampling_memory import WorkBytes, sampling_work_bytes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.vae import tiling
from ltx2_engine.ltx2_core.vae.tiling import TilePlan

GIB = 2**30
MODEL = ModelConfig.from_config(released_config("2.3"), 49, ())
CLIP = ClipShape(121, 512, 768, 24.0)
# LTX-2.3 and Gemma 3 12B in bf16
TRANSFORMER = Stack(outside=854_919_424, block=773_390_464, num_blocks=48)
TEXT = Stack(outside=2_013_757_440, block=445_000_000, num_blocks=48)


def needs(clip=CLIP, passes=4, **changes):
    def sampling(clip):
        tokens = AV(clip.num_video_tokens, clip.audio_latents)
        options = {"batch": 1, "passes": passes, "mode": "split", "dtype": torch.bfloat16}
        return sampling_work_bytes(MODEL.transformer, tokens, 1024, **options)

    def decoding(clip, free):
        return tiling.plan_decode(MODEL.video_vae, (1, 128, *clip.grid), 2, free)

    values = {
        "transformer": TRANSFORMER,
        "text_encoder": TEXT,
        "text_head": int(5.9 * GIB),
        "decoders": int(1.1 * GIB),
        "clip": clip,
        "encoding_work": 2 * GIB,
        "sampling": sampling,
        "decoding": decoding,
    }
    return Needs(**{**values, **changes})


def room(free, host=200.0, budget=None, device="cuda:0", **others):
    return Room(
        device=device,
        free=int(free * GIB),
        host_free=int(host * GIB),
        budget=None if budget is None else int(budget * GIB),
        others={name.replace("_", ":"): int(size * GIB) for name, size in others.items()},
    )


def fits(needs, room):
    try:
        return plan_memory(needs, room)
    except HostOutOfMemory:
        return None


# what lies where ------------------------------------------------------------------------------------------------------


def test_a_large_device_keeps_everything():
    plan = plan_memory(needs(), room(139))
    assert (plan.resident_blocks, plan.streamed_blocks, plan.slots) == (48, 0, 0)
    assert (plan.text, plan.keeps_transformer, plan.host_bytes) == ("resident", True, 0)
    assert plan.decoding.tile is None


def test_the_text_encoder_goes_before_a_block_does():
    plan = plan_memory(needs(), room(48))
    assert (plan.resident_blocks, plan.text) == (48, "dropped")


def test_blocks_stream_where_not_all_fit_beside_the_work():
    plan = plan_memory(needs(), room(24))
    assert 20 <= plan.resident_blocks <= 30
    assert plan.slots == SLOTS
    assert plan.host_bytes == max(plan.streamed_blocks * TRANSFORMER.block, 48 * TEXT.block)
    assert plan.text == "streamed", "24.3 GiB of weights and 2 of work"


def test_more_work_leaves_fewer_blocks():
    small, large = (plan_memory(needs(clip), room(24)) for clip in (CLIP, replace(CLIP, width=1920, height=1088)))
    assert small.resident_blocks - large.resident_blocks == pytest.approx(5, abs=2)


sizes = st.integers(1, 64)


@settings(max_examples=300, deadline=None)
@given(
    outside=sizes,
    block=st.integers(1, 12),
    num_blocks=st.integers(3, 60),
    allocated=sizes,
    fragmented=st.integers(0, 16),
    free=st.integers(8, 800),
    budget=st.none() | st.integers(8, 800),
    text=st.tuples(sizes, sizes, st.integers(3, 40)),
)
def test_resident_blocks_are_the_most_that_fit(outside, block, num_blocks, allocated, fragmented, free, budget, text):
    """Sizes in eighths of a GiB. outside + R block + slots block + work + reserve <= what may be used."""
    unit = GIB // 8
    stack = Stack(outside * unit, block * unit, num_blocks)
    work = WorkBytes(allocated * unit, (allocated + fragmented) * unit)
    wanted = needs(
        transformer=stack,
        text_encoder=Stack(*(size * unit for size in text[:2]), text[2]),
        text_head=unit,
        decoders=unit,
        encoding_work=unit,
        sampling=lambda clip: work,
        decoding=lambda clip, free: TilePlan(8, work_bytes=unit),
    )
    there = Room(device="cuda:0", free=free * unit, host_free=10**15, budget=None if budget is None else budget * unit)
    usable = min(free, budget or free) * unit - RESERVE_BYTES

    def taken(resident, slots):
        weights = stack.outside + (resident + slots) * stack.block
        return weights * 1.03 + work.reserved + (64 << 20)

    plan = fits(wanted, there)
    text_fits = (text[0] + 2 * text[1]) * unit * 1.03 + unit + (64 << 20) <= usable
    if taken(0, SLOTS) > usable or not text_fits:
        assert plan is None or taken(num_blocks, 0) <= usable
        return
    assert plan is not None
    if taken(num_blocks, 0) <= usable:
        assert (plan.resident_blocks, plan.slots) == (num_blocks, 0)
    else:
        assert plan.slots == SLOTS
        assert taken(plan.resident_blocks, SLOTS) <= usable + 1
        assert taken(plan.resident_blocks + 1, SLOTS) > usable
        assert plan.resident_blocks + SLOTS < num_blocks, "slots for blocks that could stay"
    assert plan.reserved <= usable
    assert plan.allocated <= plan.reserved
    sampling = plan.phases[1]
    beside = wanted.text_encoder.total + wanted.text_head if plan.text == "resident" else 0
    assert sampling.allocated == plan.transformer_bytes + beside + work.allocated + (64 << 20)


@pytest.mark.parametrize("budget", [16, 24, 40])
@pytest.mark.parametrize("size", [(512, 768), (768, 1280), (1088, 1920)])
def test_a_budget_includes_the_reserve(budget, size):
    height, width = size
    clip = ClipShape(121, height, width, 24.0)
    plan = plan_memory(needs(clip), room(79, budget=budget))
    assert plan.reserved <= budget * GIB - RESERVE_BYTES
    alike = plan_memory(needs(clip), room(budget))
    assert (plan.resident_blocks, plan.text, plan.decoding) == (alike.resident_blocks, alike.text, alike.decoding)
    assert plan_memory(needs(clip), room(budget, budget=79)) == alike, "a budget above what is free changes nothing"


def test_the_transformer_goes_where_the_video_would_be_tiled_beside_it():
    roomy = plan_memory(needs(), room(139))
    assert roomy.keeps_transformer
    tight = plan_memory(needs(replace(CLIP, width=2560, height=1440), passes=1), room(24))
    assert not tight.keeps_transformer
    assert tight.decoding.tile is None


def test_the_cpu_streams_nothing():
    assert plan_memory(needs(), room(64, device="cpu")).slots == 0
    with pytest.raises(HostOutOfMemory, match="does not fit on cpu"):
        plan_memory(needs(), room(24, device="cpu"))


def test_host_memory_bounds_what_streams():
    streamed = plan_memory(needs(text_encoder=Stack(GIB, GIB // 100, 48)), room(24)).streamed_blocks
    host = (streamed * TRANSFORMER.block + HOST_RESERVE_BYTES) / GIB
    small = needs(text_encoder=Stack(GIB, GIB // 100, 48))
    assert plan_memory(small, room(24, host + 0.01)).streamed_blocks == streamed
    with pytest.raises(HostOutOfMemory, match=f"{streamed} of the transformer's 48 blocks would be streamed from"):
        plan_memory(small, room(24, host - 0.01))


def test_the_table():
    plan = plan_memory(needs(), room(24))
    header, *rows = (line.split(" | ") for line in str(plan).splitlines())
    assert [cell.strip() for cell in header] == ["component", "where", "GiB"]
    table = {name.strip(): (where.strip(), float(size)) for name, where, size in rows}
    assert len({len(line) for line in str(plan).splitlines()}) == 1, "columns are aligned"
    resident, streamed = plan.resident_blocks, plan.streamed_blocks
    assert table["text encoder"] == ("host, streamed, dropped before sampling", pytest.approx(27.7, abs=0.1))
    on_device = (TRANSFORMER.outside + resident * TRANSFORMER.block) / GIB
    assert table[f"transformer, {resident} of 48 blocks"][1] == pytest.approx(on_device, abs=0.06)
    assert table[f"transformer, {streamed} blocks"][0] == "host, streamed"
    assert table["2 slots for them"] == ("cuda:0", pytest.approx(2 * TRANSFORMER.block / GIB, abs=0.06))
    assert table["decoding"][0] == str(plan.decoding)
    where, size = table["sampling, at most"]
    assert size == pytest.approx(plan.phases[1].allocated / GIB, abs=0.06)
    assert where == f"cuda:0, reserved {plan.phases[1].reserved / GIB:.1f} GiB"


# ways out ------------------------------------------------------------------------------------------------------------


def refusal(needs, room):
    with pytest.raises(HostOutOfMemory) as caught:
        plan_memory(needs, room)
    text = str(caught.value)
    print(text)
    return text, re.split(r" ?\d\. ", text.partition("cheapest first:")[2])[1:]


def test_a_clip_that_is_too_long():
    wanted, there = needs(ClipShape(481, 1088, 1920, 24.0)), room(12)
    text, ways = refusal(wanted, there)
    assert "1920x1088 with 481 frames does not fit on cuda:0" in text
    assert "12.0 GiB are free, of which 1.0 GiB stay so" in text
    assert len(ways) == 3
    frames = int(re.match(r"(\d+) frames", ways[0])[1])
    assert fits(replace(wanted, clip=replace(wanted.clip, frames=frames)), there)
    assert not fits(replace(wanted, clip=replace(wanted.clip, frames=frames + 8)), there)
    width, height = map(int, re.match(r"(\d+)x(\d+)", ways[1]).groups())
    assert fits(replace(wanted, clip=replace(wanted.clip, width=width, height=height)), there)
    assert width / height == pytest.approx(1920 / 1088, rel=0.05)
    larger = replace(wanted.clip, width=width + 64, height=height + 64)
    assert not fits(replace(wanted, clip=larger), there)
    more = float(re.match(r"([\d.]+) GiB more memory on cuda:0", ways[2])[1])
    assert fits(wanted, room(12 + more))
    assert not fits(wanted, room(12 + more - 0.11))


def test_another_device_is_the_cheapest_way_out_and_is_named_only_if_it_is_large_enough():
    wanted = needs(ClipShape(481, 1088, 1920, 24.0))
    _, ways = refusal(wanted, room(12, cuda_1=40, cuda_2=16))
    assert ways[0].startswith("another device: cuda:1 has 40.0 GiB free")
    _, ways = refusal(wanted, room(12, cuda_2=16))
    assert not any("cuda:2" in way for way in ways)


def test_a_budget_that_is_too_small_is_to_be_raised():
    wanted, there = needs(ClipShape(241, 1088, 1920, 24.0)), room(79, budget=12)
    text, ways = refusal(wanted, there)
    assert "79.0 GiB are free and memory_limit is 12.0 GiB, of which 1.0 GiB stay so" in text
    budget = float(re.match(r"a memory_limit of ([\d.]+) GiB", ways[0])[1])
    assert fits(wanted, room(79, budget=budget))
    assert not fits(wanted, room(79, budget=budget - 0.11))


def test_too_little_host_memory():
    wanted, there = needs(text_encoder=Stack(GIB, GIB // 100, 48)), room(16, host=12)
    text, ways = refusal(wanted, there)
    assert "of which 12.0 GiB are free and 2.0 GiB are kept so" in text
    assert ways[0] == "the model in fp8 (about 18.1 GiB in place of 35.4 GiB);"
    assert ways[1] == "the model as Q4_K GGUF (about 10.7 GiB in place of 35.4 GiB);"
    more = float(re.match(r"([\d.]+) GiB more host memory", ways[2])[1])
    assert fits(wanted, room(16, host=12 + more))
    assert not fits(wanted, room(16, host=12 + more - 0.11))
    _, ways = refusal(replace(wanted, transformer_bits=4.6), there)
    assert not any("the model" in way for way in ways), "the file is that small already"


def test_both_files_where_either_alone_would_not_do():
    wanted, there = needs(), room(24, host=14)
    _, ways = refusal(wanted, there)
    assert ways[0].startswith("model and text encoder in fp8 (about 18.")
    both = {name: getattr(wanted, name).packed(0.5) for name in ("transformer", "text_encoder")}
    assert fits(replace(wanted, **both), there)
    for name, stack in both.items():
        assert not fits(replace(wanted, **{name: stack}), there)


def test_a_device_without_hope_says_what_it_lacks():
    text, ways = refusal(needs(), room(2, host=4))
    assert "the text projection needs" in text
    assert all("more" in way for way in ways)


def test_a_picture_that_cannot_be_decoded():
    plan = partial(TilePlan, 8, work_bytes=50 * GIB)
    text, _ = refusal(needs(decoding=lambda clip, free: plan()), room(24))
    assert "decoding needs 50.0 GiB for work, 8 frames at a time, and 1.1 GiB for the decoders" in text
