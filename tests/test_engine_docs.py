from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs import blocks

from repmatch.curator.forms import FORMS, TASKS


def test_the_worked_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example, beside = blocks("docs/tasks.md", "python")
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "docs/tasks.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "new=4" in printed
    assert "r0" in printed
    exec(compile(beside, "docs/tasks.md", "exec"), names)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert len({change for _, change in lines}) == 4  # another subset or another A, another change
    assert all(float(change) > 0 for _, change in lines)


def test_every_form_is_in_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    (line,) = re.findall(r"^- `form`.*?^- ", text, flags=re.DOTALL | re.MULTILINE)
    for form in FORMS:
        assert f"`{form}`" in line


def test_every_task_is_in_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    for name in TASKS:
        assert f"\n| `{name}`" in text
