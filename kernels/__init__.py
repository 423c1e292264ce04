"""Operations on tensors. Each has a plain torch definition; this package knows tensors and nothing else."""

from .gate_residual import gate_residual
from .guidance_combine import guidance_combine
from .precision import wide
from .rms_modulate import rms_modulate
from .rotary import apply_split_rotary

__all__ = ["apply_split_rotary", "gate_residual", "guidance_combine", "rms_modulate", "wide"]
