"""The kinds of image files: their names, their magic words, and which messages they hold.

Facts of CRIU 4.2: criu/include/magic.h (magics), criu/image-desc.c (names), criu/include/protobuf-desc.h
(messages). A kind without a message is known by name and magic only: it is not decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from google.protobuf.message import Message

from lazymig.pb import (
    cgroup_pb2,
    core_pb2,
    creds_pb2,
    eventfd_pb2,
    eventpoll_pb2,
    ext_file_pb2,
    fdinfo_pb2,
    fifo_pb2,
    file_lock_pb2,
    fs_pb2,
    fsnotify_pb2,
    ghost_file_pb2,
    inventory_pb2,
    ipc_var_pb2,
    memfd_pb2,
    mm_pb2,
    ns_file_pb2,
    pagemap_pb2,
    pidfd_pb2,
    pidns_pb2,
    pipe_data_pb2,
    pipe_pb2,
    pstree_pb2,
    regfile_pb2,
    remap_file_path_pb2,
    rlimit_pb2,
    sa_pb2,
    seccomp_pb2,
    siginfo_pb2,
    signalfd_pb2,
    sk_inet_pb2,
    sk_packet_pb2,
    sk_unix_pb2,
    stats_pb2,
    tcp_stream_pb2,
    timens_pb2,
    timer_pb2,
    timerfd_pb2,
    tty_pb2,
    userns_pb2,
    utsns_pb2,
    vma_pb2,
)

MessageType: TypeAlias = type[Message]

COMMON = 0x54564319  # the first word of most images
SERVICE = 0x55105940  # the first word of statistics and caches
ZSTD_PAGEMAP = 0x4C5A4D47  # ours: a pagemap whose pages are compressed (docs/images.md)
PAGEMAPS = ("pagemap", "pagemap-shmem")  # the kinds that tell where pages are
REST = -1  # an extra blob that takes the rest of the file


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of image file.

    ``template`` is the name, with ``{}`` where the number goes (``hexadecimal`` or decimal). ``magic`` is None
    for raw images, which have no header. ``words``: how many magic words the header has, the first of two being
    ``first``. ``message`` is the type of the first record, ``later`` of all others (None: the same).
    ``extra`` gives the length in bytes of the blob that follows a record (REST: all that is left).
    """

    name: str
    template: str
    magic: int | None
    message: MessageType | None = None
    later: MessageType | None = None
    extra: Callable[[Any], int] | None = None
    first: int = COMMON
    words: int = 2
    hexadecimal: bool = False
    single: bool = False  # exactly one record

    @property
    def numbered(self) -> bool:
        """Whether the name carries a number: a pid, or the id of an object."""
        return "{}" in self.template

    def file_name(self, ident: int | None = None) -> str:
        """The file's name. ValueError when a number is missing, or not wanted."""
        if self.numbered != (ident is not None):
            raise ValueError(f"{self.name}: {'no' if ident is None else 'a'} number")
        return self.template.format(f"{ident:x}" if self.hexadecimal else ident)

    def type_of(self, number: int) -> MessageType | None:
        """The type of the record with this number, from 0 on."""
        return self.later if number and self.later is not None else self.message


def _ghost(message: Any) -> int:  # noqa: ANN401
    if isinstance(message, ghost_file_pb2.ghost_chunk_entry):
        return int(message.len)
    return 0 if message.chunks else REST


def _raw(name: str, template: str) -> Kind:
    return Kind(name, template, None)


_KINDS = [
    Kind("inventory", "inventory.img", 0x58313116, inventory_pb2.inventory_entry, words=1, single=True),
    Kind("pstree", "pstree.img", 0x50273030, pstree_pb2.pstree_entry),
    Kind("core", "core-{}.img", 0x55053847, core_pb2.core_entry, single=True),
    Kind("ids", "ids-{}.img", 0x54432030, core_pb2.task_kobj_ids_entry, single=True),
    Kind("mm", "mm-{}.img", 0x57492820, mm_pb2.mm_entry, single=True),
    Kind("fs", "fs-{}.img", 0x51403912, fs_pb2.fs_entry, single=True),
    Kind("fdinfo", "fdinfo-{}.img", 0x56213732, fdinfo_pb2.fdinfo_entry),
    Kind("files", "files.img", 0x56303138, fdinfo_pb2.file_entry),
    Kind("pagemap", "pagemap-{}.img", 0x56084025, pagemap_pb2.pagemap_head, pagemap_pb2.pagemap_entry),
    Kind(
        "pagemap-shmem",
        "pagemap-shmem-{}.img",
        0x56084025,
        pagemap_pb2.pagemap_head,
        pagemap_pb2.pagemap_entry,
    ),
    _raw("pages", "pages-{}.img"),
    Kind("seccomp", "seccomp.img", 0x64413049, seccomp_pb2.seccomp_entry, single=True),
    Kind("cgroup", "cgroup.img", 0x59383330, cgroup_pb2.cgroup_entry, single=True),
    Kind("timens", "timens-{}.img", 0x43114433, timens_pb2.timens_entry, single=True),
    Kind("utsns", "utsns-{}.img", 0x54473203, utsns_pb2.utsns_entry, single=True),
    Kind("pidns", "pidns-{}.img", 0x61157326, pidns_pb2.pidns_entry, single=True),
    Kind("userns", "userns-{}.img", 0x55474906, userns_pb2.userns_entry, single=True),
    Kind("ipcns-var", "ipcns-var-{}.img", 0x53115007, ipc_var_pb2.ipc_var_entry, single=True),
    Kind("memfd", "memfd.img", 0x48453499, memfd_pb2.memfd_inode_entry),
    Kind("pipes-data", "pipes-data.img", 0x56453709, pipe_data_pb2.pipe_data_entry, extra=lambda m: m.bytes),
    Kind("fifo-data", "fifo-data.img", 0x59333054, pipe_data_pb2.pipe_data_entry, extra=lambda m: m.bytes),
    Kind("sk-queues", "sk-queues.img", 0x56264026, sk_packet_pb2.sk_packet_entry, extra=lambda m: m.length),
    Kind(
        "tcp-stream",
        "tcp-stream-{}.img",
        0x51465506,
        tcp_stream_pb2.tcp_stream_entry,
        extra=lambda m: m.inq_len + m.outq_len,
        hexadecimal=True,
        single=True,
    ),
    Kind(
        "ghost-file",
        "ghost-file-{}.img",
        0x52583605,
        ghost_file_pb2.ghost_file_entry,
        ghost_file_pb2.ghost_chunk_entry,
        extra=_ghost,
        hexadecimal=True,
    ),
    Kind("remap-fpath", "remap-fpath.img", 0x59133954, remap_file_path_pb2.remap_file_path_entry),
    Kind("filelocks", "filelocks.img", 0x54323616, file_lock_pb2.file_lock_entry),
    Kind("tty", "tty.img", 0x59433025, tty_pb2.tty_file_entry),
    Kind("tty-info", "tty-info.img", 0x59453036, tty_pb2.tty_info_entry),
    Kind("tty-data", "tty-data.img", 0x59413026, tty_pb2.tty_data_entry),
    Kind("stats-dump", "stats-dump", 0x57093306, stats_pb2.stats_entry, first=SERVICE, single=True),
    Kind("stats-restore", "stats-restore", 0x57093306, stats_pb2.stats_entry, first=SERVICE, single=True),
    # The older layout, in which each kind of descriptor and of a task's state had an image of its own.
    Kind("reg-files", "reg-files.img", 0x50363636, regfile_pb2.reg_file_entry),
    Kind("ext-files", "ext-files.img", 0x59255641, ext_file_pb2.ext_file_entry),
    Kind("ns-files", "ns-files.img", 0x61394011, ns_file_pb2.ns_file_entry),
    Kind("eventfd", "eventfd.img", 0x44523722, eventfd_pb2.eventfd_file_entry),
    Kind("eventpoll", "eventpoll.img", 0x45023858, eventpoll_pb2.eventpoll_file_entry),
    Kind("eventpoll-tfd", "eventpoll-tfd.img", 0x44433746, eventpoll_pb2.eventpoll_tfd_entry),
    Kind("signalfd", "signalfd.img", 0x57323820, signalfd_pb2.signalfd_entry),
    Kind("inotify", "inotify.img", 0x48424431, fsnotify_pb2.inotify_file_entry),
    Kind("inotify-wd", "inotify-wd.img", 0x54562009, fsnotify_pb2.inotify_wd_entry),
    Kind("timerfd", "timerfd.img", 0x50493712, timerfd_pb2.timerfd_entry),
    Kind("pipes", "pipes.img", 0x56513555, pipe_pb2.pipe_entry),
    Kind("fifo", "fifo.img", 0x58364939, fifo_pb2.fifo_entry),
    Kind("unixsk", "unixsk.img", 0x54373943, sk_unix_pb2.unix_sk_entry),
    Kind("inetsk", "inetsk.img", 0x56443851, sk_inet_pb2.inet_sk_entry),
    Kind("pidfd", "pidfd.img", 0x54435556, pidfd_pb2.pidfd_entry),
    Kind("vmas", "vmas-{}.img", 0x54123737, vma_pb2.vma_entry),
    Kind("sigacts", "sigacts-{}.img", 0x55344201, sa_pb2.sa_entry),
    Kind("signal-s", "signal-s-{}.img", 0x59255647, siginfo_pb2.siginfo_entry),
    Kind("signal-p", "signal-p-{}.img", 0x59255647, siginfo_pb2.siginfo_entry),
    Kind("itimers", "itimers-{}.img", 0x57464056, timer_pb2.itimer_entry),
    Kind("posix-timers", "posix-timers-{}.img", 0x52603957, timer_pb2.posix_timer_entry),
    Kind("creds", "creds-{}.img", 0x54023547, creds_pb2.creds_entry, single=True),
    Kind("rlimit", "rlimit-{}.img", 0x57113925, rlimit_pb2.rlimit_entry),
    # Known by name and magic only.
    Kind("ipcns-shm", "ipcns-shm-{}.img", 0x46283044),
    Kind("ipcns-msg", "ipcns-msg-{}.img", 0x55453737),
    Kind("ipcns-sem", "ipcns-sem-{}.img", 0x59573019),
    Kind("mountpoints", "mountpoints-{}.img", 0x55563928),
    Kind("netdev", "netdev-{}.img", 0x57373951),
    Kind("netns", "netns-{}.img", 0x55933752),
    Kind("fanotify", "fanotify.img", 0x55096122),
    Kind("fanotify-mark", "fanotify-mark.img", 0x56506035),
    Kind("netlinksk", "netlinksk.img", 0x58005614),
    Kind("packetsk", "packetsk.img", 0x60454618),
    Kind("tunfile", "tunfile.img", 0x57143751),
    Kind("cpuinfo", "cpuinfo.img", 0x61404013),
    Kind("binfmt-misc", "binfmt-misc.img", 0x67343323),
    Kind("autofs", "autofs-{}.img", 0x49353943),
    Kind("bpfmap-file", "bpfmap-file.img", 0x57506142),
    Kind("bpfmap-data", "bpfmap-data.img", 0x64324033),
    Kind("apparmor", "apparmor.img", 0x59423047),
    Kind("irmap-cache", "irmap-cache", 0x57004059, first=SERVICE),
    *(
        _raw(n, n + "-{}.img")
        for n in ("ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables")
    ),
    *(_raw(n, n + "-{}.img") for n in ("netns-ct", "netns-exp")),
    *(_raw(n, n + "-{}.tar.gz.img") for n in ("tmpfs", "tmpfs-dev")),
]

KINDS: dict[str, Kind] = {k.name: k for k in _KINDS}


def _pattern(kind: Kind) -> re.Pattern[str]:
    number = "(0|[1-9a-f][0-9a-f]{0,15})" if kind.hexadecimal else "(0|[1-9][0-9]{0,19})"
    return re.compile(re.escape(kind.template).replace(r"\{\}", number))


_PATTERNS = [(_pattern(k), k) for k in _KINDS]


def parse_name(name: str) -> tuple[Kind, int | None] | None:
    """The kind that a file's name tells, and the number in it. None: not the name of an image."""
    for pattern, kind in _PATTERNS:
        if found := pattern.fullmatch(name):
            return kind, int(found[1], 16 if kind.hexadecimal else 10) if kind.numbered else None
    return None


def name_of_magic(first: int, second: int) -> str:
    """What an image with these words is, for messages about swapped files."""
    for kind in _KINDS:
        if kind.magic is not None and (
            (kind.words == 1 and first == kind.magic)
            or (kind.words == 2 and (first, second) == (kind.first, kind.magic))
        ):
            return kind.name
    return f"{first:08x} {second:08x}"


def zstd_kind(kind: str) -> Kind:
    """The kind of a pagemap whose pages are packed: the same names and messages, but a magic of ours."""
    return replace(KINDS[kind], magic=ZSTD_PAGEMAP)
