"""Memory that processes have in common, for results that are too large for a message: a mapped file without a name."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .placement import Placed

log = logging.getLogger("ltx2.parallel")

SHARED_MEMORY = Path("/dev/shm")


class SegmentError(RuntimeError):
    """Shared memory cannot be had, or is not what the other side said."""


class Segment:
    """``num_bytes`` of memory shared by all processes that were given its descriptor.

    The file behind it has no name, and only its owner may open it (0600): it is gone with the last process that has it
    mapped, however that process ends. Tensors in it keep the memory mapped after ``close``.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Map a descriptor, which then belongs to the segment. Raises SegmentError when its file is smaller."""
        self._descriptor: int | None = descriptor
        self.num_bytes = num_bytes
        self._map: mmap.mmap | None = None
        found = os.fstat(descriptor).st_size
        # to touch a page beyond the file's end would be a signal
        if not 0 < num_bytes <= found:
            raise SegmentError(f"a segment has the bytes of its file, 1 to {found}; {num_bytes} were announced")
        try:
            self._map = mmap.mmap(descriptor, num_bytes)
        except OSError as error:
            raise SegmentError(f"a segment of {num_bytes} bytes cannot be mapped: {error.strerror}") from error

    @classmethod
    def reserve(cls, num_bytes: int, folders: Sequence[Path] | None = None) -> Segment:
        """New memory in the first of ``folders`` that has room (default: shared memory, then the temporary folder).

        Every page is there when this returns, so no later write meets a full file system, which would be a signal.
        Raises SegmentError with every folder's reason.
        """
        reasons = []
        for folder in folders or (SHARED_MEMORY, Path(tempfile.gettempdir())):
            try:
                return cls(_reserve_file(folder, num_bytes), num_bytes)
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror}")
                log.info("no room for a segment of %d bytes in %s: %s", num_bytes, folder, error.strerror)
        raise SegmentError(f"no room for {num_bytes} bytes of shared memory: {'; '.join(reasons)}")

    @property
    def descriptor(self) -> int:
        """For the other side's ``Segment``; it stays this one's."""
        if self._descriptor is None:
            raise SegmentError("the segment is closed")
        return self._descriptor

    def tensor(self, place: Placed) -> Tensor:
        """The memory at ``place`` as a tensor on the CPU; writing into it writes for all processes.

        Raises SegmentError when the place is not inside the segment.
        """
        if self._map is None:
            raise SegmentError("the segment is closed")
        if place.end > self.num_bytes:
            raise SegmentError(f"{place} ends beyond the segment's {self.num_bytes} bytes")
        if place.num_elements == 0:
            return torch.empty(place.shape, dtype=place.torch_dtype)
        flat = torch.frombuffer(self._map, dtype=place.torch_dtype, count=place.num_elements, offset=place.offset)
        return flat.view(place.shape)

    def close(self) -> None:
        """Give up the descriptor; the memory goes with the last tensor in it."""
        self._map = None
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _reserve_file(folder: Path, num_bytes: int) -> int:
    """The descriptor of a nameless file in ``folder`` with all of its bytes allocated."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return os.dup(file.fileno())
