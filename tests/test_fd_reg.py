"""Files by path, directories, devices, deleted files, locks."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time

import pytest
from fd_kit import Taken, end, flags_of, move, refused, stopped, text

from lazymig.errors import LazymigError, ProcessGoneError, RefusedError
from lazymig.process.descriptors import DescriptorDumper, DescriptorRestorer, MappedObject
from lazymig.process.source import SourceProcess


def test_offsets_flags_and_shared_descriptions(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"hello world")

    def work():
        a = os.open(path, os.O_RDWR)
        os.lseek(a, 6, os.SEEK_SET)
        os.dup2(a, 20)
        b = os.open(path, os.O_RDONLY)
        c = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        return a, b, c

    def check():
        first = os.read(3, 3)
        return first, os.read(20, 9), os.read(4, 5), os.write(5, b"!"), flags_of(5), os.get_inheritable(3)

    first, second, third, _, flags, inherit = move(work, check)
    assert (first, second, third) == (b"wor", b"ld", b"hello")
    assert path.read_bytes() == b"hello world!"
    assert flags & os.O_APPEND
    assert flags & os.O_NONBLOCK
    assert not inherit


def test_flags_stay_to_the_last_bit(tmp_path):
    (tmp_path / "f").touch()

    def work():
        for flags in (
            os.O_RDWR,
            os.O_RDONLY | os.O_NOFOLLOW,
            os.O_WRONLY | os.O_APPEND | os.O_SYNC,
            os.O_PATH,
        ):
            os.open(tmp_path / "f", flags)
        os.open(tmp_path, os.O_RDONLY)
        os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        os.open("/dev/null", os.O_RDWR | os.O_NONBLOCK)
        os.open("/dev/zero", os.O_RDONLY | os.O_NOFOLLOW)

    with stopped(work) as src:
        fds = [fd for fd in src.fds() if fd > 2]
        before = [src.fdinfo(fd).split()[3] for fd in fds]

        def check():
            found = []
            for fd in fds:
                with open(f"/proc/self/fdinfo/{fd}", "rb") as f:
                    found.append(f.read().split()[3])
            return found

        assert Taken(src).restored(check) == before


def test_directory_goes_on_where_it_was(tmp_path):
    for n in range(50):
        (tmp_path / f"f{n}").touch()

    def work():
        return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), os.open(tmp_path, os.O_PATH)

    def check():
        return sorted(os.listdir(3)), os.stat("f7", dir_fd=4).st_size, flags_of(4) & os.O_PATH

    names, size, is_path = move(work, check)
    assert len(names) == 50
    assert size == 0
    assert is_path


def test_symlink_itself(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    got = move(
        lambda: os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW), lambda: os.readlink("", dir_fd=3)
    )
    assert got == "nowhere"


def test_devices():
    def work():
        return [os.open(f"/dev/{n}", os.O_RDWR) for n in ("null", "zero", "full", "random", "urandom")]

    def check():
        with pytest.raises(OSError, match="No space") as e:
            os.write(5, b"x")
        return os.read(3, 1), os.read(4, 2), e.value.errno, len(os.read(7, 8))

    assert move(work, check) == (b"", b"\0\0", errno.ENOSPC, 8)


def test_deleted_file_goes_on(tmp_path):
    path = tmp_path / "gone"

    def work():
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        os.write(fd, b"head")
        os.pwrite(fd, b"tail", 50 << 20)
        again = os.open(path, os.O_WRONLY | os.O_APPEND)
        path.unlink()
        os.fchown(fd, 1, 2)
        os.utime(fd, ns=(10**18, 10**18 + 7))
        return fd, again

    def check():
        st = os.fstat(3)
        os.write(4, b"+more")
        return (
            os.pread(3, 4, 0),
            os.pread(3, 20, 50 << 20),
            os.lseek(3, 0, os.SEEK_CUR),
            (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_nlink, st.st_mtime_ns, st.st_blocks < 100),
            os.readlink("/proc/self/fd/3").startswith(str(tmp_path)),
            os.path.sameopenfile(3, 4),
        )

    head, tail, pos, inode, place, same = move(work, check)
    assert (head, tail, pos) == (b"head", b"tail+more", 4)
    assert inode == (0o640, 1, 2, 0, 10**18 + 7, True)
    assert place
    assert same


def test_settled_content_travels_before_the_freeze(tmp_path):
    path = tmp_path / "gone"
    path.write_bytes(b"x" * (3 << 20))
    os.utime(path, (time.time() - 100,) * 2)

    def work():
        fd = os.open(path, os.O_RDWR)
        path.unlink()
        return fd

    with stopped(work) as src:
        taken = Taken(src)
        assert sum(len(c.data) for c in taken.draft.ghost[0].chunk) == 3 << 20
        assert max(len(c.data) for c in taken.draft.ghost[0].chunk) <= 1 << 20
        assert taken.final.ghost[0].same
        assert not taken.final.ghost[0].chunk
        assert taken.restored(lambda: os.read(3, 4 << 20)) == b"x" * (3 << 20)
        # What is written after the draft travels in the final dump.
        fd = os.open(f"/proc/{src.pid}/fd/3", os.O_WRONLY)
        os.write(fd, b"new")
        os.close(fd)
        final = taken.dumper.final()
        assert not final.ghost[0].same
        taken.final = final
        assert taken.restored(lambda: os.read(3, 5)) == b"newxx"


def test_tmpfile(tmp_path):
    def work():
        fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(fd, b"anonymous")
        return fd

    assert move(work, lambda: os.pread(3, 20, 0)) == b"anonymous"


def test_deleted_file_that_is_only_mapped(tmp_path):
    path = tmp_path / "lib"
    path.write_bytes(b"code" * 1024)

    def work():
        fd = os.open(path, os.O_RDONLY)
        m = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
        os.close(fd)
        path.unlink()
        return m

    with stopped(work) as src:
        line = next(x for x in text(src.proc("maps")).splitlines() if "lib (deleted)" in x)
        map_file = src.proc(f"map_files/{line.split()[0]}")
        st = os.stat(map_file)
        key = (st.st_dev, st.st_ino)
        # mmap keeps a duplicate of the descriptor open, which is not what this is about
        taken = Taken(src, mapped={key: MappedObject(map_file, f"{path} (deleted)")})
        assert len(taken.final.ghost) == 1
        r = DescriptorRestorer()
        r.prepare(taken.draft)
        early = r.object(*key)
        assert early is not None
        r.finish(taken.final)
        assert r.object(*key) == early
        assert os.pread(early, 8, 0) == b"codecode"
        r.close()


def test_refuses_what_cannot_be_found_again(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "a").write_text("x")

    def work():
        d = os.open(folder, os.O_RDONLY)
        folder.rmdir()
        a = os.open(tmp_path / "a", os.O_RDONLY)
        os.link(tmp_path / "a", tmp_path / "b")
        os.unlink(tmp_path / "a")
        p = os.open("/proc/1/status", os.O_RDONLY)
        return d, a, p

    got = refused(work)
    assert [r.code for r in got] == ["fd-deleted", "fd-deleted", "fd-kind"]
    assert got[0].subject.startswith(f"fd 3 ({folder}")
    assert "another process" in got[2].reason


def test_too_much_content_is_refused(tmp_path):
    def work():
        fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
        for _ in range(3):
            os.write(fd, b"x" * (1 << 20))
        return fd

    with stopped(work) as src:
        (r,) = DescriptorDumper(src, limit=2 << 20).refusals()
        assert (r.code, r.reason[:5]) == ("fd-content", "3 MiB")


def test_own_proc_files_are_opened_anew():
    with stopped(lambda: os.open("/proc/self/stat", os.O_RDONLY)) as src:
        taken = Taken(src)
        end(src)
        with pytest.raises(pytest.fail.Exception, match="file-missing"):
            taken.restored(lambda: None)


def test_missing_and_changed_files_are_named(tmp_path):
    path = tmp_path / "data"
    path.write_text("12345")
    with stopped(lambda: os.open(path, os.O_RDWR)) as src:
        taken = Taken(src)
        r = DescriptorRestorer()
        r.prepare(taken.draft)
        path.write_text("1234567")
        with pytest.raises(LazymigError, match=r"file-differs: fd 3 .*7 bytes here and 5"):
            r.finish(taken.final)
        r.close()
        path.unlink()
        with pytest.raises(LazymigError, match=rf"file-missing: fd 3 .{path}"):
            DescriptorRestorer().prepare(taken.draft)
        path.mkdir()
        with pytest.raises(LazymigError, match="another type"):
            DescriptorRestorer().prepare(taken.draft)


def test_file_replaced_between_draft_and_final(tmp_path):
    path = tmp_path / "data"
    path.write_text("old!")
    with stopped(lambda: os.open(path, os.O_RDWR)) as src:
        taken = Taken(src)
    path.rename(tmp_path / "x")
    path.write_text("new!")
    with stopped(lambda: os.open(path, os.O_RDWR)) as src:
        taken.final = DescriptorDumper(src).final()
        assert taken.restored(lambda: os.read(3, 10)) == b"new!"


@pytest.mark.parametrize("name", ["relative", "/a/../b", "/" + "x" * 5000, "/a\0b"])
def test_unsafe_paths(tmp_path, name):
    (tmp_path / "f").touch()
    with stopped(lambda: os.open(tmp_path / "f", os.O_RDONLY)) as src:
        taken = Taken(src)
    taken.draft.file[-1].reg.name = name
    with pytest.raises(LazymigError, match="not an absolute path"):
        DescriptorRestorer().prepare(taken.draft)


def test_locks_move(tmp_path):
    path = tmp_path / "locked"
    path.write_bytes(b"x" * 100)

    def work():
        a = os.open(path, os.O_RDWR)
        fcntl.lockf(a, fcntl.LOCK_EX, 10, 5)
        fcntl.lockf(a, fcntl.LOCK_SH, 0, 50)
        b = os.open(path, os.O_RDWR)
        fcntl.flock(b, fcntl.LOCK_EX)
        c = os.open(path, os.O_RDWR)
        fcntl.fcntl(c, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 30, 5, 0))
        return a, b, c

    def check():
        return [
            line.split(maxsplit=2)[2] for line in text("/proc/self/fdinfo/3").splitlines() if "lock:" in line
        ], [sum("lock:" in line for line in text(f"/proc/self/fdinfo/{fd}").splitlines()) for fd in (3, 4, 5)]

    posix, counts = move(work, check, dead=True)
    assert counts == [2, 1, 1]
    assert [(w.split()[2], w.split()[-2], w.split()[-1]) for w in posix] == [
        ("WRITE", "5", "14"),
        ("READ", "50", "EOF"),
    ]
    warnings: list[str] = []
    move(work, lambda: None, warnings=warnings)
    assert len(warnings) == 3  # the source lives on this kernel and still has what excludes others
    assert "fd 3" in warnings[0]


def test_descriptor_opened_after_the_draft(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with stopped(lambda: os.open(tmp_path / "a", os.O_RDONLY)) as src:
        taken = Taken(src)
    with stopped(lambda: [os.open(tmp_path / n, os.O_RDONLY) for n in "ba"]) as src:
        taken.final = DescriptorDumper(src).final()
        assert taken.restored(lambda: (os.read(3, 1), os.read(4, 1))) == (b"b", b"a")


def test_final_raises_what_it_refuses():
    with (
        stopped(lambda: os.open("/proc/1/status", os.O_RDONLY)) as src,
        pytest.raises(RefusedError, match="fd 3"),
    ):
        DescriptorDumper(src).final()


def test_a_process_that_is_not_there():
    with stopped(lambda: None) as src:
        end(src)
        with pytest.raises(ProcessGoneError):
            DescriptorDumper(src).final()
        with pytest.raises(ProcessGoneError):
            SourceProcess(src.pid)


def test_name_that_is_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe"

    (r,) = refused(lambda: os.open(name, os.O_RDWR | os.O_CREAT))
    assert "not UTF-8" in r.reason
    r.subject.encode()
