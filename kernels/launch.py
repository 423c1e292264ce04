"""Launch parameters of the kernels, as data: nothing is tuned at run time, so every process and every run launches alike."""

from __future__ import annotations

# elements that one program holds -> warps, which gives a thread 8 to 64 of them. Measured on an H200: 8 warps for 4096.
# The same for every capability from 8.0 on, since row kernels are bound by memory.
_WARPS = ((512, 1), (1024, 2), (2048, 4), (8192, 8))
_MOST_WARPS = 16


def options(elements: int, *, quantize: bool = False) -> dict[str, int]:
    """Launch options of a program that holds that many elements at once.

    One that makes eight-bit numbers has half the warps: each repeats what is done once for a row, the division for its
    scale, and such kernels are nearly bound by instructions.

    Multiplications and additions are not fused. torch's round one by one; and LLVM makes float16 operations of float32
    ones between two roundings to float16, which a fused one would join across the rounding.
    """
    held = elements // 2 if quantize else elements
    warps = next((count for most, count in _WARPS if held <= most), _MOST_WARPS)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
