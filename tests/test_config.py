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
    ("[ingest.foo]\nx = 1", "'foo' in [ingest] of repmatch.toml is a table; 'ingest' has no commands"),
    ("[info.store]", "'store' in [info] of repmatch.toml is a table"),
    ("[adapter.exprot]\nepochs = 1", "there is no command 'exprot'; did you mean 'export'"),
    ("[adapter]\nstore = 'x'", "there is no option 'store'; known: 'dataset', 'device', 'epochs'"),
    ("[study]\nlimit = 1", "It stands in [study] of repmatch.toml"),
    ("version = true", "there is no option 'version'"),
    ("[score]\nlimit = 2.5", "'2.5' is not a valid integer"),
    ("limit = 2.5", "The value is that of 'limit' above all tables of repmatch.toml"),
    ("[score]\nlimit = 1e400", "'inf' is not a valid integer"),
    ("limit = true", "'limit' in repmatch.toml is true; --limit is no switch, it takes a value"),
    ("[score]\nwait = false", "'wait' in [score] of repmatch.toml is false; --wait is no switch"),
    ("[score]\nwhere = true", "'where' in [score] of repmatch.toml is true; --where is no switch"),
    ("[score]\nlimit = 0", "The value is that of 'limit' in [score] of repmatch.toml"),
    ("[score]\nlimit = 'many'", "The value is that of 'limit' in [score] of repmatch.toml"),
    ("[score]\njson = 2.5", "The value is that of 'json' in [score] of repmatch.toml"),
    ("quiet = 2.5", "The value is that of 'quiet' above all tables of repmatch.toml"),
    ("[study]\nseed = [1]", "'seed' in [study] of repmatch.toml is a list"),
    ("[score]\nlimit = 2020-01-01", "'limit' in [score] of repmatch.toml is a date"),
    ("limit = " + "9" * 30, "'limit' in repmatch.toml is an integer beyond 64 bits"),
    ("limit = 0x" + "f" * 5000, "'limit' in repmatch.toml is an integer beyond 64 bits"),
    ("limit = " + "9" * 5000, "repmatch.toml cannot be read as TOML"),
    ("limit = " + "[" * 5000 + "]" * 5000, "repmatch.toml cannot be read as TOML: it is nested too deep"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_file_with_a_mistake(run: Run, here: Path, toy_store: Path, text: str, message: str) -> None:
    (here / "repmatch.toml").write_text(text + "\n")
    result = run("--store", toy_store, "score", "toy")
    assert message in result.err
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert "defect" not in result.err


def test_only_a_value_of_the_file_is_said_to_stand_there(
    run: Run, here: Path, toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "repmatch.toml").write_text("limit = 0\n")
    typed = run("--store", toy_store, "score", "toy", "--limit", 0)
    assert typed.code == 2
    assert "repmatch.toml" not in typed.err
    monkeypatch.setenv("REPMATCH_STORE", str(toy_store))
    assert run("score", "toy", "--limit", 1, "--epochs", 1).code == 0  # the flag is stronger than what is wrong
    assert run("info").code == 0  # it has no such option


REFUSED = [
    ("[ingest]\nrank = 99", "'rank' in [ingest]", "--rank 99 is out of range"),
    ("device = 'tpu'", "'device' above all tables", "the device 'tpu' is unknown"),
    ("[ingest]\ndevice = 'tpu'\nrank = 2", "'device' in [ingest]", "the device 'tpu' is unknown"),
    ("model = 'no/such'", "'model' above all tables", "no/such"),
    ("[ingest]\nmodel = 'embedded'\ntext-field = 'body'", "'text-field' in [ingest]", "there is no column 'body'"),
    ("[ingest]\ntargets = ['query', 'valeu']\nrank = 2", "'targets' in [ingest]", "valeu"),
    ("store = 'file'", "'store' above all tables", "file"),
]


@pytest.mark.parametrize(("text", "place", "message"), REFUSED)
def test_what_the_library_refuses_is_said_to_stand_in_the_file(
    run: Run, here: Path, toy_file: Path, tiny_model: Path, text: str, place: str, message: str
) -> None:
    (here / "file").write_text("")
    (here / "repmatch.toml").write_text(text + "\n")
    model = () if "model" in text else ("--model", tiny_model)
    result = run("ingest", toy_file, "--dataset", "d", *model)
    assert result.code != 0
    assert message in result.err
    assert f"The value is that of {place} of repmatch.toml." in result.err
    assert result.err.count("The value is that of") == 1
    typed = [word for line in text.splitlines() if "= " in line for word in _typed(line)]
    result = run("--store", here / "s", "ingest", toy_file, "--dataset", "d", *model, *typed)
    assert "The value is that of" not in result.err


def _typed(line: str) -> list[str]:
    key, value = line.split(" = ")
    words = value.strip("[]").replace("'", "").replace(" ", "")
    return [] if key == "store" else [f"--{key}", words]


def test_an_option_that_may_be_repeated_takes_one_text_or_a_list(here: Path) -> None:
    (here / "repmatch.toml").write_text(
        "[evaluate]\ntest = 'held-out.jsonl'\nstrategy = ['random', 'top']\n[select]\nmix = ['top=1', 'random=2']\n"
    )
    found = read_config(cli)
    assert found["evaluate"] == {"tests": ["held-out.jsonl"], "strategies": ["random", "top"]}
    context = cli.commands["select"].make_context("select", ["d", "-k", "1"], default_map=found["select"])
    assert context.params["mix"] == (("top", 1.0), ("random", 2.0))


def test_a_group_holds_values_for_its_commands(here: Path) -> None:
    (here / "repmatch.toml").write_text("seed = 1\n[study]\nseed = 2\nepochs = 3\n[study.batches]\nseed = 4\n")
    found = read_config(cli)["study"]
    assert (found["batches"], found["information"]) == ({"seed": 4}, {"seed": 2, "epochs": 3})
    assert found["layers"] == {}


@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_file_is_an_error(
    run: Run, here: Path, toy_store: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    file = here / "repmatch.toml"
    if named:
        monkeypatch.setenv("REPMATCH_CONFIG", "repmatch.toml")
    file.mkdir()
    result = run("--store", toy_store, "info")
    assert (result.code, "repmatch.toml is a folder; expected a TOML file" in result.err) == (2, True)
    file.rmdir()
    file.symlink_to("nowhere")
    result = run("--store", toy_store, "info")
    assert (result.code, "repmatch.toml is a link to nothing" in result.err) == (2, True)


def test_a_byte_order_mark_is_passed_over_and_another_encoding_named(run: Run, here: Path, toy_store: Path) -> None:
    text = f"store = '{toy_store}'\n"
    (here / "repmatch.toml").write_text(text, encoding="utf-8-sig")
    assert "toy" in run("info").out
    (here / "repmatch.toml").write_text(text, encoding="utf-16")
    result = run("info")
    assert (result.code, "Save it as UTF-8." in result.err) == (2, True)


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
