"""GPU memory that other processes of the host can open, and copies between rows of it that copy engines make.

PyTorch's copy between strided tensors is a kernel, which takes multiprocessors from the computing beside it, and its copy
between GPUs waits for streams of both, which a graph cannot hold. So the driver is asked itself: CUDA Driver API 11 and later,
sections "Memory Management" (``cuMemcpy2DAsync``, ``cuIpcOpenMemHandle``) and "Unified Addressing".
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_UNIFIED = 4
# CU_DEVICE_ATTRIBUTE_MAX_PITCH
_WIDEST = (1 << 31) - 1


class DriverError(RuntimeError):
    """The driver has refused something, and says why."""


@dataclass(frozen=True)
class Rows:
    """Where rows begin on the device, and bytes from one to the next."""

    address: int
    pitch: int

    def below(self, count: int) -> Rows:
        """Those behind so many of them."""
        return Rows(self.address + count * self.pitch, self.pitch)


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY2D"""

    _fields_ = [
        (f"{side}_{name}", kind)
        for side in ("from", "to")
        for name, kind in (
            ("x", ctypes.c_size_t),
            ("y", ctypes.c_size_t),
            ("kind", ctypes.c_int),
            ("host", ctypes.c_void_p),
            ("device", ctypes.c_uint64),
            ("array", ctypes.c_void_p),
            ("pitch", ctypes.c_size_t),
        )
    ] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


class OwnMemory:
    """Zeroed memory of this process that others can open; it does not belong to PyTorch's allocator."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises DriverError where there is no room."""
        self.nbytes, self._device = nbytes, device
        address = ctypes.c_uint64()
        with torch.cuda.device(device):
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self.address = address.value
        self.bytes = torch.as_tensor(self, device=device).zero_()

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def handle(self) -> bytes:
        """What another process opens it with."""
        handle = _Handle()
        with torch.cuda.device(self._device):
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def free(self) -> None:
        """Give it back. Nobody may have it open any more."""
        with torch.cuda.device(self._device):
            _call("cuMemFree_v2", ctypes.c_uint64(self.address))


def open_memory(handle: bytes, device: torch.device) -> int:
    """The address, for work on ``device``, of memory of another process. Raises DriverError where the GPUs cannot reach each
    other or the memory is not of this host."""
    address, given = ctypes.c_uint64(), _Handle.from_buffer_copy(handle)
    with torch.cuda.device(device):
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
    return address.value


def close_memory(address: int, device: torch.device) -> None:
    """Let go of memory of another process."""
    with torch.cuda.device(device):
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def rows_of(x: Tensor) -> Rows:
    """The rows of x [T, W], which lie anywhere, each in one piece."""
    assert x.stride(1) == 1, "a row has to lie in one piece"
    return Rows(x.data_ptr(), x.stride(0) * x.element_size())


def copy_rows(source: Rows, target: Rows, width: int, count: int, stream: torch.cuda.Stream) -> None:
    """So many rows of ``width`` bytes, in the order of the stream."""
    if count == 0:
        return
    if source.pitch == target.pitch == width and width * count <= _WIDEST:
        # one piece; the driver wants no pitch below the width
        width, count = width * count, 1
        source, target = Rows(source.address, width), Rows(target.address, width)
    copy = _Copy(
        from_kind=_UNIFIED,
        from_device=source.address,
        from_pitch=source.pitch,
        to_kind=_UNIFIED,
        to_device=target.address,
        to_pitch=target.pitch,
        width=width,
        height=count,
    )
    with torch.cuda.device(stream.device):
        _call("cuMemcpy2DAsync_v2", ctypes.byref(copy), ctypes.c_void_p(stream.cuda_stream))


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(str(error)) from error


def _call(name: str, *arguments: object) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'error').decode()} ({code})")
