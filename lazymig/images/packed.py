"""Pages packed with zstd: ``pages-N.zst`` in place of ``pages-N.img``, on request.

The file is in zstd's seekable format (facebook/zstd, contrib/seekable_format): frames that each hold `FRAME`
bytes of pages, then a skippable frame with a table of their sizes. ``zstd -d`` gives back pages-N.img. The pagemap
that goes with it has a magic of ours, so that CRIU refuses it at once instead of finding no pages.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from lazymig.errors import LazymigError, SyscallError
from lazymig.images.framing import bad_image, open_image, telling

FRAME = 256 << 10  # bytes of pages in a frame
_LEVEL = 3
_SKIPPABLE = 0x184D2A5E
_SEEKABLE = 0x8F92EAB1
_HEAD = struct.Struct("<II")
_FOOT = struct.Struct("<IBI")
_MAX_FRAME = 1 << 20  # of frames that others made
_MAX_TABLE = 1 << 30


def file_name(pages_id: int) -> str:
    """The name of a file of packed pages."""
    return f"pages-{pages_id}.zst"


def require() -> Any:  # noqa: ANN401
    """The zstandard module. LazymigError ``no-zstd`` when it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise LazymigError(
            "packing pages needs the Python package zstandard",
            code="no-zstd",
            hint="pip install 'lazymig[compress]'",
        ) from None
    return zstandard


def pack(fd: int, path: Path, shown: Path) -> None:
    """Packs the file of a descriptor to a new file ``path``, and syncs it. SyscallError names ``shown``."""
    packer = require().ZstdCompressor(level=_LEVEL, write_content_size=True)
    table = bytearray()
    at, size = 0, os.fstat(fd).st_size
    with telling("write", shown / path.name):
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(out, "wb", buffering=1 << 20) as f:
            while at < size and (raw := os.pread(fd, min(FRAME, size - at), at)):
                frame = packer.compress(raw)
                f.write(frame)
                table += _HEAD.pack(len(frame), len(raw))
                at += len(raw)
            f.write(_HEAD.pack(_SKIPPABLE, len(table) + _FOOT.size) + table)
            f.write(_FOOT.pack(len(table) // _HEAD.size, 0, _SEEKABLE))
            f.flush()
            os.fsync(f.fileno())


class PackedPages:
    """Reads a file of packed pages anywhere. A context manager. LazymigError ``bad-image``, SyscallError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        zstd = require()
        self._unpack: Callable[[bytes, int], bytes] = zstd.ZstdDecompressor().decompress
        self._told: Callable[[bytes], int] = zstd.frame_content_size
        self._fd = open_image(path)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PackedPages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Again is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pread(self, size: int, at: int) -> bytes:
        try:
            return os.pread(self._fd, size, at)
        except OSError as e:
            raise SyscallError("pread", e.errno or 5, subject=str(self.path)) from e

    def _index(self) -> None:
        size = os.fstat(self._fd).st_size
        if size < _HEAD.size + _FOOT.size:
            raise bad_image(self.path, "it is too short for packed pages")
        n, flags, magic = _FOOT.unpack(self._pread(_FOOT.size, size - _FOOT.size))
        entry = 12 if flags & 0x80 else 8  # with a checksum of each frame
        start = size - _FOOT.size - n * entry - _HEAD.size
        if magic != _SEEKABLE or flags & 0x7F or start < 0 or n * entry > _MAX_TABLE:
            raise bad_image(self.path, "it has no table of frames at its end")
        data = self._pread(size - start, start)
        if _HEAD.unpack_from(data) != (_SKIPPABLE, n * entry + _FOOT.size):
            raise bad_image(self.path, "it has no table of frames at its end")
        sizes = [_HEAD.unpack_from(data, _HEAD.size + i * entry) for i in range(n)]
        if any(not raw or raw > _MAX_FRAME for _, raw in sizes):
            raise bad_image(self.path, "a frame's size is impossible")
        self._at = list(accumulate((p for p, _ in sizes), initial=0))
        self._raw = list(accumulate((r for _, r in sizes), initial=0))
        if self._at[-1] != start:
            raise bad_image(self.path, "its frames do not fill it")

    @property
    def size(self) -> int:
        """Bytes of pages, unpacked."""
        return int(self._raw[-1])

    def _frame(self, i: int) -> bytes:
        packed_size, size = self._at[i + 1] - self._at[i], self._raw[i + 1] - self._raw[i]
        packed = self._pread(packed_size, self._at[i])
        try:
            # The library would make room for whatever the frame tells, however much that is.
            data = self._unpack(packed, size) if self._told(packed) in (size, -1) else b""
        except Exception as e:  # the library's own kind
            raise bad_image(self.path, f"it cannot be unpacked: {e}", record=i) from None
        if len(data) != size:
            raise bad_image(self.path, f"the frame does not unpack to {size} bytes", record=i)
        return data

    def blocks(self, offset: int, size: int) -> Iterator[bytes]:
        """The bytes from ``offset`` on, in pieces of at most a frame."""
        if offset + size > self.size:
            raise bad_image(self.path, "it is shorter than its pagemap says")
        i = bisect_right(self._raw, offset) - 1
        while size:
            data = self._frame(i)[offset - self._raw[i] :][:size]
            yield data
            offset, size, i = offset + len(data), size - len(data), i + 1

    def check(self) -> None:
        """Unpacks everything once."""
        for i in range(len(self._raw) - 1):
            self._frame(i)
