"""Operations on tensors. Each has a plain torch definition; this package knows tensors and nothing else.

Some have a twin, a fused Triton kernel with the same result (``dispatch.py``, docs/kernels.md).
"""

from .depth_to_space import depth_to_space
from .dispatch import runs_fused
from .fp8_linear import fp8_linear
from .gelu_linear import gelu_linear
from .guidance_combine import guidance_combine
from .head_gate import head_gate
from .pixel_norm_silu import pixel_norm_silu
from .precision import wide
from .quantize import gelu_quantize, quantize_rows
from .quantized import Quantized
from .res2s_update import res2s_update
from .residual_norm_modulate import residual_norm_modulate
from .rms_norm import rms_norm
from .rotary import apply_split_rotary, norm_rotary, qk_norm_rotary
from .rows import Rows

__all__ = [
    "Quantized",
    "Rows",
    "apply_split_rotary",
    "depth_to_space",
    "fp8_linear",
    "gelu_linear",
    "gelu_quantize",
    "guidance_combine",
    "head_gate",
    "norm_rotary",
    "pixel_norm_silu",
    "qk_norm_rotary",
    "quantize_rows",
    "res2s_update",
    "residual_norm_modulate",
    "rms_norm",
    "runs_fused",
    "wide",
]
