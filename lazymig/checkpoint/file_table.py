"""``files.img``: every open file description, and every file that is only mapped, run, or a working directory."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable

from lazymig.errors import LazymigError
from lazymig.pb import descriptors_pb2, fdinfo_pb2, regfile_pb2
from lazymig.process.fdkind import no_owner
from lazymig.process.files import build_id
from lazymig.process.vmas import PROT_WRITE, Kind, Vma

_FIRST = 1 << 29  # below are the descriptors' own numbers, above those of `fdkind.SPECIAL_ID`
_O_LARGEFILE = 0o100000


def words_of(ident: bytes) -> list[int]:
    """A build-id as CRIU writes it: little-endian words of 32 bits."""
    whole = ident.ljust(-(-len(ident) // 4) * 4, b"\0")
    return list(struct.unpack(f"<{len(whole) // 4}I", whole))


def ident_of(words: Iterable[int]) -> bytes:
    """The inverse, but for the zeroes that fill up the last word."""
    return b"".join(w.to_bytes(4, "little") for w in words)


class FileTable:
    """The files of one dump. ``prefix`` goes before a path of the process to reach it from here."""

    def __init__(self, dump: descriptors_pb2.DescriptorsDump, prefix: str = "") -> None:
        self.dump = dump
        self.entries: list[fdinfo_pb2.file_entry] = []
        self._prefix = prefix
        self._next = _FIRST
        self._paths: dict[str, int] = {}
        self._objects: dict[tuple[int, int], int] = {}
        for e in dump.file:
            own = fdinfo_pb2.file_entry()
            own.CopyFrom(e)
            if own.HasField("reg"):
                _fit(own.reg)
            if own.HasField("pidfd"):
                own.pidfd.flags &= ~os.O_ACCMODE  # CRIU gives them to pidfd_open(2)
            self.entries.append(own)

    def _new(self, kind: int) -> fdinfo_pb2.file_entry:
        entry = fdinfo_pb2.file_entry(id=self._next)
        entry.type = kind  # type: ignore[assignment]
        self._next += 1
        self.entries.append(entry)
        return entry

    def path(self, path: str, *, mapped: bool = False) -> int:
        """The number of a file by its path, opened by nobody. LazymigError when it has no UTF-8 name."""
        known = self._paths.get(path)
        if known is not None:
            return known
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = path.encode("utf-8", "backslashreplace").decode()
            raise LazymigError(
                "its path is not UTF-8", code="fd-path", subject=shown, hint="rename it"
            ) from None
        entry = self._new(fdinfo_pb2.REG)
        r = entry.reg
        r.id, r.flags, r.pos, r.name = entry.id, 0, 0, path
        no_owner(r.fown)
        try:
            st = os.stat(self._prefix + path)
        except OSError:
            st = None
        if st is not None:
            r.mode, r.mtime_ns, r.dev, r.ino = st.st_mode, st.st_mtime_ns, st.st_dev, st.st_ino
            if stat.S_ISREG(st.st_mode):
                r.size = st.st_size
                if mapped:
                    r.build_id.extend(words_of(build_id(self._prefix + path)))
        self._paths[path] = entry.id
        return entry.id

    def mapped(self, vma: Vma) -> int:
        """The number of the file or memfd that a VMA maps."""
        if vma.path.startswith("/memfd:"):
            return self._memfd(vma)
        if not vma.deleted:
            return self.path(vma.path, mapped=True)
        known = self._objects.get(vma.object_key)
        if known is not None:
            return known
        for ghost in self.dump.ghost:
            if (ghost.head.dev, ghost.head.ino) == (vma.dev, vma.inode):
                entry = self._new(fdinfo_pb2.REG)
                r = entry.reg
                r.id, r.flags, r.pos, r.name, r.mode = entry.id, 0, 0, ghost.name, ghost.head.mode
                no_owner(r.fown)
                row = self.dump.remap.add(orig_id=entry.id, remap_id=ghost.id)
                row.remap_type = 1  # type: ignore[assignment] # GHOST
                self._objects[vma.object_key] = entry.id
                return entry.id
        raise LazymigError(
            "a deleted file is mapped that was not dumped", code="fd-deleted", subject=vma.path
        )

    def _memfd(self, vma: Vma) -> int:
        known = self._objects.get(vma.object_key)
        if known is not None:
            return known
        for m in self.dump.memfd:
            if (m.head.dev, m.head.ino) == vma.object_key:
                entry = self._new(fdinfo_pb2.MEMFD)
                e = entry.memfd
                e.id, e.flags, e.pos, e.inode_id = entry.id, os.O_RDWR | _O_LARGEFILE, 0, m.head.inode_id
                no_owner(e.fown)
                self._objects[vma.object_key] = entry.id
                return entry.id
        raise LazymigError("a memfd is mapped that was not dumped", code="fd-deleted", subject=vma.path)


def _fit(r: regfile_pb2.reg_file_entry) -> None:
    """As CRIU has it: mount ids only of mount namespaces that are dumped, sizes only where they are to be checked."""
    r.ClearField("mnt_id")
    grows = r.flags & os.O_APPEND and r.flags & os.O_ACCMODE == os.O_WRONLY
    if not stat.S_ISREG(r.mode) or grows or r.name.startswith(("/proc/", "/sys/")):
        r.ClearField("size")


def fdflags(vma: Vma) -> int:
    """How the file behind a VMA was opened."""
    return os.O_RDWR if vma.kind is not Kind.FILE and vma.prot & PROT_WRITE else os.O_RDONLY
