"""Numbers of the bulk frames that Python needs, and the codecs. The layouts are in wire.h and fault_wire.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymig.errors import LazymigError

FRAME_PAGES, FRAME_ZERO, FRAME_GATE, FRAME_END = 1, 2, 3, 4
ZEROABLE = 1  # a page of zeroes may be told as a ZERO range
FORCE = 2  # mapped without the right to read or write it: through /proc/PID/mem
EPROTO = 71


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to compress batches of pages. ``unpack`` takes the size it must come to, and raises on anything else."""

    number: int
    name: str
    pack: Callable[[memoryview], bytes]
    unpack: Callable[[memoryview, int], bytes]


def _lz4() -> Codec:
    import lz4.block

    def unpack(data: memoryview, size: int) -> bytes:
        return bytes(lz4.block.decompress(data, uncompressed_size=size))

    return Codec(1, "lz4", lambda d: bytes(lz4.block.compress(d, mode="fast", store_size=False)), unpack)


def _zstd() -> Codec:
    import zstandard

    # One of each for every Codec object: they are not to be used by two threads at once.
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def unpack(data: memoryview, size: int) -> bytes:
        # What the frame says of itself decides how much memory is taken.
        if zstandard.frame_content_size(data) != size:
            raise ValueError("a frame of another size than announced")
        return bytes(unpacker.decompress(data, max_output_size=size))

    return Codec(2, "zstd", lambda d: bytes(packer.compress(d)), unpack)


_MAKERS: dict[str, Callable[[], Codec]] = {"lz4": _lz4, "zstd": _zstd}
_NAMES = {1: "lz4", 2: "zstd"}


def codec(name: str | int) -> Codec:
    """A codec by name or number, for one thread. LazymigError ``codec-missing`` if its library is not installed."""
    name = _NAMES.get(name, str(name)) if isinstance(name, int) else name
    try:
        return _MAKERS[name]()
    except (KeyError, ImportError):
        raise LazymigError(
            "there is no such compression here",
            code="codec-missing",
            subject=name,
            hint="pip install lazymig[compress]",
        ) from None


def codecs() -> list[str]:
    """Names of the codecs whose libraries are installed: what a hello may offer."""
    found = []
    for name, make in _MAKERS.items():
        try:
            make()
        except ImportError:
            continue
        found.append(name)
    return found
