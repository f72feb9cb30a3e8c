"""The control channel: length-prefixed msgpack frames with an optional raw attachment, bounded on receipt.

A frame is two little-endian u32 (length of the body, length of the attachment), the body (a msgpack map whose
"t" names the frame) and the attachment. See docs/protocol.md for the frames.
"""

from __future__ import annotations

import math
import os
import select
import struct
from typing import Any

import msgpack
import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.native import ffi, lib

VERSION = 1
MAX_BODY = 64 << 20  # a layout of 100,000 VMAs and the state of 1,000 threads stay below
MAX_ATTACHMENT = 256 << 20
MAX_HELLO = 4096
MAX_VALUES = 4 << 20  # in a body: what a short byte becomes here is an object of some 70
_FEW = 1 << 20  # bytes of a body that cannot hold too many
PATIENCE_S = float(os.environ.get("LAZYMIG_PATIENCE", "20"))  # with a peer that is there and does nothing
_HEAD = struct.Struct("<II")

Frame = dict[str, Any]


def encode(frame: Frame, attachment: bytes = b"") -> bytes:
    """A frame's bytes. Paths keep undecodable bytes by surrogate escapes."""
    body = msgpack.packb(frame, use_bin_type=True, unicode_errors="surrogateescape")
    if len(body) > MAX_BODY or len(attachment) > MAX_ATTACHMENT:
        raise LazymigError(
            "too large for one frame", code="frame-too-large", subject=f"frame {frame.get('t')}"
        )
    return _HEAD.pack(len(body), len(attachment)) + bytes(body) + attachment


def decode_body(body: bytes) -> Frame:
    """A frame's map; ProtocolError unless it is one with a name."""
    if (
        len(body) > _FEW
        and lib.lm_msgpack_values(ffi.from_buffer("uint8_t[]", body), len(body), MAX_VALUES) > MAX_VALUES
    ):
        raise ProtocolError("a frame holds too many values")
    try:
        frame = msgpack.unpackb(body, raw=False, unicode_errors="surrogateescape", strict_map_key=False)
    except Exception as e:
        raise ProtocolError(f"a frame cannot be decoded: {type(e).__name__}") from None
    if not isinstance(frame, dict) or not isinstance(frame.get("t"), str):
        raise ProtocolError("a frame has no name")
    return frame


class Channel:
    """One end of a control connection. Receiving is for one task at a time; sending is whole frames."""

    def __init__(self, stream: trio.SocketStream, peer: str) -> None:
        self.stream = stream
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self._lock = trio.Lock()
        self._max_body, self._max_attachment = MAX_BODY, MAX_ATTACHMENT

    def bound(self, body: int | None, attachment: int | None) -> None:
        """Takes no longer frames than these from now on (None: no longer ones than anybody's)."""
        self._max_body = min(body or MAX_BODY, MAX_BODY)
        self._max_attachment = min(attachment or MAX_ATTACHMENT, MAX_ATTACHMENT)

    def _check_size(self, body: int, attachment: int, max_body: int = MAX_BODY) -> None:
        what = f"a frame of {body} + {attachment} bytes is too large"
        if body > min(max_body, MAX_BODY) or attachment > MAX_ATTACHMENT:
            raise ProtocolError(what, subject=self.peer)
        for rule, most, n in (
            ("frame", self._max_body, body),
            ("attachment", self._max_attachment, attachment),
        ):
            if n > most:
                raise LazymigError(
                    f"{what}: the policy's limits.{rule} is {most}", code=f"policy-{rule}", subject=self.peer
                )

    async def send(self, frame: Frame, attachment: bytes = b"") -> None:
        """Sends a frame; PeerLostError when the connection is broken."""
        data = encode(frame, attachment)
        try:
            async with self._lock:
                await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
            raise PeerLostError("the connection broke", subject=self.peer) from e
        self.bytes_sent += len(data)

    async def receive(self, *, max_body: int = MAX_BODY) -> tuple[Frame, bytes]:
        """The next frame and its attachment.

        Raises PeerLostError at the end of the connection, ProtocolError for a frame out of bounds, and the
        peer's own error when the frame is one.
        """
        body_len, attached_len = _HEAD.unpack(await self._exactly(_HEAD.size))
        self._check_size(body_len, attached_len, max_body)
        frame = decode_body(await self._exactly(body_len))
        attachment = await self._exactly(attached_len)
        self.bytes_received += _HEAD.size + body_len + attached_len
        if frame["t"] == "error":
            raise LazymigError.from_wire(frame)
        return frame, attachment

    async def expect(self, *names: str, within: float | None = None) -> tuple[Frame, bytes]:
        """The next frame, which must have one of these names; PeerLostError when ``within`` seconds none comes."""
        try:
            with trio.fail_after(math.inf if within is None else within):
                frame, attachment = await self.receive()
        except trio.TooSlowError:
            raise self.stuck(within or 0) from None
        return self._named(frame, names), attachment

    def send_now(self, frame: Frame, attachment: bytes = b"") -> None:
        """Sends without giving up the processor: for the freeze, where a turn of the event loop is downtime.

        Nothing else may be sending. PeerLostError, also when the peer takes nothing for PATIENCE_S.
        """
        data = memoryview(encode(frame, attachment))
        self.bytes_sent += len(data)
        fd = self.stream.socket.fileno()
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as e:
                raise PeerLostError("the connection broke", subject=self.peer) from e

    def expect_now(self, *names: str) -> tuple[Frame, bytes]:
        """The same for receiving a frame that must have one of these names."""
        body_len, attached_len = _HEAD.unpack(self._exactly_now(_HEAD.size))
        self._check_size(body_len, attached_len)
        frame = decode_body(self._exactly_now(body_len))
        attachment = self._exactly_now(attached_len)
        self.bytes_received += _HEAD.size + body_len + attached_len
        return self._named(frame, names), attachment

    def _exactly_now(self, n: int) -> bytes:
        data = b""
        fd = self.stream.socket.fileno()
        while len(data) < n:
            try:
                got = os.read(fd, n - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as e:
                raise PeerLostError("the connection broke", subject=self.peer) from e
            if not got:
                raise PeerLostError("the other host closed the connection", subject=self.peer)
            data += got
        return data

    def _wait(self, event: int) -> None:
        p = select.poll()
        p.register(self.stream.socket.fileno(), event)
        if not p.poll(PATIENCE_S * 1000):
            raise self.stuck(PATIENCE_S)

    def stuck(self, seconds: float) -> PeerLostError:
        """The error of a peer that is connected and does nothing for so long."""
        return PeerLostError(
            f"it does not answer for {seconds:.0f} s",
            code="peer-stuck",
            subject=self.peer,
            hint="is the process there stopped, or its host overloaded?",
        )

    def _named(self, frame: Frame, names: tuple[str, ...]) -> Frame:
        if frame["t"] == "error":
            raise LazymigError.from_wire(frame)
        if frame["t"] not in names:
            raise ProtocolError(
                f"got frame {frame['t']!r} instead of {' or '.join(names)}", subject=self.peer
            )
        return frame

    async def _exactly(self, n: int) -> bytes:
        parts: list[bytes] = []
        while n:
            try:
                got = await self.stream.receive_some(min(n, 1 << 20))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
                raise PeerLostError("the connection broke", subject=self.peer) from e
            if not got:
                raise PeerLostError("the other host closed the connection", subject=self.peer)
            parts.append(bytes(got))
            n -= len(got)
        return b"".join(parts)

    async def send_error(self, error: LazymigError) -> None:
        """Tells the peer of an error, when it still listens."""
        with trio.move_on_after(1):
            try:
                await self.send({"t": "error", **error.to_wire()})
            except PeerLostError:
                pass

    async def aclose(self) -> None:
        """Closes the connection."""
        await self.stream.aclose()
