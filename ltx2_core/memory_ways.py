"""What a user can change so that a run fits which does not: each change is planned, and named with its figures."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .memory_sizes import Needs, Room, size
from .shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape

_FEWEST_FRAMES, _SHORTEST_SIDE = 9, 8  # pixel frames, latent cells
# bits of a weight in files that are smaller than bf16 ones
_PACKED = {"in fp8": 8.0, "as Q4_K GGUF": 4.6}
_STEP, _LIMIT = 2**30 // 10, 2**40

Fits = Callable[[Needs, Room], bool]


def ways_out(needs: Needs, room: Room, fits: Fits) -> Iterator[str]:
    """Changes with each of which a run fits, cheapest first: of a setting, the clip, the files, the machine."""
    yield from _of_settings(needs, room, fits)
    yield from _of_the_clip(needs, room, fits)
    yield from _of_the_files(needs, room, fits)
    yield from _of_the_machine(needs, room, fits)


def _of_settings(needs: Needs, room: Room, fits: Fits) -> Iterator[str]:
    if room.budget is not None and room.budget < room.free:
        more = _least_more(lambda value: fits(needs, replace(room, budget=value)), room.budget, room.free)
        if more is not None:
            yield f"a memory_limit of {size(room.budget + more)}"
    for device, free in sorted(room.others.items(), key=lambda item: -item[1]):
        if fits(needs, replace(room, device=device, free=free)):
            yield f"another device: {device} has {size(free)} free"
            return


def _of_the_clip(needs: Needs, room: Room, fits: Fits) -> Iterator[str]:
    clip = needs.clip
    work = size(needs.sampling(clip).reserved)

    def largest(candidates: Sequence[ClipShape]) -> ClipShape | None:
        """The last one that fits of candidates in order of size."""
        count = bisect.bisect_left(candidates, True, key=lambda clip: not fits(replace(needs, clip=clip), room))
        return candidates[count - 1] if count else None

    shorter = largest(
        [replace(clip, frames=frames) for frames in range(_FEWEST_FRAMES, clip.frames, VIDEO_TIME_FACTOR)]
    )
    if shorter is not None:
        yield f"{shorter.frames} frames or fewer (work of {size(needs.sampling(shorter).reserved)} in place of {work})"
    smaller = largest(list(_smaller(clip)))
    if smaller is not None:
        yield (
            f"{smaller.width}x{smaller.height} or less "
            f"(work of {size(needs.sampling(smaller).reserved)} in place of {work})"
        )


def _smaller(clip: ClipShape) -> Iterator[ClipShape]:
    """Clips in about the same proportions, from small ones up."""
    longest = max(clip.latent_height, clip.latent_width)
    for side in range(_SHORTEST_SIDE, longest):
        height, width = (
            VIDEO_SPACE_FACTOR * max(1, round(cells * side / longest))
            for cells in (clip.latent_height, clip.latent_width)
        )
        yield replace(clip, height=height, width=width)


def _of_the_files(needs: Needs, room: Room, fits: Fits) -> Iterator[str]:
    """A smaller file of the model, of its text encoder, or of both."""
    for name, bits in _PACKED.items():
        model = needs.transformer.packed(bits / needs.transformer_bits)
        text = needs.text_encoder.packed(bits / needs.text_bits)
        sizes = f"{size(model.total)} in place of {size(needs.transformer.total)}"
        text_sizes = f"{size(text.total)} in place of {size(needs.text_encoder.total)}"
        if bits < needs.transformer_bits and fits(replace(needs, transformer=model), room):
            yield f"the model {name} (about {sizes})"
        elif bits < needs.text_bits and fits(replace(needs, text_encoder=text), room):
            yield f"the text encoder {name} (about {text_sizes})"
        elif (
            bits < needs.transformer_bits
            and bits < needs.text_bits
            and fits(replace(needs, transformer=model, text_encoder=text), room)
        ):
            yield f"model and text encoder {name} (about {sizes}, and {text_sizes})"


def _of_the_machine(needs: Needs, room: Room, fits: Fits) -> Iterator[str]:
    host = _least_more(lambda value: fits(needs, replace(room, host_free=value)), room.host_free, _LIMIT)
    if host is not None:
        yield f"{size(host)} more host memory"
    free = _least_more(lambda value: fits(needs, replace(room, free=value)), room.free, _LIMIT)
    if free is not None:
        yield f"{size(free)} more memory on {room.device}, which other programs may hold"


def _least_more(fits: Callable[[int], bool], present: int, limit: int) -> int | None:
    """By how much at least ``present`` must grow for ``fits`` to hold, in tenths of a GiB; None if ``limit`` is too little."""
    more = range(0, limit - present, _STEP)
    index = bisect.bisect_left(more, True, key=lambda extra: fits(present + extra))
    return more[index] if index < len(more) else None
