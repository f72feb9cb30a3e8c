"""Certificates as both hosts use them: where they are, what is wrong with them, and who the peer turned out to be.

The directory ``$LAZYMIG_TLS_DIR`` (else ``/etc/lazymig/tls``) holds ``ca.pem``, ``cert.pem``, ``key.pem`` and, when
there is one, ``crl.pem``: what `lazymig keys issue` makes for a host. Whoever has an authority of their own names
the files instead.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lazymig.errors import LazymigError
from lazymig.native import CData, ffi, lib

DEFAULT_DIRECTORY = "/etc/lazymig/tls"
CA, CERT, KEY, CRL = "ca.pem", "cert.pem", "key.pem", "crl.pem"
HANDSHAKE_RECORD = b"\x16\x03"  # how TLS begins; none of our protocols does so

# TLS alert numbers (RFC 8446, 6.2) that tell why a certificate was refused over there.
_ALERTS = {
    40: "it could not agree on TLS 1.3",
    42: "it takes this host's certificate for unsound",
    43: "this host's certificate is of a kind that it does not take",
    44: "this host's certificate has been revoked",
    45: "this host's certificate has expired",
    46: "it does not accept this host's certificate",
    48: "it does not know the authority that issued this host's certificate",
    70: "it does not speak TLS 1.3",
    116: "it wants a certificate, and this host has shown none",
}
# X509_V_ERR_* numbers (openssl-verify(1)) of what people meet, and the stable code of each.
_VERIFY = {
    10: ("tls-expired", "its certificate has expired"),
    9: ("tls-not-yet-valid", "its certificate is not valid yet: compare the hosts' clocks"),
    12: ("tls-crl-expired", "the list of revoked certificates is out of date here"),
    3: ("tls-crl-missing", "no list of revoked certificates is here for the authority that issued its certificate"),
    18: ("tls-unknown-authority", "it shows a certificate that nobody but itself vouches for"),
    19: ("tls-unknown-authority", "an authority that this host does not believe issued its certificate"),
    20: ("tls-unknown-authority", "an authority that this host does not believe issued its certificate"),
    7: ("tls-unknown-authority", "its certificate's signature is not that of the authority that this host believes"),
    23: ("tls-revoked", "its certificate has been revoked"),
    26: ("tls-wrong-purpose", "its certificate is not made for this use"),
    62: ("tls-wrong-name", "its certificate is another host's"),
    64: ("tls-wrong-name", "its certificate is another host's"),
}  # fmt: skip


# What OpenSSL says of files, and what that means to whoever has named them.
_FILES = {
    "PEM lib": "does not hold, in PEM, what belongs there",
    "no certificate or crl found": "does not hold, in PEM, what belongs there",
    "key values mismatch": "is not the key of the certificate that goes with it",
}


class TlsError(LazymigError):
    """A connection that TLS has refused, or certificates that cannot be used."""

    code = "tls"


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom the other end's certificate names."""

    names: tuple[str, ...]  # DNS names and addresses of its certificate
    fingerprint: str  # SHA-256 of it, in hex
    ours: bool = True  # it is lazymig, and no other program

    def __str__(self) -> str:
        return ", ".join(self.names) or f"SHA-256 {self.fingerprint[:16]}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The files (PEM) that this side believes and shows."""

    ca: Path
    cert: Path
    key: Path
    crl: Path | None = None
    name: str = ""  # what a destination's certificate must hold, if that is not the address dialled

    def check(self) -> None:
        """Loads everything once. TlsError naming the file, also for a key that others may read."""
        for path in (self.ca, self.cert, self.key, *((self.crl,) if self.crl else ())):
            try:
                with path.open("rb") as f:
                    mode = os.fstat(f.fileno())
            except OSError as e:
                raise TlsError(
                    f"cannot be read ({e.strerror})",
                    code="tls-file",
                    subject=str(path),
                    hint="`lazymig keys issue HOST` makes it",
                ) from e
            if path == self.key and (
                stat.S_IMODE(mode.st_mode) & 0o077 or mode.st_uid not in (0, os.geteuid())
            ):
                raise TlsError(
                    "a secret key that others can get at",
                    code="tls-key-exposed",
                    subject=str(path),
                    hint=f"chown root {path}; chmod 600 {path}; and if somebody may have read it: issue another",
                )
        Context(self, server=False).close()


def find(
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    crl: Path | None = None,
    name: str = "",
) -> Credentials | None:
    """The files named, else those in the standard place; None when there are none. TlsError for half a set."""
    place = Path(os.environ.get("LAZYMIG_TLS_DIR") or DEFAULT_DIRECTORY)
    if not (ca or cert or key or crl) and not any((place / n).exists() for n in (CERT, KEY)):
        return None
    ca = ca or place / CA
    beside = ca.parent / CRL
    found = Credentials(
        ca=ca,
        cert=cert or place / CERT,
        key=key or place / KEY,
        crl=crl or (beside if beside.exists() else None),
        name=name,
    )
    found.check()
    return found


class Context:
    """One connection's TLS, in the process that carries it."""

    def __init__(self, credentials: Credentials, *, server: bool) -> None:
        """Loads the files; TlsError ``tls-file`` with the reason."""
        report = ffi.new("lm_tls_report *")
        words = [os.fsencode(p) for p in (credentials.ca, credentials.cert, credentials.key)]
        crl = os.fsencode(credentials.crl) if credentials.crl else ffi.NULL
        self._tls: CData = lib.lm_tls_new(words[0], crl, words[1], words[2], server, report)
        if self._tls == ffi.NULL:
            path, _, reason = _text(report).rpartition(": ")
            raise TlsError(
                "is locked with a passphrase, and nobody is there to be asked for it"
                if report.detail
                else _FILES.get(reason, reason),
                code="tls-file",
                subject=path,
                hint="`lazymig keys issue HOST` makes the files",
            )
        self._server = server

    def handshake(self, fd: int, name: str, timeout_s: float, whom: str = "") -> Peer:
        """Shakes hands over a connected socket. ``name`` must be in the peer's certificate ("": any name will do).

        ``whom``: what to call the peer in messages; else the source, or the destination.

        TlsError; its codes are in docs/security.md.
        """
        report = ffi.new("lm_tls_report *")
        wanted = name.encode() if name else ffi.NULL
        lib.lm_tls_handshake(self._tls, fd, wanted, int(timeout_s * 1000), report)
        names = tuple(n.partition(":")[2] for n in ffi.string(report.names).decode("ascii").split())
        peer = Peer(names, bytes(report.fingerprint).hex(), bool(report.ours))
        if report.kind != lib.LM_TLS_OK:
            raise _refusal(report, peer, name, whom, self._server)
        return peer

    def pump(self, plain: int, unit: int = 1) -> None:
        """Carries bytes between the connection and the socket ``plain`` until both have ended.

        ``unit``: pieces of so many bytes, which ``plain`` says, are never spread over two records.
        """
        lib.lm_tls_pump(self._tls, plain, unit)

    def close(self) -> None:
        """Frees it; the connected socket is the caller's."""
        lib.lm_tls_free(self._tls)


def unprivileged() -> None:
    """Gives up all privileges of this process, for good: what follows only moves bytes of sockets that are open."""
    for call, arguments in (
        (os.setgroups, ([],)),
        (os.setresgid, (_NOBODY,) * 3),
        (os.setresuid, (_NOBODY,) * 3),
    ):
        try:
            call(*arguments)
        except OSError:
            continue  # in a user namespace that has no such number; the capabilities go in any case
    if err := lib.lm_tls_unprivileged():
        raise TlsError(os.strerror(err), code="internal", subject="capset")


_NOBODY = 65534
_CLAIMED = {
    "tls-unknown-authority",
    "tls-certificate",
}  # whoever made such a certificate may have written anything


def _text(report: CData) -> str:
    return str(ffi.string(report.text).decode(errors="replace"))


def _refusal(report: CData, peer: Peer, name: str, whom: str, server: bool) -> TlsError:
    kind, detail, text = int(report.kind), int(report.detail), _text(report)
    whom = whom or ("the source" if server else "the destination")
    if kind == lib.LM_TLS_PEER:
        code, what = _VERIFY.get(detail, ("tls-certificate", f"its certificate is not accepted: {text}"))
        hint = ""
        if code == "tls-wrong-name":
            what = f"its certificate is another host's: it is for {peer}, not for {name}"
            hint = (
                ""
                if server
                else "dial it by a name or address of its certificate, or say which with --tls-name"
            )
        elif peer.names:
            what += f" (it says that it is for {peer})" if code in _CLAIMED else f" (it is for {peer})"
        return TlsError(what, code=code, hint=hint)
    if kind == lib.LM_TLS_ALERT:
        return TlsError(
            _ALERTS.get(detail, f"{whom} has refused ({text})"),
            code="tls-refused-there",
            hint="its log tells more",
        )
    if kind == lib.LM_TLS_PLAIN:
        if server:
            return TlsError(
                f"this daemon wants TLS, and {whom} speaks plaintext",
                code="tls-required",
                hint=f"give {whom} a certificate (`lazymig keys issue`) and no --insecure; "
                "or start this daemon with --insecure",
            )
        return TlsError(
            "the daemon there speaks plaintext",
            code="tls-not-spoken",
            hint="give it a certificate: `lazymig keys issue`; or use --insecure here as well",
        )
    if kind == lib.LM_TLS_TIMEOUT:
        return TlsError(f"{whom} does not finish the TLS handshake", code="tls-timeout")
    if kind == lib.LM_TLS_CLOSED:
        hint = "" if server else "its log tells more; does it speak TLS?"
        return TlsError(f"{whom} hung up amid the TLS handshake ({text})", code="tls-closed", hint=hint)
    if "did not return a certificate" in text:
        return TlsError(f"{whom} has shown no certificate", code="tls-no-certificate")
    return TlsError(f"the TLS handshake failed: {text}", code="tls")
