"""Products of stored factors, in float32.

A product of two bfloat16 (or two float16) numbers is exact in float32, so tensor cores that accumulate in float32 and
return float32 give the float32 product up to the order of summation, at many times the speed of a float32 product.
float32 factors go the same way, as sums of three bfloat16 parts; that needs no switch of the process to be turned
(TensorFloat32 would round them to 11 bits), which other threads would see.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def add_product(total: Tensor | None, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """total + scale * (b @ a), in the memory of ``total`` if there is one.

    total: [out, in] float32, None for zeros. b: [out, rank], a: [rank, in], in the dtypes in which they are stored.
    """
    # with beta 0 the memory is written only
    beta = 0.0 if total is None else 1.0
    if total is None:
        total = torch.empty(b.shape[0], a.shape[1], dtype=torch.float32, device=b.device)
    if not _has_wide_product(total.device):
        return total.addmm_(b.float(), a.float(), beta=beta, alpha=scale)
    if not _multiplies_widely(b.dtype, a.dtype):
        b, a = _in_parts(b.float(), a.float())
    return torch.addmm(total, b, a, out_dtype=torch.float32, beta=beta, alpha=scale, out=total)


def product(b: Tensor, a: Tensor) -> Tensor:
    """b @ a in float32: [out, rank], [rank, in] -> [out, in]."""
    return add_product(None, b, a, 1.0)


def _multiplies_widely(b: torch.dtype, a: torch.dtype) -> bool:
    """Whether tensor cores give the float32 product of these dtypes as the process is set up."""
    if b != a:
        return False
    # torch has no float32 result of float16 factors while accumulation in float16 is switched on
    return b == torch.bfloat16 or (b == torch.float16 and not torch.backends.cuda.matmul.allow_fp16_accumulation)


def _in_parts(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 matrices whose product is that of two float32 ones, but for terms below float32's last bit.

    Three parts of 8 bits hold the 24 bits of a number; of the nine products of parts, three are below 2^-24.
    """
    b1, b2, b3 = _parts(b)
    a1, a2, a3 = _parts(a)
    # smallest terms first
    return torch.cat([b1, b2, b3, b1, b2, b1], 1), torch.cat([a3, a2, a1, a2, a1, a1], 0)


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = x.bfloat16()
    rest = x - first.float()
    second = rest.bfloat16()
    return first, second, (rest - second.float()).bfloat16()


@cache
def _has_wide_product(device: torch.device) -> bool:
    """Whether factors of 16 bits can be multiplied there with a float32 result."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and "dtype_out" in torch.ops.aten.addmm.overloads()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
