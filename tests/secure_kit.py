"""What tests of TLS share: certificates of every kind, made once, and pairs of connected doors."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from dataclasses import replace
from unittest import mock

from lazymig.secure import authority as module
from lazymig.secure.authority import Authority
from lazymig.secure.doors import Doors
from lazymig.secure.tls import Credentials


def credentials(directory):
    return Credentials(*(directory / n for n in ("ca.pem", "cert.pem", "key.pem", "crl.pem")))


def shows(credentials):
    """The options of a command that uses them."""
    c = credentials
    return (
        "--tls-ca",
        str(c.ca),
        "--tls-cert",
        str(c.cert),
        "--tls-key",
        str(c.key),
        "--tls-crl",
        str(c.crl),
    )


def criu_shows(credentials):
    """The same for CRIU."""
    c = credentials
    files = ("--tls-cacert", c.ca, "--tls-cacrl", c.crl, "--tls-cert", c.cert, "--tls-key", c.key)
    return ("--tls", *map(str, files))


class Keys:
    """Two hosts, and others that must not be let in."""

    def __init__(self, place, source, destination):
        ours, foreign = Authority.create(place / "ours"), Authority.create(place / "foreign")
        self.authority = ours
        self.directories = {
            "source": ours.issue("source", [source]).directory,
            "destination": ours.issue("destination", [destination]).directory,
            "other": ours.issue("other", ["192.0.2.1"]).directory,
            "revoked": ours.issue("revoked", [source, destination]).directory,
            "foreign": foreign.issue("foreign", [source, destination]).directory,
        }
        long_ago = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(days=9)
        with mock.patch.object(module, "_now", return_value=long_ago):
            expired = ours.issue("expired", [source, destination], days=1)
        self.directories["expired"] = expired.directory
        ours.revoke("revoked")

    def __getitem__(self, name):
        return credentials(self.directories[name])

    def from_elsewhere(self, name):
        """Certificates of ``name``, in a directory that believes in ``ours``: only the other side refuses them."""
        return replace(self[name], ca=self["source"].ca, crl=self["source"].crl)


@contextlib.contextmanager
def doors(*those):
    made = [Doors(c) for c in those]
    try:
        yield made
    finally:
        for d in made:
            d.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    return a, b


def shake(client, server, name="127.0.0.1"):
    """Both ends' outcome over a fresh connection: ((socket, peer) or the error) of the client, and of the server."""
    a, b = tcp_pair()
    found = {}

    def one(role, work):
        try:
            found[role] = work()
        except Exception as e:
            found[role] = e

    with a, b:
        t = threading.Thread(target=one, args=("server", lambda: server.open(b, server=True, timeout_s=5)))
        t.start()
        one("client", lambda: client.open(a, server=False, name=name, timeout_s=5))
        t.join()
    return found["client"], found["server"]
