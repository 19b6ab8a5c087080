"""The wire between a cell's parent and its workers: length-prefixed msgpack frames, numpy arrays, a mutual handshake.

A frame is a 4-byte big-endian length and one msgpack map. An array travels as an extension of dtype, shape and bytes.
Both sides prove that they hold the same token before anything else is read; the token itself never travels. Frames are
neither encrypted nor signed after that: workers on other hosts belong on a network that one trusts. No JAX.
"""

import contextlib
import hashlib
import hmac
import math
import secrets
import socket
import struct
import threading
import time
from typing import Any

import msgpack
import numpy as np

from jmoe.serving.errors import CellFailedError

PROTOCOL = 2  # changes with any change of the frames or of the commands
MAX_FRAME_BYTES = 64 << 20  # 256 slots x 32 steps x 20 top log-probabilities are 2 MB; 64 MiB leaves room
MAX_HANDSHAKE_BYTES = 1024  # all that an unproven peer may make us hold
MIN_TOKEN_LEN = 16
_MAX_DIMS = 8
_ARRAY = 1  # msgpack extension type
_DTYPES = frozenset(("|b1", "|i1", "|u1", "<i4", "<u4", "<i8", "<f4", "<f8"))
_LENGTH = struct.Struct(">I")


class WireError(CellFailedError):
    """A frame that is too large or malformed, or a peer that does not hold the token."""


def encode(message: dict[str, Any], max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """One frame, length included.

    Raises:
      WireError: the frame would be larger than max_bytes.
    """
    body = _pack(message)
    if len(body) > max_bytes:
        raise WireError(f"frame to send: expected at most {max_bytes} bytes, got {len(body)}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """The map of one frame's body; arrays are read-only views of the bytes.

    Raises:
      WireError: anything but one well-formed map with text keys.
    """
    try:
        message = msgpack.unpackb(body, ext_hook=_unpack_array, strict_map_key=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as e:
        raise WireError(f"malformed frame: {type(e).__name__}: {e}") from e
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise WireError(f"malformed frame: expected a map with text keys, got {type(message).__name__}")
    return message


def _pack(value: Any) -> bytes:
    packed = msgpack.packb(value, default=_pack_array)
    assert packed is not None  # as it would be from a packer that keeps its buffer
    return packed


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"expected plain data or a numpy array, got {type(value).__name__}")
    if value.dtype.str not in _DTYPES:
        raise TypeError(f"array dtype: expected one of {sorted(_DTYPES)}, got {value.dtype.str}")
    parts = (value.dtype.str, list(value.shape), value.tobytes())
    return msgpack.ExtType(_ARRAY, _pack(parts))


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise ValueError(f"extension type: expected {_ARRAY}, got {code}")
    parts = msgpack.unpackb(data)
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("array: expected dtype, shape and bytes")
    dtype, shape, raw = parts
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"array dtype: expected one of {sorted(_DTYPES)}, got {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"array shape: expected at most {_MAX_DIMS} sizes, got {str(shape)[:80]}")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(raw, bytes) or len(raw) != expected:
        raise ValueError(f"array {dtype}{shape}: expected {expected} bytes, got {len(raw)}")
    return np.frombuffer(raw, dtype).reshape(shape)


class FrameBuffer:
    """Cuts a byte stream into frames; a length over the cap is refused before anything is kept for it."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES):
        self.max_bytes = max_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def next_frame(self) -> bytes | None:
        """The next whole frame's body, or None until more bytes arrive."""
        if len(self._data) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._data)
        if size > self.max_bytes:
            raise WireError(f"frame received: expected at most {self.max_bytes} bytes, got a length of {size}")
        end = _LENGTH.size + size
        if len(self._data) < end:
            return None
        body = bytes(self._data[_LENGTH.size : end])
        del self._data[:end]
        return body


class Channel:
    """One connected socket that carries frames both ways; sends are whole and may come from several threads."""

    def __init__(self, sock: socket.socket, max_bytes: int = MAX_FRAME_BYTES):
        self.socket = sock
        self._buffer = FrameBuffer(max_bytes)
        self._send_lock = threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _detect_dead_hosts(sock)

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message; the socket's timeout bounds the wait."""
        self.send_frame(encode(message, self._buffer.max_bytes))

    def send_frame(self, frame: bytes) -> None:
        """Sends a frame made by `encode`, so that one encoding serves several workers."""
        with self._send_lock:
            self.socket.sendall(frame)

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        """Waits for the next message, until `deadline` (time.monotonic) where one is given.

        Raises:
          EOFError: the peer closed the connection.
          TimeoutError: the deadline passed.
          WireError: the frame is too large or malformed.
        """
        while (body := self._buffer.next_frame()) is None:
            if deadline is not None:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError("no message before the deadline")
                self.socket.settimeout(left)
            self._read()
        return decode(body)

    def read_ready(self) -> list[dict[str, Any]]:
        """Reads once from a socket that is ready, and returns the messages that are now whole (maybe none)."""
        self._read()
        messages = []
        while (body := self._buffer.next_frame()) is not None:
            messages.append(decode(body))
        return messages

    def _read(self) -> None:
        data = self.socket.recv(1 << 18)
        if not data:
            raise EOFError("the peer closed the connection")
        self._buffer.feed(data)

    def set_max_bytes(self, max_bytes: int) -> None:
        self._buffer.max_bytes = max_bytes

    def close(self) -> None:
        """Ends the connection in both directions, also under a thread that is blocked on it."""
        with contextlib.suppress(OSError):  # already gone
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _detect_dead_hosts(sock: socket.socket) -> None:
    """Small frames leave at once, and a host that vanished without a FIN ends the connection within 20 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, name):  # Linux names
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def handshake(channel: Channel, token: str, side: str, hello: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Proves to the peer that this side holds the token, checks that the peer does, and returns the peer's hello.

    Each side sends a hello with a nonce, then HMAC-SHA256(token, side | own hello | peer's hello).

    Args:
      channel: a fresh connection.
      token: the cell's secret, at least MIN_TOKEN_LEN characters.
      side: "parent" or "worker"; the peer must be the other one.
      hello: plain data that the peer gets to know (and can trust, once the proof holds).
      timeout_s: bound of the whole exchange.

    Raises:
      ValueError: a token that is too short.
      WireError: a peer of another version or without the token, or one that sends too much.
      EOFError, TimeoutError, OSError: the connection ended or the time is up.
    """
    if len(token) < MIN_TOKEN_LEN:
        raise ValueError(f"worker token: expected at least {MIN_TOKEN_LEN} characters, got {len(token)}")
    deadline = time.monotonic() + timeout_s
    max_bytes = channel._buffer.max_bytes
    channel.set_max_bytes(MAX_HANDSHAKE_BYTES)
    mine = _pack({**hello, "protocol": PROTOCOL, "nonce": secrets.token_bytes(32)})
    channel.socket.settimeout(timeout_s)
    channel.send({"hello": mine})
    theirs = channel.receive(deadline).get("hello")
    if not isinstance(theirs, bytes):
        raise WireError("handshake: expected a hello, got something else")
    peer = decode(theirs)
    channel.send({"proof": _proof(token, side, mine, theirs)})
    proof = channel.receive(deadline).get("proof")
    other = "worker" if side == "parent" else "parent"
    if not isinstance(proof, bytes) or not hmac.compare_digest(proof, _proof(token, other, theirs, mine)):
        raise WireError(f"handshake: the {other} does not hold this cell's token")
    if peer.get("protocol") != PROTOCOL:
        raise WireError(f"handshake: expected protocol {PROTOCOL}, got {peer.get('protocol')!r}")
    channel.set_max_bytes(max_bytes)
    return peer


def _proof(token: str, side: str, own_hello: bytes, peer_hello: bytes) -> bytes:
    parts = (side.encode(), own_hello, peer_hello)
    return hmac.new(token.encode(), _pack(parts), hashlib.sha256).digest()
