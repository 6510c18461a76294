from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from repmatch.cli import cli
from repmatch.config import read_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPMATCH_CONFIG", raising=False)
    return tmp_path


def test_the_file_is_weaker_than_the_environment_and_a_flag(
    run: Run, here: Path, toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "repmatch.toml").write_text(f"store = '{toy_store}'\nk = 2\n[nearest]\nk = 3\n")
    assert len(run("nearest", "toy", "toy-1", "--json").objects) == 3
    (here / "repmatch.toml").write_text(f"store = '{toy_store}'\n[score]\nlimit = 3\nepochs = 1\n")
    table = run("score", "toy").out.split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 3
    assert len(run("score", "toy", "--limit", 5).out.split("\n\n")[0].splitlines()) == 2 + 5
    monkeypatch.setenv("REPMATCH_STORE", str(here / "other"))
    assert "no store at" in run("score", "toy").err
    assert run("--store", toy_store, "score", "toy").code == 0


def test_what_a_file_may_say(here: Path) -> None:
    (here / "repmatch.toml").write_text(
        "quiet = true\ndevice = 'cpu'\n[ingest]\ntargets = ['query', 'value']\nbatch-tokens = 512\n"
        "[adapter.export]\nepochs = 2\n"
    )
    found = read_config(cli)
    assert found["quiet"] is True
    assert found["ingest"] == {"device": "cpu", "targets": "query,value", "batch_tokens": 512}
    assert found["adapter"]["export"] == {"device": "cpu", "epochs": 2}
    assert found["info"] == {}


BAD = [
    ("stroe = 'x'", "there is no option 'stroe'; did you mean 'store'"),
    ("[scoer]\nlimit = 1", "there is no command 'scoer'; did you mean 'score'"),
    ("[score]\nlimits = 1", "there is no option 'limits'; did you mean 'limit'"),
    ("[score]\nlimit = [1]", "expected a text, a number, true or false"),
    ("[score]\nlimit = 'many'", "'many' is not a valid integer"),
    ("store =", "cannot be read as TOML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_file_with_a_mistake(run: Run, here: Path, toy_store: Path, text: str, message: str) -> None:
    (here / "repmatch.toml").write_text(text + "\n")
    result = run("--store", toy_store, "score", "toy")
    assert message in result.err
    assert result.code in (1, 2)
    assert "Traceback" not in result.err


def test_a_named_file_must_be_there(run: Run, here: Path, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPMATCH_CONFIG", str(here / "mine.toml"))
    result = run("--store", toy_store, "info")
    assert (result.code, "there is no such file" in result.err) == (2, True)
    (here / "mine.toml").write_text(f"store = '{toy_store}'\n")
    assert "toy" in run("info").out


def complete(store: Path, words: str) -> list[str]:
    """What bash would offer after these words."""
    asked = {"_REPMATCH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "repmatch"],
        env={**os.environ, "REPMATCH_STORE": str(store), **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]


def test_the_shell_completes_names_in_the_store(run: Run, toy_store: Path) -> None:
    run("--store", toy_store, "select", "toy", "-k", 3, "--strategy", "random", "--name", "tiny-core")
    assert complete(toy_store, "repmatch nearest t") == ["toy"]
    assert complete(toy_store, "repmatch export t") == ["toy", "tiny-core"]
    assert complete(toy_store, "repmatch exp") == ["export"]
    assert complete(toy_store / "none", "repmatch nearest t") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run: Run, shell: str) -> None:
    result = run("completion", shell)
    assert result.code == 0
    assert "_REPMATCH_COMPLETE" in result.out


@pytest.mark.parametrize("name", ["REPMATCH_THREADS", "OMP_NUM_THREADS"])
def test_torch_takes_the_threads_that_were_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from repmatch.curator.workbench import limit_threads

    before = torch.get_num_threads()
    monkeypatch.delenv("REPMATCH_THREADS", raising=False)
    try:
        for count in (1, 2):
            monkeypatch.setenv(name, str(count))
            limit_threads()
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
