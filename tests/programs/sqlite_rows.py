"""Commits numbered rows in WAL mode; notes each number after its commit has returned.

sqlite_rows.py OUT DATABASE NOTES
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import time

from reporting import Reporter

out = Reporter(sys.argv[1])
database = sqlite3.connect(sys.argv[2], isolation_level=None)
notes = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
out.check(database.execute("pragma journal_mode = wal").fetchone()[0] == "wal", "no WAL mode")
database.execute("pragma synchronous = off")
database.execute("create table rows (n integer primary key, digest text, body blob)")
n = 0
report_at = time.monotonic()
while True:
    body = os.urandom(2000)
    database.execute("begin immediate")
    for _ in range(5):
        database.execute("insert into rows values (?, ?, ?)", (n, hashlib.sha1(body).hexdigest(), body))
        n += 1
    database.execute("commit")
    os.write(notes, b"%d\n" % (n - 1))
    time.sleep(0.002)
    if time.monotonic() > report_at:
        count, last = database.execute("select count(*), max(n) from rows").fetchone()
        out.check(count == n and last == n - 1, f"{count} rows up to {last}, {n} were written")
        digest, stored = database.execute(
            "select digest, body from rows where n = (abs(random()) % ?)", (n,)
        ).fetchone()
        out.check(hashlib.sha1(stored).hexdigest() == digest, "a row is damaged")
        out.report(work=n)
        report_at = time.monotonic() + 0.1
