"""Messages and the channel they go over: what is sent arrives, what is malformed is refused, and the receiver lives."""

import json
import os
import socket
import struct
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.parallel import messages
from ltx2_engine.ltx2_core.parallel.channel import Channel, ChannelClosed
from ltx2_engine.ltx2_core.parallel.messages import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    PREFIX,
    Message,
    MessageError,
    decode,
    encode,
)
from ltx2_engine.ltx2_core.parallel.placement import DTYPES, Placed
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment

HEADER = {
    "kind": "job",
    "generation": 3,
    "job": 7,
    "stage": "",
    "name": "sample",
    "body": {},
    "placed": {},
    "segment": 0,
}
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Pair:
    """A channel and the bare socket at its other end."""

    def __init__(self):
        self.raw, end = socket.socketpair()
        self.raw.settimeout(5)
        self.channel = Channel(end)

    def write(self, data):
        threading.Thread(target=self.raw.sendall, args=(data,), daemon=True).start()

    def close(self):
        self.raw.close()
        self.channel.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


def no_segment(num_bytes):
    raise AssertionError(f"no segment of {num_bytes} bytes was sent")


def decoded(message):
    head, tensors = encode(message)
    return decode(head[PREFIX.size :], tensors, no_segment)


def header(**changes):
    return json.dumps({**HEADER, **changes}).encode()


def framed(head, tensors=b""):
    return PREFIX.pack(MAGIC, len(head), len(tensors)) + head + tensors


# what is sent arrives ------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was():
    body = {"sigmas": [1.0, 0.5, 0.0], "seed": 2**63 + 5, "prompt": "größer \ud800", "none": None, "yes": True}
    placed = {"frames": Placed("U8", (9, 64, 96, 3), 128)}
    message = Message("progress", generation=2, job=9, stage="decode", name="x", body=body, placed=placed)
    assert decoded(message) == message


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)], ids=str)
def test_tensors_of_every_dtype_arrive_with_their_bits(dtype, shape):
    x = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)
    found = decoded(Message("result", tensors={"x": x})).tensor("x", dtype, shape)
    assert torch.equal(found.view(torch.uint8) if shape else found.reshape(1).view(torch.uint8), bits(x))


def bits(x):
    return x.view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def test_tensors_may_be_views_of_one_another():
    x = torch.arange(12.0).view(3, 4)
    tensors = {"x": x, "again": x, "columns": x.T, "row": x[1]}
    found = decoded(Message("job", tensors=tensors)).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@FUZZ
@given(body=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_json_body_arrives(body):
    assert decoded(Message("job", body=body)).body == body


def test_large_messages_pass_in_pieces(pair):
    x = torch.randn(3, 700_001)
    sender = Channel(pair.raw.dup())
    thread = threading.Thread(target=sender.send, args=(Message("result", tensors={"x": x}), 10.0))
    thread.start()
    assert torch.equal(pair.channel.receive().tensors["x"], x)
    thread.join()
    sender.close()


def test_bytes_that_come_one_by_one_make_a_message(pair):
    data = b"".join(encode(Message("job", name="a", tensors={"x": torch.ones(2)})))

    def drip():
        for byte in data:
            pair.raw.send(bytes([byte]))

    threading.Thread(target=drip, daemon=True).start()
    assert pair.channel.receive().name == "a"


def test_a_segment_comes_along(pair):
    place = Placed("I32", (5,), 64)
    before = len(os.listdir("/proc/self/fd"))
    with Segment.reserve(256) as segment:
        sender = Channel(pair.raw.dup())
        sender.send(Message("job", segment=segment, placed={"x": place}))
        sender.send(Message("stop"))
        sender.close()
        message = pair.channel.receive()
        message.segment.tensor(message.placed["x"])[:] = torch.arange(5, dtype=torch.int32)
        assert segment.tensor(place).tolist() == [0, 1, 2, 3, 4]
        message.segment.close()
    assert pair.channel.receive().kind == "stop"
    del message
    assert len(os.listdir("/proc/self/fd")) == before


# what may not be sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Message("nonsense"),
        Message("job", job=-1),
        Message("job", name="x" * 121),
        Message("job", stage="two\nlines"),
        Message("job", body={"x": float("nan")}),
        Message("job", body={"x": object()}),
        Message("job", body={"x": "y" * MAX_HEADER_BYTES}),
        Message("job", tensors={"x": torch.zeros(2, dtype=torch.complex64)}),
        Message("job", tensors={"x": torch.zeros([1] * 9)}),
        Message("job", tensors={str(i): torch.zeros(1) for i in range(1025)}),
    ],
    ids=range(10),
)
def test_senders_are_told_what_nobody_would_take(message):
    with pytest.raises(MessageError):
        encode(message)


def test_what_the_other_side_does_not_take_is_a_timeout(pair):
    with pytest.raises(TimeoutError, match="takes no messages"):
        pair.channel.send(Message("result", tensors={"x": torch.zeros(1_000_000)}), seconds=0.1)


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "JSON object"),
        (header(more=1), "unknown ['more']"),
        (json.dumps({"kind": "job"}).encode(), "missing"),
        (header(kind="run"), "field kind"),
        (header(kind=["job"]), "field kind"),
        (header(job=True), "field job"),
        (header(job=1.0), "field job"),
        (header(generation=2**63), "field generation"),
        (header(name="é"), "field name"),
        (header(body=[]), "field body"),
        (header()[:-1] + b', "job": 8}', "twice"),
        (header(body={"x": 1.0}).replace(b"1.0", b"NaN"), "finite"),
        (header(body={"x": 1.0}).replace(b"1.0", b"1e999"), "finite"),
        (header(placed={"x": ["F32", [2]]}), "dtype, shape and offset"),
        (header(placed={"x": ["F33", [2], 0]}), "dtype must be one of"),
        (header(placed={"x": [["F32"], [2], 0]}), "dtype must be one of"),
        (header(placed={"x": ["F32", [-2], 0]}), "sizes of 0 or more"),
        (header(placed={"x": ["F32", [2.0], 0]}), "sizes of 0 or more"),
        (header(placed={"x": ["F32", [1] * 9, 0]}), "at most 8 sizes"),
        (header(placed={"x": ["F32", [2], 2]}), "multiple of 4"),
        (header(placed={"x": ["F32", [2**40, 2**40], 0]}), "ends beyond"),
        (header(segment=64), "none came along"),
    ],
    ids=range(24),
)
def test_malformed_headers_are_refused_and_the_next_message_is_received(pair, head, says):
    pair.write(framed(head) + framed(header(name="next")))
    with pytest.raises(MessageError, match=says.replace("[", r"\[")):
        pair.channel.receive()
    assert pair.channel.receive().name == "next"


def safetensors_bytes(entries, data):
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.mark.parametrize(
    "tensors",
    [
        b"x",
        struct.pack("<Q", 2**60) + b"{}",
        safetensors_bytes({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 12),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, b"\0" * 16),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, b"\0" * 16),
        safetensors_bytes({"x": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}, b"\0" * 16),
        safetensors_bytes({"x": {"dtype": "F32", "shape": [1] * 8 + [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        safetensors_bytes({"é": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
    ],
    ids=range(8),
)
def test_malformed_tensors_are_refused_and_the_next_message_is_received(pair, tensors):
    pair.write(framed(header(), tensors) + framed(header(name="next")))
    with pytest.raises(MessageError):
        pair.channel.receive()
    assert pair.channel.receive().name == "next"


@pytest.mark.parametrize("lengths", [(MAX_HEADER_BYTES + 1, 0), (2, MAX_TENSOR_BYTES + 1), (2**32 - 1, 2**64 - 1)])
def test_oversized_messages_are_refused_without_their_bytes(pair, lengths):
    pair.write(PREFIX.pack(MAGIC, *lengths) + b"x" * 300_000 + framed(header(name="next")))
    with pytest.raises(MessageError, match="at most"):
        pair.channel.receive()
    assert pair.channel.receive().name == "next"


def test_after_garbage_the_next_message_is_found(pair):
    pair.write(b"GET / HTTP/1.1\r\n\r\n" * 5000 + MAGIC[:5] + framed(header(name="next")))
    with pytest.raises(MessageError, match="begins with"):
        pair.channel.receive()
    assert pair.channel.receive().name == "next"


def test_a_message_cut_short_costs_at_most_the_one_behind_it(pair):
    cut = framed(header(body={"text": "x" * 2000}))[:-1500]
    pair.write(cut + framed(header(body={"text": "y" * 3000})) + framed(header(name="next")))
    refused, found = 0, None
    while found is None:
        try:
            found = pair.channel.receive()
        except MessageError:
            refused += 1
    assert (found.name, refused) == ("next", 2)


@pytest.mark.parametrize("length", [1, PREFIX.size, PREFIX.size + 10, -1])
def test_a_message_cut_short_by_the_end_is_refused_then_the_channel_is_closed(pair, length):
    pair.raw.sendall(framed(header())[:length])
    pair.raw.close()
    with pytest.raises(MessageError, match="ended after"):
        pair.channel.receive()
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            pair.channel.receive()


def test_sending_to_nobody_is_an_error_not_a_signal(pair):
    pair.raw.close()
    with pytest.raises(ChannelClosed):
        pair.channel.send(Message("stop"))


def test_hanging_up_ends_a_receive_that_waits(pair):
    threading.Timer(0.05, pair.channel.hang_up).start()
    with pytest.raises(ChannelClosed):
        pair.channel.receive()


def test_descriptors_that_nobody_announced_are_closed(pair):
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        for data in (framed(header()), b"garbage" * 9, framed(header())):
            socket.send_fds(pair.raw, [data], [file.fileno(), file.fileno()])
    assert pair.channel.receive().job == 7
    with pytest.raises(MessageError):
        pair.channel.receive()
    assert pair.channel.receive().job == 7
    assert len(os.listdir("/proc/self/fd")) == before


# whatever arrives ----------------------------------------------------------------------------------------------------

VALID = framed(header(body={"a": [1, 2.5]}), encode(Message("job", tensors={"x": torch.ones(3)}))[1])


def receive_all(data):
    """Messages and refusals of a stream that ends: never another error, and never a wait."""
    raw, end = socket.socketpair()
    channel = Channel(end)
    threading.Thread(target=lambda: (raw.sendall(data), raw.close()), daemon=True).start()
    received, refused = [], 0
    try:
        while True:
            try:
                received.append(channel.receive())
            except MessageError:
                refused += 1
    except ChannelClosed:
        return received, refused
    finally:
        channel.close()


@FUZZ
@given(garbage=st.binary(max_size=200))
def test_garbage_between_messages(garbage):
    received, refused = receive_all(VALID + garbage + VALID)
    assert len(received) == 2
    assert refused == bool(garbage)


@FUZZ
@given(position=st.integers(0, len(VALID) - 1), value=st.integers(0, 255))
def test_one_changed_byte(position, value):
    data = bytearray(VALID)
    data[position] = value
    received, refused = receive_all(bytes(data) + VALID * 2)
    assert refused or len(received) == 3
    # a length that grew takes what is behind for its own
    in_lengths = len(MAGIC) <= position < PREFIX.size
    assert in_lengths or len(received) >= 2


@FUZZ
@given(head=st.binary(max_size=80) | st.dictionaries(st.sampled_from([*HEADER, "x"]), json_values).map(json.dumps))
def test_any_header(head):
    head = head if isinstance(head, bytes) else head.encode()
    received, refused = receive_all(framed(head) + VALID)
    assert len(received) + refused == 2


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(list(HEADER)), json_values))
def test_any_value_of_a_field(changes):
    received, refused = receive_all(framed(header(**changes)) + VALID)
    assert len(received) + refused == 2


@FUZZ
@given(tensors=st.binary(min_size=1, max_size=120))
def test_any_tensor_bytes(tensors):
    received, refused = receive_all(framed(header(), tensors) + VALID)
    assert len(received) + refused == 2


# what the receiver wants ---------------------------------------------------------------------------------------------


def test_a_tensor_is_taken_with_its_dtype_and_shape():
    message = Message("job", tensors={"latent": torch.zeros(1, 128, 4, dtype=torch.bfloat16)})
    assert message.tensor("latent", torch.bfloat16, (1, 128, None)).shape == (1, 128, 4)
    for name, dtype, shape in (
        ("sound", torch.bfloat16, (1,)),
        ("latent", torch.float32, (1, 128, None)),
        ("latent", torch.bfloat16, (1, 64, None)),
        ("latent", torch.bfloat16, (1, 128)),
    ):
        with pytest.raises(MessageError):
            message.tensor(name, dtype, shape)


def test_every_field_of_a_message_is_checked():
    assert set(messages._FIELDS) == set(HEADER)
