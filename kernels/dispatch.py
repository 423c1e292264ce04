"""Which form of an operation runs: its definition in torch, or its twin, a fused Triton kernel.

The twin runs where it can: on a GPU, on arguments that it takes, and after it has once agreed with the definition on the
first arguments of its kind. Everywhere else the definition runs; the result is right either way, and ``statistics`` tells
how often which ran, and why. ``LTX2_KERNELS=torch`` in the environment switches all twins off.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from .contract import Contract
from .rows import Rows

log = logging.getLogger("ltx2.kernels")

P = ParamSpec("P")
R = TypeVar("R")

SWITCH = "LTX2_KERNELS"
TRITON = "triton"
HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
OLDEST = (8, 0)

NO_GPU = "not on a GPU"
# reasons that are not one operation's
GENERAL = ("torch.float32", "torch.float64")

# tests let CPU tensors run in Triton's interpreter; it needs TRITON_INTERPRET=1 before the first kernel is imported
interpreter = False

OPERATIONS: dict[str, Operation] = {}


class Unfit(Exception):
    """The twin does not take these arguments. The message is a short fixed text, because it is counted and logged."""


class Operation(Generic[P, R]):
    """A function of tensors, called like its definition. The first argument is a tensor and decides device and dtype.

    twin: imports and returns the function with the definition's signature that launches the kernel.
    fit: the definition's signature; returns what distinguishes the kernel's variants beside device and dtype, or raises
    Unfit. It looks at shapes and strides only.
    sample: from arguments to (args, kwargs) with few tokens, on which definition and twin are compared. What an operation
    writes to must be new at every call.
    contract: how far the twin may be from the definition. dtypes: those of the first argument that the twin takes.
    """

    def __init__(
        self,
        definition: Callable[P, R],
        twin: Callable[[], Callable[P, R]],
        fit: Callable[P, Hashable],
        sample: Callable[P, tuple[tuple, dict]],
        contract: Contract,
        dtypes: Sequence[torch.dtype],
    ):
        functools.update_wrapper(self, definition)
        self.name = definition.__name__
        self.definition = definition
        self.contract = contract
        self.counts: Counter[str] = Counter()
        self._load, self._fit, self._sample, self._dtypes = twin, fit, sample, tuple(dtypes)
        self._twin: Callable[P, R] | None = None
        self._proved: set[Hashable] = set()
        self._refused: str | None = None
        OPERATIONS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        reason = self._reason(args, kwargs)
        if not torch.compiler.is_compiling():
            self._count(TRITON if reason is None else reason, args[0])
        run = self.definition if reason is not None else self.twin
        return run(*args, **kwargs)

    @property
    def twin(self) -> Callable[P, R]:
        """The launcher of the kernel, unguarded. Raises ImportError without Triton."""
        if self._twin is None:
            self._twin = self._load()
        return self._twin

    def warm_up(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Compile the twin and compare it with the definition on such arguments now, so that no later call waits.

        Only device, dtype, width and options matter, not the number of tokens or their values; nothing is changed.
        Returns why the definition will run, or None.
        """
        return self._reason(args, kwargs)

    def switch_off(self, reason: str) -> None:
        """Run the definition from now on, for example because another rank does."""
        self._refused = reason

    def reset(self) -> None:
        """Forget checks and counts."""
        self._proved.clear()
        self.counts.clear()
        self._refused = None

    def _reason(self, args: tuple, kwargs: dict) -> str | None:
        """Why the definition runs; None for the twin."""
        x: Tensor = args[0]
        compiling = torch.compiler.is_compiling()
        reason = self._refused
        if reason is None and not compiling:
            reason = refusal(x.device)
        if reason is None and x.dtype not in self._dtypes and not (interpreter and x.dtype in WIDE):
            reason = f"{x.dtype}"
        if reason is None and torch.is_grad_enabled() and _any_needs_grad((*args, *kwargs.values())):
            reason = "gradients are wanted"
        if reason is not None:
            return reason
        try:
            key = (x.device, x.dtype, self._fit(*args, **kwargs))
        except Unfit as unfit:
            return str(unfit)
        if key in self._proved:
            return None
        if compiling or not _may_wait(x.device):
            return "not yet checked"
        return self._prove(key, args, kwargs)

    def _prove(self, key: Hashable, args: tuple, kwargs: dict) -> str | None:
        """Compare twin and definition on a few tokens; what differs or fails is switched off for good."""
        try:
            found, wanted = (_outcome(run, self._sample(*args, **kwargs)) for run in (self.twin, self.definition))
            wrong = self.contract.difference(wanted, found)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler throws must not end the run
            wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if wrong is None:
            self._proved.add(key)
            return None
        log.warning("kernels: %s runs in plain torch, its Triton kernel failed the check: %s", self.name, wrong)
        self._refused = "failed its check"
        return self._refused

    def _count(self, reason: str, x: Any) -> None:
        if reason not in self.counts and reason != TRITON:
            if reason in GENERAL or reason == refusal(x.device):
                _say_once(reason)
            else:
                log.info("kernels: %s runs in plain torch: %s", self.name, reason)
        self.counts[reason] += 1


@functools.cache
def _say_once(reason: str) -> None:
    """What holds for every operation is worth one line."""
    log.info("kernels: plain torch: %s", reason)


def operation(
    *,
    twin: Callable[[], Callable[P, R]],
    fit: Callable[P, Hashable],
    sample: Callable[P, tuple[tuple, dict]],
    contract: Contract,
    dtypes: Sequence[torch.dtype] = HALF,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make the decorated torch definition an ``Operation``."""
    return lambda definition: Operation(definition, twin, fit, sample, contract, dtypes)


def opaque(
    name: str, schema: str, fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Make the decorated launcher a torch operator as well, which torch.compile does not look into.

    schema: arguments and results in torch's notation, a tensor first; written out because what torch can infer depends on
    its version. fake: the launcher's results without their values, of equal shapes, dtypes and strides. The launcher is
    called directly where nothing is compiled. ``registered`` of the result is the operator.
    """

    def register(launch: Callable) -> Callable:
        def on_its_device(first: Tensor, *others: Any) -> Any:
            # Triton launches on the current device, whatever the tensors are on
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return launch(first, *others)
            return launch(first, *others)

        registered = torch.library.custom_op(
            f"ltx2_engine::{name}", on_its_device, mutates_args=tuple(mutates), schema=schema
        )
        registered.register_fake(fake)

        @functools.wraps(launch)
        def run(*args: Any) -> Any:
            return registered(*args) if torch.compiler.is_compiling() else on_its_device(*args)

        run.registered = registered  # type: ignore[attr-defined]
        return run

    return register


def statistics() -> dict[str, dict[str, int]]:
    """For every operation how often it ran as "triton", and how often in plain torch for which reason."""
    return {name: dict(op.counts) for name, op in OPERATIONS.items()}


def runs_fused(device: torch.device) -> bool:
    """Whether twins run on the device, as far as that depends on the device."""
    return refusal(device) is None


def refusal(device: torch.device) -> str | None:
    """Why no twin runs on the device, or None."""
    if device.type != "cuda":
        return None if interpreter and device.type == "cpu" else NO_GPU
    return _gpu_refusal(device)


@functools.cache
def _gpu_refusal(device: torch.device) -> str | None:
    reason, version = _looked_up(device)
    if reason is None:
        log.info("kernels: Triton %s on %s", version, torch.cuda.get_device_name(device))
    return reason


def _looked_up(device: torch.device) -> tuple[str | None, str]:
    """Why no twin runs on the GPU, and Triton's version."""
    if os.environ.get(SWITCH) == "torch":
        return f"{SWITCH}=torch", ""
    if torch.version.hip is not None:
        return "not an NVIDIA GPU", ""
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "compute capability below 8.0", ""
    try:
        from .device_triton import INTERPRETED, VERSION
    except Exception as error:  # an installation may be broken in many ways
        return "no triton" if isinstance(error, ImportError) else f"triton: {type(error).__name__}", ""
    return ("TRITON_INTERPRET is set" if INTERPRETED and not interpreter else None), VERSION


def demand(condition: bool, reason: str) -> None:
    """Raise Unfit for that reason unless the condition holds."""
    if not condition:
        raise Unfit(reason)


def demand_like(x: Tensor, *others: Tensor | None) -> None:
    """Raise Unfit unless all have x's dtype and device, and all have unit stride along the last axis."""
    for other in (x, *others):
        if other is None:
            continue
        demand(other.dtype == x.dtype, "mixed dtypes")
        demand(other.device == x.device, "mixed devices")
        demand(other.stride(-1) == 1 or other.shape[-1] == 1, "last axis not contiguous")


def power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def _outcome(run: Callable, arguments: tuple[tuple, dict]) -> Any:
    args, kwargs = arguments
    return run(*args, **kwargs)


def _any_needs_grad(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_any_needs_grad(part) for part in value)
    return (
        (value.values if isinstance(value, Rows) else value).requires_grad
        if isinstance(value, Rows | Tensor)
        else False
    )


def _may_wait(device: torch.device) -> bool:
    """Whether the device may be waited for here."""
    if device.type != "cuda":
        return True
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() != 2
