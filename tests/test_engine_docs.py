from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import blocks

from repmatch.curator.forms import TASKS


def test_the_worked_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example, imports = blocks("docs/tasks.md", "python")
    exec(compile(example, "docs/tasks.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert "new=4" in printed
    assert "r0" in printed
    exec(compile(imports, "docs/tasks.md", "exec"), {})


def test_every_task_is_in_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    for name in TASKS:
        assert f"\n| `{name}`" in text
