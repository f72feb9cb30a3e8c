"""The reader of fdinfo: real texts, and anything at all."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymig.process.fdinfo import FL_OFDLCK, FL_POSIX, FdinfoError, Lock, Target, Watch, parse

HEAD = b"pos:\t12\nflags:\t02100002\nmnt_id:\t27\nino:\t2146333\n"


def test_what_all_have():
    i = parse(HEAD)
    assert (i.pos, i.flags, i.mnt_id, i.ino) == (12, os.O_RDWR | os.O_CLOEXEC | 0o100000, 27, 2146333)
    assert i.targets() == i.watches() == i.locks() == []


def test_rows():
    text = HEAD + (
        b"tfd:        4 events:       19 data:     7ffe00000004  pos:0 ino:3228 sdev:f\n"
        b"tfd:       17 events: 80000001 data: ffffffffffffffff  pos:0 ino:1 sdev:f\n"
        b"inotify wd:1a ino:3f7e8 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1"
        b" f_handle:e8f7030000000000\n"
        b"lock:\t1: POSIX  ADVISORY  WRITE 5673 fe:00:2146333 5 14\n"
        b"lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:2146333 100 EOF\n"
        b"it_value: (49, 999)\neventfd-count:               1f\n"
    )
    i = parse(text)
    assert i.targets() == [
        Target(4, 0x19, 0x7FFE00000004, 0x3228),
        Target(17, 0x80000001, 2**64 - 1, 1),
    ]
    assert i.watches() == [Watch(0x1A, 0x3F7E8, 0xFE00000, 0xFFF, 1, bytes.fromhex("e8f7030000000000"))]
    assert i.locks() == [Lock(FL_POSIX, True, 5, 10), Lock(FL_OFDLCK, False, 100, 0)]
    assert i.pair("it_value") == (49, 999)
    assert i.number("eventfd-count", 16) == 31
    for bad in ("nothing", "it_value"):
        with pytest.raises(FdinfoError):
            i.number(bad)


@given(st.binary(max_size=300))
def test_anything_is_read_or_refused(data):
    for text in (
        data,
        HEAD + data,
        HEAD + b"tfd:" + data,
        HEAD + b"lock:" + data,
        HEAD + b"inotify wd:" + data,
    ):
        try:
            i = parse(text)
            i.targets(), i.watches(), i.locks()
        except FdinfoError:
            pass


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**20), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32)
        )
    )
)
def test_interest_lists_of_any_length(rows):
    # The format of fs/eventpoll.c, ep_show_fdinfo
    text = "".join(
        f"tfd: {fd:8d} events: {ev:8x} data: {data:16x}  pos:0 ino:{ino:x} sdev:f\n"
        for fd, ev, data, ino in rows
    )
    assert parse(HEAD + text.encode()).targets() == [Target(*r) for r in rows]
