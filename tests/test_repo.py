"""What holds for the repository as a whole: size of modules, documents that say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lazymig.migrate import states

ROOT = Path(__file__).resolve().parent.parent
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    if name and (ROOT / name).is_file()
]
DOCS = [p for p in TRACKED if p.suffix == ".md"]


def named(paths):
    return {"ids": [str(p.relative_to(ROOT)) for p in paths]}


CODE = [p for p in TRACKED if p.suffix in (".py", ".c", ".h")]


@pytest.mark.parametrize("path", CODE, **named(CODE))
def test_modules_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 600


def test_no_path_of_a_particular_machine():
    mentions = re.compile(rb"(?<![\w.}])/(?:work|root|home)/\w")
    this = Path(__file__).resolve()
    found = [p.name for p in TRACKED if p != this and mentions.search(p.read_bytes())]
    assert found == []


def test_nothing_unfinished():
    # These words are what is looked for: no other file of code may hold them.
    marks = re.compile(r"\b(?:TODO|FIXME|XXX)\b|pytest\.(?:mark\.)?(?:skip|xfail)")
    this = Path(__file__).resolve()
    found = [p.name for p in CODE if p != this and marks.search(p.read_text())]
    assert found == []


def test_readme_has_two_commands_to_begin_with():
    blocks = re.findall(r"^```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [b.strip() for b in blocks] == ["./dev demo", "./dev test"]


@pytest.mark.parametrize("doc", DOCS, **named(DOCS))
def test_links_lead_somewhere(doc):
    for target in re.findall(r"\]\(([^)#\s]+)", doc.read_text()):
        if "://" not in target:
            assert (doc.parent / target).exists(), target


@pytest.mark.parametrize(
    ("name", "table"),
    [("source", states.SOURCE_TRANSITIONS), ("destination", states.DESTINATION_TRANSITIONS)],
)
def test_protocol_draws_the_state_machine_that_runs(name, table):
    text = (ROOT / "docs" / "protocol.md").read_text()
    (drawing,) = re.findall(rf'state "{name}" as \w \{{\n(.*?)\n    \}}', text, re.DOTALL)
    arrows = re.findall(r"^\s*(\S+) --> (\S+)$", drawing, re.MULTILINE)
    assert len(arrows) == len(set(arrows))
    drawn = {(a, b) for a, b in arrows if "[*]" not in (a, b)}
    assert drawn == {(a.value, b.value) for a, others in table.items() for b in others}
    assert {a for a, b in arrows if b == "[*]"} == {a.value for a, others in table.items() if not others}
    assert [b for a, b in arrows if a == "[*]"] == [next(iter(table)).value]


def test_protocol_tells_of_every_frame():
    code = "".join(path.read_text() for path in (ROOT / "lazymig" / "migrate").glob("*.py"))
    frames = set(re.findall(r'"t": "([a-z-]+)"', code))
    assert len(frames) > 10
    text = (ROOT / "docs" / "protocol.md").read_text()
    assert {f for f in frames if f"`{f}`" not in text} == set()


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for p in TRACKED
        if p.name == "__init__.py" and p.relative_to(ROOT).parts[0] in ("lazymig", "page_server")
    }
    assert sorted(listed) == sorted(there)


def test_license_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("script", ["dev", ".ci/run"])
def test_scripts_are_plain_sh(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", path], check=True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("def test_a(): pass", 0),
        # Whole test files, written for tests.strict to fail them: nothing of this suite is skipped by these.
        ("import pytest\ndef test_a(): pytest.skip('no root')", 1),
        ("import pytest\n@pytest.mark.skipif(True, reason='no root')\ndef test_a(): pass", 1),
        ("import pytest\npytest.skip('no root', allow_module_level=True)", 1),
    ],
)
def test_a_skip_is_a_failure_for_continuous_integration(tmp_path, body, status):
    (tmp_path / "test_it.py").write_text(body + "\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.strict", "-p", "no:cacheprovider", tmp_path]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (r.returncode != 0) == (status != 0), r.stdout
