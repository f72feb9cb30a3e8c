"""Mutations of messages that keep their form: values of msgpack trees, fields of protobuf messages, bytes, words."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import msgpack
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from lazymig.pb import descriptors_pb2, state_pb2

NUMBERS = [
    0,
    1,
    -1,
    2,
    4095,
    4096,
    1 << 15,
    1 << 22,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 47,
    0x7FFF_FFFF_F000,
]
NUMBERS += [
    1 << 48,
    1 << 63,
    (1 << 63) - 1,
    (1 << 64) - 1,
    (1 << 64) - 4096,
    -(1 << 31),
    -(1 << 63),
    0x0100_0000_0000,
]
TEXTS = [
    "",
    "/",
    "x",
    "/etc/passwd",
    "/../x",
    "/a/../b",
    "/proc/self/mem",
    "\0",
    "/a\0b",
    "\udcff",
    "[heap]",
    "../..",
]
TEXTS += ["/memfd:x", "9" * 40, "-1", "%s", "/" + "a" * 5000, "\x1b[2J", "ж" * 60]
INSIDE = {
    "fds": descriptors_pb2.DescriptorsDump,
    "process": state_pb2.ProcessState,
    "thread_states": state_pb2.ThreadState,
}  # what bytes under these keys are messages of


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 9])):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(7)
        if what == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif what == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            width = rng.choice("BHIQ")
            value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(width))
            packed = struct.pack(f"{rng.choice('<>')}{width}", value)
            out[at : at + len(packed)] = packed
        elif what == 3:
            del out[at : at + rng.randrange(1, 20)]
        elif what == 4:
            out[at:at] = out[at : at + rng.randrange(1, 60)]
        elif what == 5:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            del out[at:]
    return bytes(out)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Lines and words of a text of the kernel changed, or its bytes."""
    lines = data.split(b"\n")
    what = rng.randrange(5)
    i = rng.randrange(len(lines))
    if what == 0:
        words = lines[i].split(b" ")
        words[rng.randrange(len(words))] = rng.choice(
            [str(rng.choice(NUMBERS)).encode(), b"", os.fsencode(rng.choice(TEXTS)), b"f" * 16]
        )
        lines[i] = b" ".join(words)
    elif what == 1:
        del lines[i]
    elif what == 2:
        lines.insert(i, rng.choice(lines))
    elif what == 3:
        lines[i] = mutate_bytes(lines[i], rng)
    else:
        return mutate_bytes(data, rng)
    return b"\n".join(lines)


def value(rng: random.Random) -> Any:
    """Something of any kind."""
    return rng.choice(
        [
            lambda: rng.choice(NUMBERS) if rng.randrange(4) else rng.getrandbits(rng.randrange(1, 64)),
            lambda: rng.choice(TEXTS),
            lambda: rng.randbytes(rng.choice([0, 1, 15, 16, 216])),
            lambda: None,
            lambda: rng.choice([0.5, float("inf"), float("-inf"), float("nan"), True, False]),
            lambda: [value(rng) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(["t", "x", "path"]): value(rng) for _ in range(rng.randrange(3))},
        ]
    )()


def mutate_tree(tree: Any, rng: random.Random, key: object = None) -> Any:
    """A tree of lists, maps and values with one place changed."""
    if isinstance(tree, dict) and tree and rng.randrange(12):
        k = rng.choice(list(tree))
        if not rng.randrange(15):
            return {n: v for n, v in tree.items() if n != k}
        return {**tree, k: mutate_tree(tree[k], rng, k)}
    if isinstance(tree, list) and tree and rng.randrange(12):
        i = rng.randrange(len(tree))
        what = rng.randrange(12)
        if what == 0:
            return tree[:i] + tree[i + 1 :]
        if what == 1:
            return tree[:i] + [tree[i]] * rng.choice([2, 3, 70]) + tree[i + 1 :]
        return [*tree[:i], mutate_tree(tree[i], rng, key), *tree[i + 1 :]]
    if isinstance(tree, bytes) and rng.randrange(12):
        if key in INSIDE and rng.randrange(8):
            return mutate_protobuf(INSIDE[key], tree, rng)
        return mutate_bytes(tree, rng)
    if isinstance(tree, int) and rng.randrange(3):
        changed = rng.choice(
            [tree + 1, tree - 1, tree * 2, tree ^ 1 << rng.randrange(64), rng.choice(NUMBERS)]
        )
        return max(-(1 << 63), min(changed, (1 << 64) - 1))
    return value(rng)


def mutate_frame(body: bytes, rng: random.Random) -> bytes:
    """A control frame's body."""
    if not rng.randrange(10):
        return mutate_bytes(body, rng)
    tree = unpack(body)
    for _ in range(rng.choice([1, 1, 2, 3])):
        tree = mutate_tree(tree, rng)
    try:
        return msgpack.packb(tree, use_bin_type=True, unicode_errors="surrogateescape")
    except (ValueError, OverflowError, TypeError):
        return mutate_bytes(body, rng)


def unpack(body: bytes) -> Any:
    """A body's tree; the name of nothing when it is none."""
    try:
        return msgpack.unpackb(body, raw=False, unicode_errors="surrogateescape", strict_map_key=False)
    except Exception:
        return {"t": "x"}


_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def _single(f: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    if f.cpp_type in _LIMITS:
        low, high = _LIMITS[f.cpp_type]
        new = rng.choice([rng.choice(NUMBERS), old + 1, old - 1, old ^ 1 << rng.randrange(31), high, low])
        return new if low <= new <= high else new & (high if low == 0 else high >> 1)
    if f.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return not old
    if f.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice(f.enum_type.values).number
    if f.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice([mutate_bytes(old, rng), rng.choice(TEXTS).encode("utf-8", "surrogateescape")])
    if f.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return rng.choice([t for t in TEXTS if t.isprintable() or "\0" in t])
    return old


def _change(m: Message, rng: random.Random) -> None:
    fields = [f for f, _ in m.ListFields()]
    if not fields or not rng.randrange(6):
        fields = list(m.DESCRIPTOR.fields)
    f = rng.choice(fields)
    old = getattr(m, f.name)
    is_message = f.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    if f.is_repeated:
        what = rng.randrange(6)
        if what == 0 and len(old):
            del old[rng.randrange(len(old))]
        elif what == 1 and len(old):
            old.extend([old[rng.randrange(len(old))]] * rng.choice([1, 2, 50]))
        elif is_message:
            _change(old[rng.randrange(len(old))] if len(old) else old.add(), rng)
        elif len(old):
            i = rng.randrange(len(old))
            old[i] = _single(f, old[i], rng)
    elif is_message:
        if rng.randrange(8):
            _change(old, rng)
        else:
            m.ClearField(f.name)
    elif not rng.randrange(10):
        m.ClearField(f.name)
    else:
        setattr(m, f.name, _single(f, old, rng))


def mutate_protobuf(kind: type[Message], data: bytes, rng: random.Random) -> bytes:
    """One field of a message changed; bytes that are no message are changed as bytes."""
    try:
        m = kind.FromString(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            _change(m, rng)
        return m.SerializePartialToString()
    except (DecodeError, ValueError):
        return mutate_bytes(data, rng)
