"""The lock file: every dependency, the tested versions, hashes, and no index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "requirements.lock").read_text()
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)[^\n]*?((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", re.M)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_hashes() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith(("#", " "))]
    assert len(lines) > 100
    assert len(PINNED.findall(TEXT)) == len(lines)


def test_no_index_is_named() -> None:
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|@ ?file:", TEXT)


def test_versions_are_those_that_are_tested() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    known = {plain(name): version for name, version in tested.items()}
    locked = {plain(name): version for name, version, _ in PINNED.findall(TEXT)}
    assert {name: version for name, version in locked.items() if known.get(name, version) != version} == {}
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*about["dependencies"], *(line for lines in about["optional-dependencies"].values() for line in lines)]
    names = {plain(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in wanted}  # type: ignore[index]
    assert names <= set(locked)
    assert names <= set(known)
