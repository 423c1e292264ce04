"""What of a model lies where during a run: from sizes to a plan, before anything is allocated.

Weights of the transformer's blocks that do not fit beside the work stay in host memory and are streamed. Everything else
is on the device while it is used: first the text encoder, then the transformer, then the decoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from .host import HostOutOfMemory
from .memory_sizes import HOST_RESERVE_BYTES, RESERVE_BYTES, Needs, Room, Stack, gib, size
from .memory_ways import ways_out
from .sampling_memory import WorkBytes
from .vae.tiling import TilePlan

SLOTS = 2
# workspaces of matrix products
_LIBRARY_BYTES = 64 << 20
# what the allocator takes for weights beyond their size, where every tensor is allocated for itself
_SEGMENT_SHARE = 0.03
_SHOWN_WAYS = 3


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run, and the most device memory that it takes: by tensors, and by PyTorch for them."""

    name: str
    allocated: int
    reserved: int

    @classmethod
    def of(cls, name: str, weights: int, work: WorkBytes) -> Phase:
        fixed = weights + _LIBRARY_BYTES
        return cls(name, fixed + work.allocated, fixed + int(_SEGMENT_SHARE * weights) + work.reserved)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What lies where. ``str`` gives a table.

    resident_blocks: of the transformer; the streamed ones are spread between them. slots: buffers for the others, 0 where there are none.
    text: "resident" from prompt to prompt, "dropped" before sampling, or "streamed" and then dropped.
    keeps_transformer: its resident blocks stay while the decoders work; the slots never do. decoding: of the video.
    """

    device: str
    transformer: Stack
    resident_blocks: int
    slots: int
    text_encoder: Stack
    text_head: int
    text: str
    decoders: int
    keeps_transformer: bool
    decoding: TilePlan
    phases: tuple[Phase, ...]

    @property
    def streamed_blocks(self) -> int:
        return self.transformer.num_blocks - self.resident_blocks

    @property
    def transformer_bytes(self) -> int:
        """Bytes of the transformer on the device, slots included."""
        return self.transformer.outside + (self.resident_blocks + self.slots) * self.transformer.block

    @property
    def host_bytes(self) -> int:
        """Host memory that streamed weights take, at most at one time."""
        text = self.text_encoder.num_blocks * self.text_encoder.block if self.text == "streamed" else 0
        return max(self.streamed_blocks * self.transformer.block, text)

    @property
    def allocated(self) -> int:
        """The most that tensors take on the device (``torch.cuda.max_memory_allocated``)."""
        return max(phase.allocated for phase in self.phases)

    @property
    def reserved(self) -> int:
        """The most that PyTorch takes from the device (``torch.cuda.max_memory_reserved``)."""
        return max(phase.reserved for phase in self.phases)

    def __str__(self) -> str:
        stack, text = self.transformer, self.text_encoder
        rows = [
            ("text encoder", _WHERE_TEXT[self.text].format(self.device), text.total + self.text_head),
            (
                f"transformer, {self.resident_blocks} of {stack.num_blocks} blocks",
                self.device + ("" if self.keeps_transformer else ", not while decoding"),
                stack.outside + self.resident_blocks * stack.block,
            ),
        ]
        if self.streamed_blocks:
            rows += [
                (f"transformer, {self.streamed_blocks} blocks", "host, streamed", self.streamed_blocks * stack.block),
                (f"{self.slots} slots for them", self.device, self.slots * stack.block),
            ]
        rows += [
            ("decoders", self.device, self.decoders),
            ("decoding", str(self.decoding), self.decoding.work_bytes),
            *(
                (f"{phase.name}, at most", f"{self.device}, reserved {size(phase.reserved)}", phase.allocated)
                for phase in self.phases
            ),
        ]
        cells = [("component", "where", "GiB"), *((name, where, gib(count)) for name, where, count in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}} | {where:<{widths[1]}} | {count:>{widths[2]}}" for name, where, count in cells
        )


_WHERE_TEXT = {
    "resident": "{}",
    "dropped": "{}, dropped before sampling",
    "streamed": "host, streamed, dropped before sampling",
}


def plan_memory(needs: Needs, room: Room) -> MemoryPlan:
    """Place a run: as much of the transformer on the device as goes beside the work of sampling, the rest streamed.

    Resident blocks R: the most with outside + R x block + slots x block + work + reserve <= what is free. Raises
    HostOutOfMemory where not even two blocks do, or streamed ones exceed the host's memory; it names the cheapest changes
    with which the same run would fit.
    """
    try:
        return _place(needs, room)
    except _Short as short:
        ways = islice(ways_out(needs, room, _fits), _SHOWN_WAYS)
        listed = "; ".join(f"{number}. {way}" for number, way in enumerate(ways, 1))
        clip = needs.clip
        raise HostOutOfMemory(
            f"a clip of {clip.width}x{clip.height} with {clip.frames} frames does not fit on {room.device}: {short}."
            + (f" Ways out, cheapest first: {listed}." if listed else "")
        ) from None


class _Short(Exception):
    """Something does not fit; the message says what, needs how much, and has how much."""


def _fits(needs: Needs, room: Room) -> bool:
    try:
        _place(needs, room)
    except _Short:
        return False
    return True


def _place(needs: Needs, room: Room) -> MemoryPlan:
    text, encoding = _place_text(needs, room)
    resident, slots, work = _place_transformer(needs, room)
    weights = needs.transformer.outside + (resident + slots) * needs.transformer.block
    sampling = Phase.of("sampling", weights, work)
    beside = needs.text_encoder.total + needs.text_head
    with_text = Phase.of("sampling", weights + beside, work)
    if text == "dropped" and slots == 0 and with_text.reserved <= room.usable:
        text, sampling, weights = "resident", with_text, weights + beside
    keeps, tiles, decoding = _place_decoders(needs, room, weights - slots * needs.transformer.block)
    return MemoryPlan(
        device=room.device,
        transformer=needs.transformer,
        resident_blocks=resident,
        slots=slots,
        text_encoder=needs.text_encoder,
        text_head=needs.text_head,
        text=text,
        decoders=needs.decoders,
        keeps_transformer=keeps,
        decoding=tiles,
        phases=(encoding, sampling, decoding),
    )


def _place_text(needs: Needs, room: Room) -> tuple[str, Phase]:
    stack, work = needs.text_encoder, WorkBytes(needs.encoding_work, needs.encoding_work)

    def phase(weights: int) -> Phase:
        return Phase.of("encoding text", weights, work)

    head = phase(needs.text_head)
    if head.reserved > room.usable:
        raise _Short(f"the text projection needs {size(head.reserved)}; {_usable(room)}")
    both = phase(stack.total + needs.text_head)
    if both.reserved <= room.usable:
        return "dropped", both
    alone = phase(stack.total)
    if alone.reserved <= room.usable:
        return "dropped", alone
    streamed = phase(stack.streamed(SLOTS))
    if not _can_stream(room) or streamed.reserved > room.usable:
        raise _Short(f"the text encoder needs {size(streamed.reserved)} even streamed; {_usable(room)}")
    _check_host("the text encoder's layers", stack.num_blocks * stack.block, room)
    return "streamed", streamed if streamed.reserved >= head.reserved else head


def _place_transformer(needs: Needs, room: Room) -> tuple[int, int, WorkBytes]:
    """Resident blocks, slots, and the work beside them."""
    stack, work = needs.transformer, needs.sampling(needs.clip)
    if Phase.of("", stack.total, work).reserved <= room.usable:
        return stack.num_blocks, 0, work
    least = Phase.of("", stack.streamed(SLOTS), work)
    if not _can_stream(room) or least.reserved > room.usable:
        weights = stack.streamed(SLOTS) if _can_stream(room) else stack.total
        how = f"{SLOTS} of its {stack.num_blocks} blocks at a time" if _can_stream(room) else "its weights"
        raise _Short(
            f"sampling needs {size(work.reserved)} for work and {size(weights)} for the transformer, {how}; "
            f"{_usable(room)}"
        )
    resident = int((room.usable - least.reserved) / ((1 + _SEGMENT_SHARE) * stack.block))
    _check_host(
        f"{stack.num_blocks - resident} of the transformer's {stack.num_blocks} blocks",
        (stack.num_blocks - resident) * stack.block,
        room,
    )
    return resident, SLOTS, work


def _place_decoders(needs: Needs, room: Room, weights: int) -> tuple[bool, TilePlan, Phase]:
    """Whether the other weights stay while the video is decoded, and how it is decoded.

    They go where the video would have to be cut into tiles beside them: reading them again costs less than seams.
    """
    for kept in (weights, 0):
        decoders = Phase.of("decoding", kept + needs.decoders, WorkBytes(0, 0))
        free = room.usable - decoders.reserved
        tiles = needs.decoding(needs.clip, max(free, 0))
        if tiles.work_bytes <= free and (tiles.tile is None or kept == 0):
            work = WorkBytes(tiles.work_bytes, tiles.work_bytes)
            return kept > 0, tiles, Phase.of("decoding", kept + needs.decoders, work)
    raise _Short(
        f"decoding needs {size(tiles.work_bytes)} for work, {tiles}, and {size(needs.decoders)} for the decoders; "
        f"{_usable(room)}"
    )


def _can_stream(room: Room) -> bool:
    return room.device != "cpu"


def _check_host(what: str, wanted: int, room: Room) -> None:
    if wanted > room.host_free - HOST_RESERVE_BYTES:
        raise _Short(
            f"{what} would be streamed from {size(wanted)} of host memory, of which {size(room.host_free)} are free and "
            f"{size(HOST_RESERVE_BYTES)} are kept so"
        )


def _usable(room: Room) -> str:
    limit = "" if room.budget is None or room.budget >= room.free else f" and memory_limit is {size(room.budget)}"
    return f"{size(room.free)} are free{limit}, of which {size(RESERVE_BYTES)} stay so"
