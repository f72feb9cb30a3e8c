"""Reading and writing image files: a header of magic words, then records.

A record is a little-endian u32 length, that many bytes of a protobuf message, and for some kinds a blob whose
length the message tells (format: CRIU, lib/pycriu/images; criu/include/magic.h). Everything read is taken for
hostile: no length is believed beyond the file's end or `MAX_RECORD`, and nothing but a regular file is opened.
Errors are LazymigError ``bad-image`` whose subject names the file and the record (from 0 on).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from google.protobuf.message import DecodeError, EncodeError, Message

from lazymig.errors import LazymigError, SyscallError
from lazymig.images.magic import COMMON, PAGEMAPS, REST, ZSTD_PAGEMAP, Kind, name_of_magic, parse_name

M = TypeVar("M", bound=Message)

MAX_RECORD = 64 << 20  # bytes of one message
MAX_LIST = 1 << 20  # records that read_image returns at once
MAX_BLOB = 64 << 20  # bytes of an extra blob that are read at once
_BLOCK = 1 << 20
_U32 = struct.Struct("<I")


def bad_image(path: Path | str, what: str, *, record: int | None = None, hint: str = "") -> LazymigError:
    """An image that cannot be used; ``record`` is the number of the record concerned."""
    subject = str(path) if record is None else f"{path} record {record}"
    return LazymigError(what, code="bad-image", subject=subject, hint=hint or "dump the process again")


def open_image(path: Path) -> int:
    """A descriptor of a regular file, for reading. LazymigError ``bad-image``, SyscallError."""
    try:
        # Not blocking: opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise bad_image(path, "there is no such image") from None
    except OSError as e:
        raise SyscallError("open", e.errno or errno.EIO, subject=str(path)) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise bad_image(path, "it is not a regular file")
    return fd


def decode(message_type: type[M], data: bytes, path: Path, number: int) -> M:
    """The message of a record. LazymigError ``bad-image`` when it is none, or lacks a required field."""
    try:
        message = message_type.FromString(data)
    except DecodeError as e:
        raise bad_image(path, f"it is no {message_type.DESCRIPTOR.name}: {e}", record=number) from None
    if not message.IsInitialized():  # not all implementations of protobuf look at this while they parse
        missing: list[str] = cast("Any", message).FindInitializationErrors()
        fields = message_type.DESCRIPTOR.fields_by_name
        # A value that an enum does not know counts as absent.
        which = [f"a known {n}" if n in fields and fields[n].enum_type else n for n in missing[:4]]
        what = f"it is no {message_type.DESCRIPTOR.name}: it lacks {', '.join(which)}"
        raise bad_image(path, what, record=number)
    return message


class Record(NamedTuple):
    """One record: its number in the file, its message, and where its blob is (bytes from the file's start)."""

    number: int
    message: Any
    extra_offset: int = 0
    extra_size: int = 0


class ImageReader:
    """The records of one image file, one at a time. A context manager.

    The kind is told by the file's name unless ``kind`` is given. LazymigError ``bad-image``, SyscallError.
    """

    def __init__(self, path: Path, kind: Kind | None = None) -> None:
        found = parse_name(path.name)
        if kind is None and found is None:
            raise bad_image(path, "no kind of image has such a name")
        self.path = path
        self.kind = kind if kind is not None or found is None else found[0]
        self._file: BinaryIO = os.fdopen(open_image(path), "rb", buffering=1 << 16)
        self.size = os.fstat(self._file.fileno()).st_size
        try:
            self.header_size = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Again is allowed."""
        self._file.close()

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as e:
            raise SyscallError("read", e.errno or errno.EIO, subject=str(self.path)) from e

    def _header(self) -> int:
        kind = self.kind
        assert kind is not None
        if kind.magic is None:
            return 0
        size = 4 * kind.words
        head = self._read(8)
        if len(head) < size:
            raise bad_image(self.path, "it is too short for an image")
        first, second = _U32.unpack_from(head)[0], _U32.unpack_from(head, 4)[0] if len(head) == 8 else 0
        # The records of a pagemap whose pages are packed are the usual ones.
        packed = kind.name in PAGEMAPS and (first, second) == (COMMON, ZSTD_PAGEMAP)
        found, wanted = [(first, second), (kind.first, kind.magic)]
        if kind.words == 1:
            found, wanted = (first, 0), (kind.magic, 0)
        if found != wanted and not packed:
            raise bad_image(
                self.path, f"wrong magic: this is not {kind.name} but {name_of_magic(first, second)}"
            )
        self._file.seek(size)
        return size

    def __iter__(self) -> Iterator[Record]:
        """The records in order, from the first on. Whoever stops early has not checked the rest."""
        kind = self.kind
        assert kind is not None
        if kind.message is None:
            raise bad_image(self.path, f"images of kind {kind.name} are not decoded")
        at, number = self.header_size, 0
        while at < self.size:
            self._file.seek(at)
            head = self._read(4)
            if len(head) < 4:
                raise bad_image(self.path, "it ends amid a record's length", record=number)
            (size,) = _U32.unpack(head)
            at += 4
            if size > MAX_RECORD or size > self.size - at:
                raise bad_image(
                    self.path,
                    f"the record is {size} bytes long, and the file has {self.size - at} more",
                    record=number,
                )
            if kind.single and number:
                raise bad_image(self.path, f"an image of kind {kind.name} has one record", record=number)
            message_type = kind.type_of(number)
            assert message_type is not None
            message = decode(message_type, self._read(size), self.path, number)
            at += size
            extra = kind.extra(message) if kind.extra else 0
            extra = self.size - at if extra == REST else extra
            if extra > self.size - at:
                raise bad_image(
                    self.path,
                    f"{extra} bytes should follow the record, and the file has {self.size - at} more",
                    record=number,
                )
            yield Record(number, message, at, extra)
            at += extra
            number += 1
        if kind.single and not number:
            raise bad_image(self.path, "it has no record")

    def extra(self, record: Record) -> bytes:
        """The blob of a record, whole. LazymigError ``bad-image`` when it is longer than `MAX_BLOB`."""
        if record.extra_size > MAX_BLOB:
            raise bad_image(self.path, f"a blob of {record.extra_size} bytes", record=record.number)
        return b"".join(self.extra_blocks(record))

    def extra_blocks(self, record: Record) -> Iterator[bytes]:
        """The blob of a record in pieces."""
        at, end = record.extra_offset, record.extra_offset + record.extra_size
        while at < end:
            try:
                block = os.pread(self._file.fileno(), min(_BLOCK, end - at), at)
            except OSError as e:
                raise SyscallError("pread", e.errno or errno.EIO, subject=str(self.path)) from e
            if not block:
                raise bad_image(self.path, "it ends amid a blob", record=record.number)
            at += len(block)
            yield block


def read_image(path: Path, message_type: type[M]) -> list[M]:
    """All messages of an image whose records are of one type; blobs are passed over.

    The name must be that of an image with such records. LazymigError ``bad-image``, SyscallError.
    """
    found = parse_name(path.name)
    if found is None or found[0].message is not message_type or found[0].later is not None:
        raise bad_image(path, f"images of such a name do not hold {message_type.DESCRIPTOR.name}")
    messages: list[M] = []
    with ImageReader(path) as reader:
        for record in reader:
            if record.number >= MAX_LIST:
                raise bad_image(path, f"more than {MAX_LIST} records")
            messages.append(record.message)
    return messages


def read_one(path: Path, message_type: type[M]) -> M:
    """The only message of an image that must have exactly one."""
    messages = read_image(path, message_type)
    if len(messages) != 1:
        raise bad_image(path, f"it has {len(messages)} records where one should be")
    return messages[0]


def header(kind: Kind) -> bytes:
    """The magic words with which an image of this kind begins."""
    if kind.magic is None:
        return b""
    return (b"" if kind.words == 1 else _U32.pack(kind.first)) + _U32.pack(kind.magic)


@contextlib.contextmanager
def telling(call: str, path: Path | str) -> Iterator[None]:
    """Turns an OSError into a SyscallError that names the path, and says what to do about a full disk."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room: nothing was left behind" if full else ""
        raise SyscallError(call, e.errno or errno.EIO, subject=str(path), hint=hint) from e


class ImageWriter:
    """Writes one new image file. A context manager: leaving it without an error syncs the file to the disk.

    SyscallError names the file (``shown``, when it will get another name) when it is there already, or cannot be
    written (a full disk).
    """

    def __init__(self, path: Path, kind: Kind | None = None, *, shown: Path | None = None) -> None:
        found = parse_name(path.name)
        if kind is None:
            if found is None:
                raise ValueError(f"no kind of image is named {path.name}")
            kind = found[0]
        self.path, self.kind = path, kind
        self._shown = shown or path
        self.records = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with telling("open", self._shown):
            self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o600), "wb", buffering=1 << 16)
        self._put(header(kind))

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self._file.close()
        except OSError:
            pass  # the error on its way out says more

    def _put(self, data: bytes | memoryview) -> None:
        with telling("write", self._shown):
            self._file.write(data)

    def write(self, message: Message, extra: bytes | Iterable[bytes] = b"") -> None:
        """Adds a record, and the blob that follows it (whole, or in pieces).

        ValueError when the message is not of the type that belongs there, lacks a required field, or tells
        another length than the blob has.
        """
        wanted = self.kind.type_of(self.records)
        if wanted is None or not isinstance(message, wanted):
            raise ValueError(f"{self.path.name} does not hold {message.DESCRIPTOR.name} there")
        try:
            data = message.SerializeToString()
        except EncodeError as e:
            raise ValueError(f"{self.path.name}: {e}") from None
        if len(data) > MAX_RECORD:
            raise ValueError(f"{self.path.name}: a record of {len(data)} bytes")
        self._put(_U32.pack(len(data)) + data)
        written = 0
        for block in (extra,) if isinstance(extra, bytes) else extra:
            self._put(block)
            written += len(block)
        told = self.kind.extra(message) if self.kind.extra else 0
        if told not in (written, REST):
            raise ValueError(f"{self.path.name}: a blob of {written} bytes where {told} are told of")
        self.records += 1

    def write_encoded(self, data: bytes | memoryview, records: int) -> None:
        """Adds records that are encoded already, lengths included. Trusts them."""
        self._put(data)
        self.records += records

    def close(self) -> None:
        """Writes all of it to the disk. Again is allowed."""
        if self._file.closed:
            return
        try:
            with telling("write", self._shown):
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            try:
                self._file.close()
            except OSError:
                pass  # told already


def write_image(path: Path, messages: Message | Iterable[Message], *, shown: Path | None = None) -> None:
    """Writes a whole image without blobs; the kind is told by the name. SyscallError."""
    with ImageWriter(path, shown=shown) as writer:
        for message in (messages,) if isinstance(messages, Message) else messages:
            writer.write(message)
