"""Runs `lazymig ARGUMENTS` and writes every control frame that it sends or gets to a file.

    python hostile_record.py FILE migrate PID --to ADDRESS ...

What tests of hostile peers change, and the fuzzers' corpus: real frames of a real migration.
"""

from __future__ import annotations

import struct
import sys

from lazymig import cli
from lazymig.migrate import channel

HEAD = struct.Struct("<cII")


def main() -> None:
    out = open(sys.argv.pop(1), "ab", buffering=0)  # noqa: SIM115 (as long as the process)
    encode, decode = channel.encode, channel.decode_body

    def note(direction: bytes, body: bytes, attachment: bytes = b"") -> None:
        out.write(HEAD.pack(direction, len(body), len(attachment)) + body + attachment)

    def noting_encode(frame, attachment=b""):
        data = encode(frame, attachment)
        size = int.from_bytes(data[:4], "little")
        note(b">", data[8 : 8 + size], attachment)
        return data

    def noting_decode(body):
        note(b"<", bytes(body))
        return decode(body)

    channel.encode, channel.decode_body = noting_encode, noting_decode
    for name, module in list(sys.modules.items()):
        if name.startswith("lazymig.migrate") and getattr(module, "encode", None) is encode:
            module.encode = noting_encode  # type: ignore[attr-defined]
        if name.startswith("lazymig.migrate") and getattr(module, "decode_body", None) is decode:
            module.decode_body = noting_decode  # type: ignore[attr-defined]
    cli.main()


if __name__ == "__main__":
    main()
