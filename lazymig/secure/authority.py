"""A small certificate authority in a directory, for people who have none.

``ca.pem`` and ``ca-key.pem`` are the authority, ``crl.pem`` lists what it has revoked, ``issued/SERIAL.pem`` keeps
every certificate that it has issued, and ``hosts/HOST/`` is what that host needs in its own /etc/lazymig/tls.
Directories are 0700, keys 0600 from their first byte on.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lazymig.errors import LazymigError
from lazymig.secure.tls import CA, CERT, CRL, KEY

CA_KEY = "ca-key.pem"
CA_DAYS = 3650
HOST_DAYS = 825
_SKEW = datetime.timedelta(minutes=10)  # clocks of hosts differ
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*"
)


class KeysError(LazymigError):
    """Keys that cannot be made or revoked; nothing was changed."""

    code = "keys"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued."""

    directory: Path
    names: tuple[str, ...]
    serial: int
    until: datetime.datetime


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces a file in one step, on the disk when this returns."""
    part = path.with_name(f".{path.name}.new")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as f:
        os.fchmod(fd, mode)
        f.write(data)
        f.flush()
        os.fsync(fd)
    os.replace(part, path)


def _pem(what: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return what.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form, no = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, no)


def _private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(directory, 0o700)


def name_of(text: str) -> x509.GeneralName:
    """A host's name or address as a certificate holds it; KeysError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not _HOST.fullmatch(text) or re.fullmatch(r"[0-9.]+", text):
        raise KeysError("is neither a host name nor an address", code="bad-option", subject=repr(text))
    return x509.DNSName(text.lower())


class Authority:
    """The authority in ``directory``."""

    def __init__(self, directory: Path) -> None:
        """Opens it. KeysError ``no-authority``."""
        self.directory = directory
        try:
            self._cert = x509.load_pem_x509_certificate((directory / CA).read_bytes())
            key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
        except (OSError, ValueError) as e:
            raise KeysError(
                f"no authority is here ({e})",
                code="no-authority",
                subject=str(directory),
                hint="`lazymig keys init` makes one; host certificates are issued where it is",
            ) from e
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._cert.public_key():
            raise KeysError("its key is another's", code="no-authority", subject=str(directory))
        self._key = key

    @staticmethod
    def create(directory: Path, days: int = CA_DAYS) -> Authority:
        """Makes a new one. KeysError ``authority-exists``: one is there already, and stays."""
        _private(directory)
        with _locked(directory):
            for file in (CA, CA_KEY):
                if (directory / file).exists():
                    raise KeysError(
                        "an authority is there already; it was not touched",
                        code="authority-exists",
                        subject=str(directory / file),
                        hint="`lazymig keys issue HOST` uses it",
                    )
            key = ec.generate_private_key(ec.SECP256R1())
            identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            name = x509.Name(
                [x509.NameAttribute(NameOID.COMMON_NAME, f"lazymig authority {identifier.digest.hex()[:8]}")]
            )
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            cert = (
                x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
                .not_valid_before(_now() - _SKEW)
                .not_valid_after(_now() + datetime.timedelta(days=days))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
                .add_extension(identifier, critical=False)
                .sign(key, hashes.SHA256())
            )
            _write(directory / CA_KEY, _key_pem(key), 0o600)
            _write(directory / CA, _pem(cert))
            authority = Authority(directory)
            authority._write_crl([])
        return authority

    def issue(self, host: str, names: Sequence[str] = (), days: float = HOST_DAYS) -> Issued:
        """Makes a key and a certificate for ``host``, for both ends of a connection, in ``hosts/HOST``.

        ``names`` are further names and addresses by which it is dialled. Earlier certificates stay valid.
        """
        every = list(dict.fromkeys([host, *names]))
        san = x509.SubjectAlternativeName([name_of(n) for n in every])
        if days <= 0:
            raise KeysError("must be more than 0", code="bad-option", subject="--days")
        until = _now() + datetime.timedelta(days=days)
        if until > self._cert.not_valid_after_utc:
            raise KeysError(
                f"the authority itself ends on {self._cert.not_valid_after_utc:%Y-%m-%d}",
                code="bad-option",
                subject="--days",
            )
        key, serial = ec.generate_private_key(ec.SECP256R1()), x509.random_serial_number()
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        cert = (
            x509.CertificateBuilder(self._cert.subject, subject, key.public_key(), serial)
            .not_valid_before(min(_now(), until) - _SKEW)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(uses, critical=False)
            .add_extension(san, critical=False)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        with _locked(self.directory):
            place = self.directory / "hosts" / host.replace(":", "_")
            for directory in (self.directory / "issued", place.parent, place):
                _private(directory)
            _write(self.directory / "issued" / f"{serial:x}.pem", _pem(cert))
            _write(place / KEY, _key_pem(key), 0o600)
            _write(place / CERT, _pem(cert))
            _write(place / CA, _pem(self._cert))
            _write(place / CRL, (self.directory / CRL).read_bytes())
        return Issued(place, tuple(every), serial, until)

    def install(self, issued: Issued) -> None:
        """Takes a host's files into use where the authority is, too."""
        for name in (KEY, CERT):
            _write(
                self.directory / name, (issued.directory / name).read_bytes(), 0o600 if name == KEY else 0o644
            )

    def revoke(self, host: str) -> list[int]:
        """Revokes every certificate that holds this name or address; their serial numbers, new ones only.

        The new list counts on a host when it is there. KeysError ``unknown-host``: none was issued.
        """
        wanted = name_of(host)
        with _locked(self.directory):
            found = [c for c in self._issued() if wanted in _names(c)]
            if not found:
                raise KeysError("no certificate was issued for it", code="unknown-host", subject=host)
            before = self._crl()
            known = {r.serial_number for r in before}
            new = [c.serial_number for c in found if c.serial_number not in known]
            fresh = [
                x509.RevokedCertificateBuilder().serial_number(n).revocation_date(_now()).build() for n in new
            ]
            self._write_crl([*before, *fresh])
            for directory in sorted((self.directory / "hosts").glob("*/")):
                _write(directory / CRL, (self.directory / CRL).read_bytes())
        return new

    def _issued(self) -> Iterator[x509.Certificate]:
        for path in sorted((self.directory / "issued").glob("*.pem")):
            yield x509.load_pem_x509_certificate(path.read_bytes())

    def _crl(self) -> list[x509.RevokedCertificate]:
        path = self.directory / CRL
        return list(x509.load_pem_x509_crl(path.read_bytes())) if path.exists() else []

    def _write_crl(self, revoked: Sequence[x509.RevokedCertificate]) -> None:
        # Valid for as long as the authority: a list that is out of date refuses everybody.
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._cert.subject)
            .last_update(_now() - _SKEW)
            .next_update(self._cert.not_valid_after_utc)
        )
        for entry in revoked:
            crl = crl.add_revoked_certificate(entry)
        _write(self.directory / CRL, _pem(crl.sign(self._key, hashes.SHA256())))


def _names(cert: x509.Certificate) -> list[x509.GeneralName]:
    return list(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One command at a time: two would lose each other's revocations."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
