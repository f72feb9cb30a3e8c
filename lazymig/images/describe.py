"""What is in an image directory, for people and scripts: plain data, ready for JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lazymig.images.check_process import STATUS_BITS, TASK_DEAD, body_of
from lazymig.images.directory import ImageDirectory
from lazymig.images.pagemap import LayerReader, Resolved
from lazymig.pb import fdinfo_pb2, mm_pb2

Info = dict[str, Any]
_STATES = {1: "running", 2: "dead", 3: "stopped"}  # TASK_* of CRIU's images
_PROT = "rwx"


def describe(path: Path) -> Info:
    """The directory: its layers, its processes with threads, VMAs and descriptors, its shared memory.

    Pages are counted by kind: ``eager`` (in this directory), ``local`` (in a parent), ``lazy`` (at the source).
    LazymigError ``bad-image``, SyscallError.
    """
    top = ImageDirectory(path)
    chain = top.chain()
    inventory = top.inventory
    tree = top.processes()
    return {
        "directory": str(path),
        "complete": inventory is not None,
        "kind": "dump" if tree else "layer",
        "layers": [_layer(d) for d in chain],
        "processes": [_process(top, p) for p in tree]
        or [{"pid": pid, "pages": _counts(_resolved(top, pid))} for pid in top.pids()],
        "shared_memory": [
            {"shmid": i, "pages": _counts(_resolved(top, i, "pagemap-shmem"))}
            for i in top.idents("pagemap-shmem")
        ],
    }


def _resolved(top: ImageDirectory, ident: int, kind: str = "pagemap") -> Resolved:
    return LayerReader(top.path, ident, kind).resolve()


def _counts(found: Resolved) -> Info:
    return {"eager": found.eager.pages, "local": found.local.pages, "lazy": found.lazy.pages}


def _layer(directory: ImageDirectory) -> Info:
    sizes = {n: (directory.path / n).lstat() for n, _, _ in directory.images()}
    packed = [n for n in directory.names() if n.endswith(".zst")]
    sizes.update({n: (directory.path / n).lstat() for n in packed})
    pages = [s for n, s in sizes.items() if n.startswith("pages-")]
    return {
        "directory": str(directory.path),
        "complete": directory.has("inventory"),
        "images": len(sizes),
        "bytes": sum(s.st_size for s in sizes.values()),
        "pages_bytes": sum(s.st_size for s in pages),
        "disk_bytes": sum(s.st_blocks * 512 for s in sizes.values()),
        "packed": bool(packed),
        "checksums": "lazymig-checksums" in directory.names(),
        "pids": directory.pids(),
    }


def _process(top: ImageDirectory, place: Any) -> Info:  # noqa: ANN401
    core = top.read_one("core", place.pid)
    info: Info = {
        "pid": place.pid,
        "ppid": place.ppid,
        "pgid": place.pgid,
        "sid": place.sid,
        "comm": core.tc.comm,
        "state": _STATES.get(core.tc.task_state, str(core.tc.task_state)),
        "threads": [
            {"tid": tid, "comm": top.read_one("core", tid).thread_core.comm or core.tc.comm}
            for tid in place.threads
        ],
    }
    if core.tc.task_state == TASK_DEAD:
        return info
    files = {e.id: e for e in top.read("files")}
    mm: mm_pb2.mm_entry = top.read_one("mm", place.pid)
    found = _resolved(top, place.pid)
    info["executable"] = _name(files.get(mm.exe_file_id))
    info["pages"] = _counts(found)
    info["vmas"] = [_vma(v, files, found) for v in mm.vmas]
    ids = top.read("ids", place.pid)
    files_id = ids[0].files_id if ids else core.ids.files_id
    info["descriptors"] = [_descriptor(row, files) for row in top.read("fdinfo", files_id)]
    return info


def _vma(v: Any, files: dict[int, Any], found: Resolved) -> Info:  # noqa: ANN401
    names = [name for bit, name in STATUS_BITS.items() if v.status >> bit & 1]
    info: Info = {
        "start": f"{v.start:x}",
        "end": f"{v.end:x}",
        "prot": "".join(c if v.prot >> i & 1 else "-" for i, c in enumerate(_PROT)),
        "status": [n for n in names if n != "regular"],
        "eager": found.eager.clip(v.start, v.end).pages,
        "local": found.local.clip(v.start, v.end).pages,
        "lazy": found.lazy.clip(v.start, v.end).pages,
    }
    if "file-private" in names or "file-shared" in names:
        info["file"] = _name(files.get(v.shmid))
        info["offset"] = v.pgoff
    elif "anon-shared" in names:
        info["shmid"] = v.shmid
    return info


def _name(entry: Any) -> str:  # noqa: ANN401
    return str(entry.reg.name) if entry is not None and entry.HasField("reg") else ""


def _descriptor(row: Any, files: dict[int, Any]) -> Info:  # noqa: ANN401
    info: Info = {"fd": row.fd, "kind": fdinfo_pb2.fd_types.Name(row.type), "file": row.id}
    entry = files.get(row.id)
    if entry is None:
        return info
    if name := _name(entry):
        info["name"], info["position"] = name, entry.reg.pos
    elif (body := body_of(entry)) is not None:
        for field in ("pipe_id", "ino", "name", "state", "inode_id", "pid"):
            if field in body.DESCRIPTOR.fields_by_name and body.HasField(field):
                value = getattr(body, field)
                info[field] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return info
