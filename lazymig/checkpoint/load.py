"""Reads an image directory and checks everything that can be checked before a process is made of it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lazymig.checkpoint.core_image import from_cores, task_core
from lazymig.checkpoint.file_table import ident_of
from lazymig.checkpoint.files_image import FilesImage, path_of
from lazymig.checkpoint.mm_image import Space, from_mm
from lazymig.checkpoint.seccomp_image import chain_of, common_of
from lazymig.errors import LazymigError, Refusal, RefusedError
from lazymig.images.content import open_extents
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import ImageReader, bad_image
from lazymig.images.pagemap import LayerReader
from lazymig.images.writer import IMG_VERSION
from lazymig.kernel import procfs
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.capture import Capture
from lazymig.migrate.frames import MAX_THREADS
from lazymig.pb import core_pb2, descriptors_pb2, pstree_pb2, regfile_pb2, state_pb2
from lazymig.process import cpu, identity
from lazymig.process.files import build_id
from lazymig.process.prctl import arguments
from lazymig.process.vmas import Kind, Vma, special

_DELETED = b" (deleted)"


@dataclass(slots=True)
class Loaded:
    """A process, as its images tell of it."""

    directory: Path
    pid: int
    space: Space
    capture: Capture
    descriptors: descriptors_pb2.DescriptorsDump
    memory: LayerReader
    memfds: dict[int, tuple[int, int]]  # shmid -> (st_dev, st_ino) that their messages name
    membarrier: int
    arguments: RangeSet  # pages that may not be missing when somebody looks at /proc

    @property
    def pages(self) -> RangeSet:
        """All pages that its memory consists of, but for the vDSO, which is this kernel's own."""
        return self.memory.known() & self.space.layout.ranges(Kind.ANON, Kind.STACK, Kind.FILE)


def load(directory: Path) -> Loaded:
    """The process of a directory. LazymigError ``bad-image`` names file and record; RefusedError."""
    images = ImageDirectory(directory)
    inventory = images.read_one("inventory")
    if inventory.img_version > IMG_VERSION:
        raise bad_image(directory / "inventory.img", f"version {inventory.img_version} is not known")
    tree = images.processes()
    if not tree:
        raise bad_image(
            directory,
            "there is no process in it",
            hint="a pre-dump's layer cannot be restored: dump on top of it",
        )
    if len(tree) != 1:
        raise RefusedError(
            [Refusal("tree", str(directory), f"it has {len(tree)} processes", "trees cannot be restored yet")]
        )
    place = tree[0]
    pid = place.pid
    if not 1 < pid < 1 << 22 or not 0 < len(place.threads) <= MAX_THREADS or pid not in place.threads:
        raise bad_image(directory / "pstree.img", f"the numbers of process {pid} are unsound", record=0)
    if len(set(place.threads)) != len(place.threads):
        raise bad_image(directory / "pstree.img", "two threads have one number", record=0)
    ids = images.read("ids", pid)
    files = FilesImage(directory, ids[0].files_id if ids else pid, pid)
    mm = images.read_one("mm", pid)
    space = from_mm(mm, files.entries, files.ghosts, files.memfds, str(images.file("mm", pid)))
    cores = [(t, images.read_one("core", t)) for t in (pid, *(t for t in place.threads if t != pid))]
    process = _process(images, files, mm, cores[0][1], place)
    seccomp = images.read("seccomp")
    table = list(seccomp[0].seccomp_filters) if seccomp else []
    threads, states, xcomp = from_cores(cores, mm, table, int(cpu.xstate()["size"]))
    chains = [
        chain_of(table, c.thread_core.seccomp_filter, f"core-{t}.img")
        for t, c in cores
        if c.thread_core.seccomp_mode == core_pb2.filter
    ]
    if len(chains) == len(cores):
        process.seccomp.CopyFrom(common_of(chains))
    capture = Capture(
        threads=threads,
        xcomp=xcomp,
        process=process.SerializeToString(),
        thread_states=states,
        pending=[[] for _ in threads],
        seccomp=bool(chains),
        guards=space.guards,
    )
    memory = LayerReader(directory, pid)
    outside = memory.known() - space.layout.ranges()
    if outside:
        what = f"{outside.pages} pages are in no VMA, the first {outside[0][0]:x}"
        raise bad_image(images.file("pagemap", pid), what)
    memfds = {shmid: (os.makedev(0, d), i) for shmid, (d, i) in files.shmids.items()}
    loaded = Loaded(
        directory=directory,
        pid=pid,
        space=space,
        capture=capture,
        descriptors=files.dump,
        memory=memory,
        memfds=memfds,
        membarrier=process.tc.membarrier_registration_mask,
        arguments=arguments(mm),
    )
    if refusals := [*identity.taken(pid, place.threads), *_files(files, space), *_vdso(loaded)]:
        raise RefusedError(refusals)
    return loaded


def _process(
    images: ImageDirectory,
    files: FilesImage,
    mm_entry: object,
    core: core_pb2.core_entry,
    place: pstree_pb2.pstree_entry,
) -> state_pb2.ProcessState:
    pid = place.pid
    name = str(images.file("mm", pid))
    process = state_pb2.ProcessState(tc=task_core(core, f"core-{pid}.img"), place=place)
    process.mm.CopyFrom(mm_entry)  # type: ignore[arg-type]
    mm = process.mm
    del mm.vmas[:]
    if not mm.HasField("exe"):
        mm.exe = os.fsencode(path_of(files.entries, mm.exe_file_id, name))
        if mm.exe_file_id in files.ghosts:
            mm.exe += _DELETED
    if mm.whole_auxv:
        mm.mm_saved_auxv[:] = mm.whole_auxv
    if not mm.HasField("thp_disable"):
        mm.thp_disable = int(mm.thp_disabled)
    fs = images.read_one("fs", pid)
    name = str(images.file("fs", pid))
    if not fs.HasField("cwd"):
        fs.cwd = os.fsencode(path_of(files.entries, fs.cwd_id, name))
        root = path_of(files.entries, fs.root_id, name)
        if root != "/":
            fs.root = os.fsencode(root)
    process.fs.CopyFrom(fs)
    return process


# ---- what this host has against it


def _files(files: FilesImage, space: Space) -> list[Refusal]:
    """Files that are mapped must be here as they were there."""
    wanted: dict[int, Vma] = {}
    for v in space.layout:
        if v.kind in (Kind.FILE, Kind.SHARED_FILE) and not v.deleted:
            known = wanted.setdefault(v.inode, v)
            if v.kind is Kind.SHARED_FILE:
                wanted[known.inode] = v
    return [r for ident, v in wanted.items() if (r := _compare(files.entries[ident].reg, v)) is not None]


def _compare(r: regfile_pb2.reg_file_entry, v: Vma) -> Refusal | None:
    hint = "put the same file there"
    try:
        st = os.stat(r.name)
    except OSError as e:
        return Refusal("file-missing", r.name, f"it is not here ({e.strerror})", hint)
    if not stat.S_ISREG(st.st_mode):
        return None  # a device, e.g. /dev/zero
    if r.HasField("size") and r.size != st.st_size:
        return Refusal("file-differs", r.name, f"{r.size} bytes when it was dumped, {st.st_size} here", hint)
    if r.build_id:
        if ident_of(r.build_id) != build_id(r.name).ljust(4 * len(r.build_id), b"\0"):
            return Refusal("file-differs", r.name, "it has another build-id here", hint)
        return None
    # Only of what nobody writes to through a mapping the time stamp tells anything.
    if v.kind is Kind.FILE and r.HasField("mtime_ns") and r.mtime_ns != st.st_mtime_ns:
        return Refusal("file-differs", r.name, "it was modified at another time here", hint)
    return None


def _vdso(loaded: Loaded) -> list[Refusal]:
    """Programs keep addresses of the vDSO's functions: it must be the same here."""
    there = special(loaded.space.layout, Kind.VDSO)
    if there is None:
        return []
    ours = [e for e in procfs.maps(os.getpid()) if e.path.startswith(("[vvar", "[vdso]"))]
    here = next((e for e in ours if e.path == "[vdso]"), None)
    vvar = special(loaded.space.layout, Kind.VVAR)
    first = vvar.start if vvar is not None else there.start
    same = (
        here is not None
        and here.end - here.start == there.size
        and here.start - min(e.start for e in ours) == there.start - first
    )
    if same and here is not None:
        with open("/proc/self/mem", "rb", buffering=0) as f:
            code = os.pread(f.fileno(), there.size, here.start)
        dumped = _bytes_of(loaded.memory, RangeSet.span(there.start, there.end))
        same = not dumped or dumped == code
    if same:
        return []
    return [
        Refusal("vdso", "the kernel", "its vDSO is not that of the kernel here", "restore on the same kernel")
    ]


def _bytes_of(memory: LayerReader, wanted: RangeSet) -> bytes:
    found: dict[int, bytes] = {}
    for files in memory.resolve(wanted & memory.known()).files():
        for fd, extents, n in open_extents(files):
            for i in range(n):
                e = extents[i]
                found[int(e.start)] = os.pread(fd, int(e.end - e.start), int(e.offset))
    return b"".join(found[k] for k in sorted(found))


def required(loaded: Loaded) -> None:
    """Raises LazymigError when pages are at the source only, so that a plain restore cannot have them."""
    if loaded.memory.resolve().lazy:
        raise LazymigError(
            "pages are missing: the source kept them",
            code="lazy-images",
            subject=str(loaded.directory),
            hint="lazymig restore --lazy --from ADDR, with the address of the dump",
        )


def speaks_wide(loaded: Loaded) -> bool:
    """Whether who dumped it speaks the page protocol of CRIU 4.2: as its pagemaps have the newer field."""
    path = loaded.directory / f"pagemap-{loaded.pid}.img"
    with ImageReader(path) as reader:
        for record in reader:
            if record.number:
                return bool(record.message.HasField("nr_pages"))
    return True
