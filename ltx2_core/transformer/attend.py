"""The attention call itself, and which implementation does it: one of PyTorch's, or of a package that is installed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import wide

log = logging.getLogger("ltx2.engine")

# in the environment: auto, or the name of an implementation that is tried first for every attention, or of a package
SWITCH = "LTX2_ATTENTION"
IMPLEMENTATIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Packages that take attention without a bias in sixteen bits, where they are installed: SageAttention, which computes in
# eight bits, and FlashAttention 3.
PACKAGES = {"sage": "sageattention", "fa3": "flash_attn_interface"}
_HEAD_DIMS = (64, 128)
# so many times more keys than queries: video to audio. Only flash attention splits the keys then; measured on an H200,
# 126 queries and 24,576 keys take 28 to 101 us with it and 211 us with cuDNN, which is 1.7 times as fast elsewhere
_SPLIT_KEYS = 8


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, non-causal.

    q: [B, H, Tq, D]; k, v: [B, H, Tk, D]; bias: broadcastable to [B, H, Tq, Tk]. Returns [B, H, Tq, D].
    """
    package = _package_for(q, bias)
    if package is not None:
        return package(q, k, v)
    with _implementation(q, k, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys that there are, and what it takes to join it with that to others.

    q: [B, H, Tq, D]; k, v: [B, H, Tk, D]. Returns the result [B, H, Tq, D] and the log-sum-exp of the scaled scores
    [B, H, Tq] in float32, or float64 for float64. No keys: zeros and -inf, from no kernel, since those fail or return NaN.
    The user's choice of an implementation does not matter here: few return the sums.
    """
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q[:0]).dtype)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        # many keys for few queries: see _SPLIT_KEYS
        out, sums = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.is_cuda and q.dtype == torch.float32:
        out, sums = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    else:
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        out, sums = scores.softmax(3) @ v, wide(scores).logsumexp(3)
    # some kernels fill up the queries
    return out, sums[:, :, : q.shape[2]]


def order(num_queries: int, num_keys: int, *, masked: bool, choice: str = "auto") -> tuple[str, ...]:
    """Names of implementations, the one to try first in front. Raises ValueError for an unknown choice.

    An implementation that does not take some attention (flash: one with a bias; both fast ones: float32) leaves it to the
    next. Sums are ordered differently in each, so results differ in the last bits.
    """
    if choice not in ("auto", *IMPLEMENTATIONS, *PACKAGES):
        names = ", ".join((*IMPLEMENTATIONS, *PACKAGES))
        raise ValueError(f"{SWITCH}={choice!r} is not known; choose auto, {names}")
    many_keys = num_keys >= _SPLIT_KEYS * num_queries and not masked
    first = choice if choice in IMPLEMENTATIONS else "flash" if many_keys else "cudnn"
    return first, *(name for name in IMPLEMENTATIONS if name != first)


def _implementation(q: Tensor, k: Tensor, bias: Tensor | None) -> AbstractContextManager[None]:
    if not q.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    names = order(q.shape[2], k.shape[2], masked=bias is not None, choice=_choice())
    return _tried(names)


def for_all() -> AbstractContextManager[None]:
    """Inside the context, the order for attention that is compiled, which cannot differ from call to call."""
    return _tried(order(1, 1, masked=False, choice=_choice()))


def _tried(names: Sequence[str]) -> AbstractContextManager[None]:
    """Inside the context, PyTorch tries these implementations in turn; its own order differs from version to version."""
    backends = [IMPLEMENTATIONS[name] for name in names]
    return sdpa_kernel(backends, set_priority=True) if _has_priority() else sdpa_kernel(backends)


@functools.cache
def _choice() -> str:
    choice = os.environ.get(SWITCH, "auto")
    log.info("attention: %s", choice)
    return choice


def _package_for(q: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The chosen package, if there is one and it takes such an attention."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return None
    takes = bias is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in _HEAD_DIMS
    return _package(_choice()) if takes else None


@functools.cache
def _package(choice: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Attention by the chosen package; None if none is chosen, or, said once, if it cannot be loaded."""
    if choice not in PACKAGES:
        return None
    try:
        return _sage() if choice == "sage" else _flash_3()
    except (ImportError, OSError) as error:
        log.warning("attention: %s=%s, but %s cannot be used (%s): auto", SWITCH, choice, PACKAGES[choice], error)
        return None


def _sage() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sageattention import sageattn

    return functools.partial(sageattn, tensor_layout="HND", is_causal=False)


def _flash_3() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=False)
        # earlier releases return the log-sum-exp beside it
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


@functools.cache
def _has_priority() -> bool:
    return "set_priority" in inspect.signature(sdpa_kernel).parameters
