"""Whole messages over one end of a pair of connected Unix sockets, which a worker inherits. Nobody listens anywhere."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time

from .messages import MAGIC, PREFIX, Message, MessageError, decode, encode, lengths
from .shared_memory import Segment, SegmentError

_BLOCK = 1 << 16
_NUMBER = struct.Struct("i")
_ROOM_FOR_A_DESCRIPTOR = socket.CMSG_LEN(_NUMBER.size) if hasattr(socket, "CMSG_LEN") else 0
# a descriptor that arrives is not for programs that this process starts
_RECEIVE = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
# a peer that is gone is an error, not a signal; a full buffer is waited for with a deadline
_SEND = getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_DONTWAIT", 0)


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One end: any thread may send, one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()
        # received and not used yet
        self._ahead = b""
        self._descriptors: list[int] = []
        self._lost = False

    @classmethod
    def inherited(cls, descriptor: int) -> Channel:
        """The end that a process was started with; programs that it starts in turn do not get it."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    # sending

    def send(self, message: Message, seconds: float | None = None) -> None:
        """Send a whole message. Raises MessageError when it may not be sent, ChannelClosed when the other side is gone.

        Raises TimeoutError when the other side does not take it for so long; the channel is of no use then.
        """
        self.send_encoded(encode(message), message.segment, seconds)

    def send_encoded(self, parts: tuple[bytes, bytes], segment: Segment | None, seconds: float | None = None) -> None:
        """Send what ``encode`` made of a message; one that goes to many is encoded once."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._sending:
            start = 0
            if segment is not None:
                # a descriptor travels with the first bytes of its message
                start = self._send_some(memoryview(parts[0]), segment.descriptor, deadline)
            for part in (memoryview(parts[0])[start:], memoryview(parts[1])):
                while part:
                    part = part[self._send_some(part, None, deadline) :]

    def _send_some(self, data: memoryview, descriptor: int | None, deadline: float | None) -> int:
        ancillary = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _NUMBER.pack(descriptor))]
        while True:
            try:
                return self._end.sendmsg([data], ancillary, _SEND)
            except BlockingIOError:
                self._wait_for_room(deadline)
            except OSError as error:
                raise ChannelClosed(f"the other side is gone: {error.strerror}") from error

    def _wait_for_room(self, deadline: float | None) -> None:
        room = select.poll()
        room.register(self._end, select.POLLOUT)
        left = None if deadline is None else deadline - time.monotonic()
        if (left is not None and left <= 0) or not room.poll(None if left is None else left * 1000):
            raise TimeoutError("the other side takes no messages")

    # receiving

    def receive(self) -> Message:
        """Wait for the next message.

        Raises MessageError for one that is malformed, too large or cut short: it is skipped, and the next call goes on
        behind it. Raises ChannelClosed when the other side is gone.
        """
        if self._lost:
            self._find_start()
        prefix = self._read(PREFIX.size)
        if not prefix:
            raise ChannelClosed("the other side is gone")
        # until the message is complete nobody knows where the next one begins
        self._lost = True
        header_bytes, tensor_bytes = self._lengths(_whole(prefix, PREFIX.size))
        header = _whole(self._read(header_bytes), header_bytes)
        tensors = _whole(self._read(tensor_bytes), tensor_bytes)
        self._lost = False
        try:
            return decode(header, tensors, self._take_segment)
        finally:
            self._drop_descriptors()

    def _lengths(self, prefix: bytes) -> tuple[int, int]:
        try:
            return lengths(prefix)
        except MessageError:
            # the next message may begin within what was read
            self._ahead = prefix[1:] + self._ahead
            raise

    def _take_segment(self, num_bytes: int) -> Segment:
        if not self._descriptors:
            raise MessageError(f"a segment of {num_bytes} bytes was announced, none came along")
        try:
            return Segment(self._descriptors.pop(), num_bytes)
        except SegmentError as error:
            raise MessageError(str(error)) from error

    def _read(self, num_bytes: int) -> bytes:
        """So many bytes; fewer when the other side is gone."""
        data = memoryview(bytearray(num_bytes))
        filled = min(num_bytes, len(self._ahead))
        data[:filled], self._ahead = self._ahead[:filled], self._ahead[filled:]
        while filled < num_bytes:
            received = self._receive_into(data[filled:])
            if not received:
                break
            filled += received
        return bytes(data[:filled])

    def _find_start(self) -> None:
        """Skip what is left of a message that was refused, to where the next one begins."""
        self._drop_descriptors()
        window, block = self._ahead, bytearray(_BLOCK)
        while (start := window.find(MAGIC)) < 0:
            received = self._receive_into(memoryview(block))
            if not received:
                raise ChannelClosed("the other side is gone")
            window = window[-len(MAGIC) + 1 :] + block[:received]
        self._ahead, self._lost = window[start:], False

    def _receive_into(self, block: memoryview) -> int:
        """Wait for bytes and say how many have come; none when the other side is gone."""
        try:
            received, ancillary, _, _ = self._end.recvmsg_into([block], _ROOM_FOR_A_DESCRIPTOR, _RECEIVE)
        except OSError:
            return 0
        for _, _, sent in ancillary:
            self._descriptors += (number for (number,) in _NUMBER.iter_unpack(sent))
        return received

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    # the end

    def hang_up(self) -> None:
        """Tell the other side that nothing follows, and end a ``receive`` that is waiting here."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give up the descriptor, when no thread receives any more."""
        self._end.close()
        self._drop_descriptors()


def _whole(data: bytes, num_bytes: int) -> bytes:
    if len(data) < num_bytes:
        raise MessageError(f"a message ended after {len(data)} of {num_bytes} bytes")
    return data
