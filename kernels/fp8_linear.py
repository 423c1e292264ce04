"""A linear layer on eight-bit floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import quantize_rows
from .quantized import Quantized

# what the matrix units take
OLDEST = (8, 9)
MULTIPLE = 16


def fp8_linear(
    x: Quantized | Tensor,
    weight: Quantized,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    input_scale: Tensor | None = None,
) -> Tensor:
    """``x @ weight^T + bias`` from eight-bit factors: sum(q_x q_w) s_x s_w + bias, rounded to ``out_dtype``.

    x: [..., in], quantised already, or in another dtype: then its rows are quantised here, with ``input_scale`` (one
    float32 element) where the checkpoint has one. weight: data [out, in]; scale [out, 1] or one element. Returns
    [..., out].

    Products run on eight-bit matrix units where there are some (capability 8.9) and both widths are multiples of 16, else
    in float32 on what the numbers stand for.
    """
    rows = quantize_rows(x.contiguous(), input_scale) if isinstance(x, Tensor) else x
    compute = _multiplied if _takes(rows, weight, out_dtype) else dequantized_linear
    return compute(rows, weight, bias, out_dtype)


def has_units(device: torch.device) -> bool:
    """Whether a device has eight-bit matrix units; elsewhere ``fp8_linear`` computes in float32."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


def dequantized_linear(x: Quantized, weight: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The definition: the product of what the numbers stand for, in float32."""
    added = None if bias is None else bias.float()
    return F.linear(x.data.float() * x.scale, weight.data.float() * weight.scale, added).to(out_dtype)


def _takes(x: Quantized, weight: Quantized, out_dtype: torch.dtype) -> bool:
    data = x.data
    if data.numel() == 0 or not has_units(data.device):
        return False
    # a scale for each row is multiplied in for results in bfloat16 only
    whole = x.scale.numel() == 1 and weight.scale.numel() == 1
    return (
        all(width % MULTIPLE == 0 for width in weight.data.shape)
        and weight.data.is_contiguous()
        and data.dtype == weight.data.dtype == torch.float8_e4m3fn
        and (out_dtype == torch.bfloat16 or (whole and out_dtype == torch.float16))
    )


def _multiplied(x: Quantized, weight: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    rows, columns = x.data.flatten(0, -2).contiguous(), weight.data.shape[0]
    row_scale, column_scale = x.scale.float(), weight.scale.float()
    if row_scale.numel() == 1 and column_scale.numel() == 1:
        row_scale, column_scale = row_scale.reshape(()), column_scale.reshape(())
    else:
        row_scale = row_scale.reshape(-1, 1).expand(rows.shape[0], 1).contiguous()
        column_scale = column_scale.reshape(1, -1).expand(1, columns).contiguous()
    out = torch._scaled_mm(
        rows,
        weight.data.t(),
        scale_a=row_scale,
        scale_b=column_scale,
        # added to the sums: by itself it would cost as much as a quarter of the product
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.data.shape[:-1])
