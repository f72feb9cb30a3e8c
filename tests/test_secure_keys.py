"""The small authority: what it makes, where, and with which permissions."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from lazymig.secure.authority import Authority, KeysError
from lazymig.secure.tls import TlsError, find


def keys(directory, *words, status=0):
    command = [sys.executable, "-m", "lazymig", "keys", *words, "--dir", str(directory)]
    r = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert r.returncode == status, r.stderr
    assert "Traceback" not in r.stderr
    return r.stdout + r.stderr


def openssl(*words):
    r = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    return r.returncode, r.stdout + r.stderr


def test_commands_make_what_openssl_accepts(tmp_path):
    place = tmp_path / "tls"
    keys(place, "init")
    said = keys(place, "issue", "web1.example.org", "--ip", "10.0.0.7", "--ip", "fd00::7", "--days", "30")
    host = place / "hosts" / "web1.example.org"
    assert str(host) in said
    for directory in (place, place / "hosts", host, place / "issued"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for key in (place / "ca-key.pem", host / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for purpose in ("sslserver", "sslclient"):
        crl = ["-crl_check", "-CRLfile", host / "crl.pem"]
        status, said = openssl(
            "verify", "-x509_strict", "-purpose", purpose, *crl, "-CAfile", host / "ca.pem", host / "cert.pem"
        )
        assert status == 0, said
    text = openssl("x509", "-in", host / "cert.pem", "-noout", "-text")[1]
    assert "DNS:web1.example.org, IP Address:10.0.0.7, IP Address:FD00:0:0:0:0:0:0:7" in text

    before = (place / "ca-key.pem").read_bytes()
    assert "authority-exists" in keys(place, "init", status=1)
    assert (place / "ca-key.pem").read_bytes() == before
    assert "unknown-host" in keys(place, "revoke", "web2", status=1)
    keys(place, "revoke", "10.0.0.7")
    assert (host / "crl.pem").read_bytes() == (place / "crl.pem").read_bytes()
    status, said = openssl("verify", *crl, "-CAfile", host / "ca.pem", host / "cert.pem")
    assert status != 0
    assert "revoked" in said


def test_only_its_own_host_takes_a_certificate_into_use(tmp_path, monkeypatch):
    place = tmp_path / "tls"
    monkeypatch.setenv("LAZYMIG_TLS_DIR", str(place))
    assert find() is None
    keys(place, "init")
    keys(place, "issue", "elsewhere")
    assert find() is None
    assert "in use" in keys(place, "issue", socket.gethostname())
    found = find()
    assert found is not None
    assert found.crl == place / "crl.pem"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "-x", "1.2.3", "x" * 64, "*.example.org", "a\nb"])
def test_names_that_are_none(tmp_path, name):
    authority = Authority.create(tmp_path / "tls")
    with pytest.raises(KeysError):
        authority.issue(name)
    assert not (tmp_path / "tls" / "issued").exists()


def test_a_revocation_stays_when_others_follow(tmp_path):
    authority = Authority.create(tmp_path / "tls")
    first, again, other = authority.issue("a"), authority.issue("a"), authority.issue("b")
    assert sorted(authority.revoke("a")) == sorted([first.serial, again.serial])
    assert authority.revoke("b") == [other.serial]
    assert authority.revoke("a") == []
    assert {r.serial_number for r in authority._crl()} == {first.serial, again.serial, other.serial}


def test_without_an_authority(tmp_path):
    assert "no-authority" in keys(tmp_path, "issue", "a", status=1)
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_used(tmp_path):
    issued = Authority.create(tmp_path / "tls").issue("a")
    place = issued.directory

    def code(**changed):
        files = {"ca": place / "ca.pem", "cert": place / "cert.pem", "key": place / "key.pem"} | changed
        with pytest.raises(TlsError) as e:
            find(**files)
        assert str(e.value)
        return e.value.code, e.value.subject

    assert code(cert=tmp_path / "none.pem") == ("tls-file", str(tmp_path / "none.pem"))
    assert code(key=tmp_path / "tls" / "ca-key.pem")[0] == "tls-file"  # another's
    assert code(ca=place / "key.pem")[0] == "tls-file"
    assert code(crl=place / "cert.pem") == ("tls-file", str(place / "cert.pem"))
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:x", "-in", place / "key.pem", "-out", locked]
    subprocess.run(command, check=True, timeout=30)
    os.chmod(locked, 0o600)
    with pytest.raises(TlsError, match="passphrase"):  # and asks nobody for it
        find(place / "ca.pem", place / "cert.pem", locked)
    os.chmod(place / "key.pem", 0o640)
    assert code() == ("tls-key-exposed", str(place / "key.pem"))
