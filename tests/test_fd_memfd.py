"""memfds: objects, descriptions, seals, content that is no memory."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest
from fd_kit import Taken, move, stopped, text

from lazymig.process.descriptors import DescriptorRestorer, MappedObject

SEAL, SHRINK, GROW, WRITE = 1, 2, 4, 8


def test_object_descriptions_and_seals():
    def work():
        fd = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
        os.write(fd, b"some content")
        os.pwrite(fd, b"far", 10 << 20)
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.read(reader, 5)
        fcntl.fcntl(fd, 1033, SHRINK | GROW | WRITE | SEAL)
        return fd, reader

    def check():
        with pytest.raises(PermissionError):
            os.pwrite(3, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(3, 0)
        st = os.fstat(3)
        return (
            os.readlink("/proc/self/fd/3"),
            os.lseek(3, 0, os.SEEK_CUR),
            os.read(4, 7),
            os.pread(3, 10, 10 << 20),
            st.st_size,
            st.st_blocks < 100,
            fcntl.fcntl(3, 1034),
            os.path.sameopenfile(3, 4),
        )

    got = move(work, check)
    far = (10 << 20) + 3
    seals = SEAL | SHRINK | GROW | WRITE
    assert got == ("/memfd:a name (deleted)", 12, b"content", b"far", far, True, seals, True)


def test_mapped_part_is_left_to_the_memory_path():
    def work():
        fd = os.memfd_create("m")
        os.ftruncate(fd, 3 * 4096)
        m = mmap.mmap(fd, 4096, offset=4096)
        m[:4] = b"mine"
        os.pwrite(fd, b"head", 0)
        os.pwrite(fd, b"tail", 8192)
        return fd, m

    with stopped(work) as src:
        line = next(x for x in text(src.proc("maps")).splitlines() if "memfd:m" in x)
        st = os.stat(src.proc("fd/3"))
        key = (st.st_dev, st.st_ino)
        map_file = src.proc(f"map_files/{line.split()[0]}")
        mapped = {key: MappedObject(map_file, "/memfd:m (deleted)", ((4096, 4096),), writable=True)}
        taken = Taken(src, mapped=mapped)
        assert [c.off for c in taken.final.memfd[0].chunk] == [0, 8192]
        assert not taken.draft.memfd[0].chunk
        r = DescriptorRestorer()
        r.prepare(taken.draft)
        early = r.object(*key)
        assert early is not None
        assert os.fstat(early).st_size == 3 * 4096
        os.pwrite(early, b"mine", 4096)  # as the memory path does
        places = r.finish(taken.final)
        fd = next(p.local_fd for p in places if p.fd == 3)
        assert [os.pread(fd, 4, n * 4096) for n in range(3)] == [b"head", b"mine", b"tail"]
        assert os.path.sameopenfile(fd, early)
        r.close()


def test_memfd_that_grows_and_that_has_no_descriptor():
    def work():
        fd = os.memfd_create("grows")
        os.ftruncate(fd, 4096)
        return fd

    with stopped(work) as src:
        taken = Taken(src)
        fd = src.getfd(3)
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"end", (1 << 20) - 3)
        os.close(fd)
        taken.final = taken.dumper.final()
        assert taken.restored(lambda: (os.fstat(3).st_size, os.pread(3, 3, (1 << 20) - 3))) == (
            1 << 20,
            b"end",
        )
