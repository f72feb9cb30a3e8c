"""The count of a message's values, which bounds what a frame may make, is the number of values there are."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymig.errors import ProtocolError
from lazymig.migrate import channel
from lazymig.native import lib

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.sampled_from(["x" * 300, "x" * 70_000, b"x" * 300, b"x" * 70_000])
    | st.builds(
        lambda n: msgpack.ExtType(5, b"x" * n), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 300, 70_000])
    )
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=20) | st.dictionaries(st.text(max_size=3), v, max_size=20)
)


def count(value):
    if isinstance(value, dict):
        return 1 + sum(1 + count(v) for v in value.values())
    return 1 + sum(map(count, value)) if isinstance(value, list) else 1


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_every_value_is_counted(value):
    data = msgpack.packb(value)
    assert lib.lm_msgpack_values(data, len(data), 1 << 40) == count(value)
    assert lib.lm_msgpack_values(data, len(data), 0) == 1


@given(st.binary(max_size=200))
def test_noise_is_counted_too(data):
    exact = bytes(data)
    assert lib.lm_msgpack_values(exact, len(exact), 1 << 40) <= len(exact)


@pytest.mark.parametrize("one", [b"\x90", b"\x80", b"\x01"])
def test_a_frame_of_very_many_values_is_refused_before_they_are_made(one):
    body = b"\xdd" + (32 << 20).to_bytes(4, "big") + one * (32 << 20)
    with pytest.raises(ProtocolError, match="too many values"):
        channel.decode_body(body)
