"""Frames, arrays and the handshake: what comes back is what was sent, and nothing else gets in."""

import socket
import struct
import threading
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jmoe.serving import wire
from jmoe.serving.wire import Channel, FrameBuffer, WireError, decode, encode, handshake

TOKEN = "a token of the cell, long enough"
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)
dtypes = st.sampled_from([np.bool_, np.int32, np.uint32, np.int64, np.uint8, np.float32, np.float64])
arrays = dtypes.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=4)))


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_plain_messages_come_back(message):
    assert decode(encode(message)[4:]) == message


@given(arrays)
def test_arrays_come_back(array):
    back = decode(encode({"a": array, "inside": [array]})[4:])
    for got in (back["a"], back["inside"][0]):
        assert got.dtype == array.dtype and got.shape == array.shape
        assert got.tobytes() == array.tobytes()  # bytes: NaN payloads and -0.0 included


def test_arrays_that_are_not_contiguous_come_back():
    array = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::-3].T
    np.testing.assert_array_equal(decode(encode({"a": array})[4:])["a"], array)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_an_error(body):
    try:
        message = decode(body)
    except WireError:
        return
    assert isinstance(message, dict) and all(isinstance(key, str) for key in message)


def array_body(dtype, shape, raw) -> bytes:
    return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((dtype, shape, raw)))})


@pytest.mark.parametrize(
    "body",
    [
        array_body("|O8", [1], b"12345678"),
        array_body("<M8[s]", [1], b"12345678"),
        array_body("<i4", [3], b"1234"),
        array_body("<i4", [-1], b"1234"),
        array_body("<i4", [2**40, 2**40], b""),
        array_body("<i4", [1] * 9, b"1234"),
        array_body("<i4", [True], b"1234"),
        array_body("<i4", [1], "1234"),
        array_body(["<i4"], [1], b"1234"),
        msgpack.packb({"a": msgpack.ExtType(2, b"")}),
        msgpack.packb({"a": msgpack.ExtType(1, b"\x01")}),
        msgpack.packb({"a": msgpack.Timestamp(1)}) + b"more",
        msgpack.packb({1: 2}),
        msgpack.packb([1, 2]),
        b"\x81" * 5000,
        b"",
    ],
)
def test_malformed_bodies_are_refused(body):
    with pytest.raises(WireError):
        decode(body)


def test_what_can_not_travel_is_refused():
    with pytest.raises(TypeError):
        encode({"a": np.array(["text"])})
    with pytest.raises(TypeError):
        encode({"a": object()})
    with pytest.raises(WireError, match="at most 100 bytes"):
        encode({"a": b"x" * 101}, max_bytes=100)


@given(st.lists(st.binary(max_size=30), max_size=5), st.integers(1, 7))
def test_frames_survive_any_cutting(bodies, step):
    stream = b"".join(encode({"b": body}) for body in bodies)
    buffer, got = FrameBuffer(), []
    for start in range(0, len(stream), step):
        buffer.feed(stream[start : start + step])
        while (body := buffer.next_frame()) is not None:
            got.append(decode(body)["b"])
    assert got == bodies


def test_an_oversized_length_is_refused_before_its_bytes_come():
    buffer = FrameBuffer(max_bytes=1000)
    buffer.feed(struct.pack(">I", 1001))
    with pytest.raises(WireError, match="at most 1000 bytes, got a length of 1001"):
        buffer.next_frame()


def pair() -> tuple[Channel, Channel]:
    a, b = socket.socketpair()
    return Channel(a), Channel(b)


def shake(parent_args, worker_args):
    """Both sides of a handshake at once; returns what each got or raised."""
    ends, results = pair(), {}

    def run(side, channel, token, hello):
        try:
            results[side] = handshake(channel, token, side, hello, 5.0)
        except (OSError, EOFError, WireError) as e:
            results[side] = e
            channel.close()

    threads = [
        threading.Thread(target=run, args=("parent", ends[0], *parent_args)),
        threading.Thread(target=run, args=("worker", ends[1], *worker_args)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results, ends


def test_a_handshake_hands_both_hellos_over_and_then_large_frames_pass():
    results, (parent, worker) = shake((TOKEN, {"v": 1}), (TOKEN, {"index": 3}))
    assert results["worker"]["v"] == 1
    assert results["parent"]["index"] == 3
    array = np.arange(10_000, dtype=np.int32)
    sender = threading.Thread(target=parent.send, args=({"a": array},))
    sender.start()
    np.testing.assert_array_equal(worker.receive(time.monotonic() + 10)["a"], array)
    sender.join(10)


def test_frames_sent_right_behind_the_handshake_are_kept(monkeypatch):
    """The parent's first command may share a packet with its proof, and may be larger than a handshake's frame."""
    results, (parent, worker) = None, pair()
    real_recv = Channel._read
    monkeypatch.setattr(Channel, "_read", lambda self: (time.sleep(0.1), real_recv(self))[1])
    got = {}

    def serve():
        got["hello"] = handshake(worker, TOKEN, "worker", {}, 5.0)
        got["command"] = worker.receive(time.monotonic() + 5)

    thread = threading.Thread(target=serve)
    thread.start()
    results = handshake(parent, TOKEN, "parent", {"v": 2}, 5.0)
    parent.send({"number": 1, "blob": b"x" * 5000})
    thread.join(20)
    assert results["protocol"] == wire.PROTOCOL
    assert got["hello"]["v"] == 2 and got["command"]["blob"] == b"x" * 5000


def test_another_token_is_refused_on_both_sides():
    results, _ = shake((TOKEN, {}), (TOKEN + "!", {}))
    assert any(isinstance(e, WireError) and "does not hold" in str(e) for e in results.values())
    assert all(isinstance(e, (WireError, EOFError, OSError)) for e in results.values())


def test_a_peer_of_the_same_side_is_refused():
    """A peer without the token that echoes the parent's own bytes proves nothing."""
    ours, theirs = pair()

    def echo():
        try:
            while data := theirs.socket.recv(4096):
                theirs.socket.sendall(data)
        except OSError:
            pass

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    with pytest.raises(WireError, match="does not hold"):
        handshake(ours, TOKEN, "parent", {}, 5.0)
    ours.close()


def test_another_protocol_is_refused(monkeypatch):
    ours, theirs = pair()
    got = {}

    def old_worker():
        deadline = time.monotonic() + 5
        mine = msgpack.packb({"protocol": wire.PROTOCOL - 1})
        theirs.send({"hello": mine})
        hello = theirs.receive(deadline)["hello"]
        theirs.send({"proof": wire._proof(TOKEN, "worker", mine, hello)})
        got["done"] = True

    thread = threading.Thread(target=old_worker)
    thread.start()
    with pytest.raises(WireError, match=f"expected protocol {wire.PROTOCOL}, got {wire.PROTOCOL - 1}"):
        handshake(ours, TOKEN, "parent", {}, 5.0)
    thread.join(10)
    assert got["done"]


def test_an_unproven_peer_gets_no_memory_and_no_time():
    ours, theirs = pair()
    theirs.socket.sendall(struct.pack(">I", 1025) + b"x" * 100)
    with pytest.raises(WireError, match="at most 1024 bytes"):
        handshake(ours, TOKEN, "parent", {}, 5.0)
    ours, theirs = pair()
    with pytest.raises(TimeoutError):
        handshake(ours, TOKEN, "parent", {}, 0.05)
    with pytest.raises(ValueError, match="at least 16 characters, got 5"):
        handshake(ours, "short", "parent", {}, 0.05)


def test_a_peer_that_drips_bytes_does_not_stretch_the_handshake():
    """The bound is for the whole exchange: single bytes would each start a socket's own timeout anew."""
    ours, theirs = pair()
    stop = threading.Event()

    def drip():
        theirs.socket.sendall(struct.pack(">I", 1000))
        while not stop.wait(0.02):
            theirs.socket.sendall(b"\x81")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            handshake(ours, TOKEN, "parent", {}, 0.3)
    finally:
        stop.set()
        thread.join(10)


def test_a_closed_peer_is_the_end_of_the_stream():
    ours, theirs = pair()
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive(time.monotonic() + 5)
