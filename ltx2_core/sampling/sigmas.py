"""Noise schedules: falling tuples of host floats that end at 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..presets import DISTILLED_SIGMAS, DISTILLED_STAGE_2_SIGMAS

Sigmas = tuple[float, ...]

DEFAULT_TOKENS = 4096  # what the reference pipelines schedule for when they pass no latent
MAX_STEPS = 1000


def ltx2_schedule(
    steps: int,
    *,
    tokens: int = DEFAULT_TOKENS,
    max_shift: float = 2.05,
    base_shift: float = 0.95,
    stretch: bool = True,
    terminal: float = 0.1,
) -> Sigmas:
    """The LTX-2 schedule: ``steps + 1`` values, shifted by the token count and stretched to end at ``terminal``.

    Formula: ltx-core 1.2 `LTX2Scheduler`. Raises ValueError for settings that give no falling schedule.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} steps cannot be scheduled: choose 1 to {MAX_STEPS}")
    if not all(math.isfinite(v) and abs(v) <= 100 for v in (max_shift, base_shift)):
        raise ValueError(f"shifts must be numbers from -100 to 100, found max {max_shift} and base {base_shift}")
    if not 0 < terminal < 1:
        raise ValueError(f"the terminal noise level must lie between 0 and 1, found {terminal}")
    if steps == 1:
        return (1.0, 0.0)
    shift = math.exp(base_shift + (max_shift - base_shift) * (tokens - 1024) / (4096 - 1024))
    levels = [shift / (shift + (1 / (1 - i / steps) - 1)) for i in range(steps)]
    if stretch:
        if levels[-1] == 1.0:
            raise ValueError(
                f"{steps} steps for {tokens} tokens with max_shift {max_shift} and base_shift {base_shift} never leave "
                "full noise: lower the shifts"
            )
        factor = (1 - levels[-1]) / (1 - terminal)
        levels = [1 - (1 - level) / factor for level in levels]
    return check_sigmas((*levels, 0.0))


def check_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """A schedule from anywhere: at least two finite levels in 0..1 that fall strictly. Raises ValueError."""
    if not 2 <= len(sigmas) <= MAX_STEPS + 1:
        raise ValueError(f"a schedule needs 2 to {MAX_STEPS + 1} noise levels, found {len(sigmas)}")
    levels = tuple(float(sigma) for sigma in sigmas)
    for before, after in pairwise(levels):
        if not (math.isfinite(before) and math.isfinite(after)) or not 1 + 1e-6 >= before > after >= 0:
            raise ValueError(f"noise levels must fall strictly within 1..0, found {before} before {after}")
    return levels


def schedule(name: str, steps: int, tokens: int = DEFAULT_TOKENS, **settings) -> Sigmas:
    """The schedule that the user chose by name (`presets.SCHEDULES`)."""
    fixed = {"distilled": DISTILLED_SIGMAS, "distilled stage 2": DISTILLED_STAGE_2_SIGMAS}
    if name in fixed:
        return fixed[name]
    if name == "ltx-2":
        return ltx2_schedule(steps, tokens=tokens, **settings)
    raise ValueError(f"there is no schedule {name!r}; choose {', '.join([*fixed, 'ltx-2'])}")
