"""What comes from outside runs nothing, reads no file and paints no terminal."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from conftest import Run, toy_rows, write_rows
from store_worker import make_space

from repmatch.curator.adapter_files import _card
from repmatch.curator.card import card_text
from repmatch.datamodels import Adapter, Space

PACKAGE = Path(__file__).parent.parent / "repmatch"
SECRET = "the secret of this machine"
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen"}
HARMLESS = ("re", "torch", "module")  # re.compile, torch.compile, module.eval()
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def _of_a_module(call: ast.Call) -> bool:
    """Whether it is x.eval() without arguments, which puts a module of torch into evaluation mode."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "eval" and not call.args


def test_no_module_unpickles_evaluates_or_calls_a_shell() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {m.split(".")[0] for m in modules} & FORBIDDEN_MODULES, path
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                owner = getattr(getattr(node.func, "value", None), "id", "")
                assert name not in FORBIDDEN_CALLS or owner in HARMLESS or _of_a_module(node), f"{path}:{node.lineno}"
                assert not (owner == "torch" and name == "load"), f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code", "allow_pickle"):
                assert isinstance(node.value, ast.Constant), f"{path}:{node.value.lineno}"
                assert node.value.value is False, f"{path}:{node.value.lineno}"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT getenv('HOME')",
        "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
        "COPY (SELECT 1) TO '{folder}/written'",
        "EXPORT DATABASE '{folder}/written'",
        "ATTACH '{folder}/written' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "CREATE TABLE registry.x AS SELECT 1",
        "SELECT 1; SELECT 2",
    ],
)
def test_queries_reach_nothing_outside_the_store(run: Run, toy_store: Path, tmp_path: Path, query: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    text = query.format(secret=secret, folder=tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments in (("sql", text), ("select", "toy", "-k", 2, "--name", "x"), ("score", "toy", "--where")):
        if arguments[0] == "select":
            continue
        asked = (*arguments, f"EXISTS ({text})") if arguments[-1] == "--where" else arguments
        result = run("--store", toy_store, *asked)
        assert result.code != 0, result.out
        assert SECRET not in result.out + result.err
        assert "Traceback" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_control_characters_do_not_reach_the_terminal(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    rows = toy_rows(12)
    for row in rows:
        row["text"] = f"\x1b]0;owned\x07\x1b[31m{row['text']}\x9b2J"
        row["id"] = f"\x1b[2J{row['id']}"
        row["label"] = f"{row['label']}\x1b[5m"
    file, store = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "store"
    assert run("--store", store, "ingest", file, "--dataset", "d", "--model", tiny_model).code == 0
    first = str(rows[0]["id"])
    shown = [
        run("--store", store, "select", "d", "-k", 3, "--name", "c"),
        run("--store", store, "nearest", "d", first, "-k", 3),
        run("--store", store, "inspect", "d", first),
        run("--store", store, "sql", "SELECT id, label FROM instances"),
        run("--store", store, "info"),
        run("--store", store, "nearest", "d", "\x1b[31mnobody", "-k", 3),
    ]
    for result in shown:
        assert not {c for c in result.out + result.err if c in "\x1b\x07\x9b"}, repr(result.out + result.err)[:300]


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a/../../b", "..", "a\x00b"])
def test_names_are_no_paths(run: Run, toy_store: Path, name: str) -> None:
    result = run("--store", toy_store, "select", "toy", "-k", 2, "--name", name)
    assert result.code != 0
    assert "Traceback" not in result.err


SIGNS = set("\x1b\x07\x9b\x9d\u202e\u2066\x7f")


def test_names_of_columns_do_not_reach_the_terminal(run: Run, toy_store: Path) -> None:
    for query in ('SELECT 1 AS "\x1b[2J\x9bx"', "SELECT '\x1b]0;x\x07\u202e' AS a"):
        result = run("--store", toy_store, "sql", query)
        assert result.code == 0
        assert not SIGNS & set(result.out + result.err), repr(result.out)


def test_json_holds_the_value_and_no_control_character(run: Run, toy_store: Path) -> None:
    value = "\x1b[2J\x9b2J\u202e\u2028é"
    result = run("--store", toy_store, "sql", "--json", f"SELECT '{value}' AS a")
    assert result.objects == [{"a": value}]
    assert not SIGNS & set(result.out)
    assert "é" in result.out


def test_a_configuration_file_does_not_reach_the_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "repmatch.toml"
    monkeypatch.setenv("REPMATCH_CONFIG", str(file))
    for text in ('[select]\nseed = "\\u001b[2J"\n', '"\\u001b[2J" = 1\n', '["\\u001b[2J"]\nx = 1\n'):
        file.write_text(text)
        result = run("select", "toy", "-k", "2")
        assert result.code in (1, 2)
        assert not SIGNS & set(result.out + result.err), repr(result.err)


MARKUP = "![x](http://evil.example/a.png) [y](javascript:1) <script>1</script> |`a`| **b**\n# c\x1b[2J"


def test_a_card_shows_texts_and_is_not_written_by_them() -> None:
    space = {"model": MARKUP, "model_fingerprint": "f" * 64, "rank": 1, "seed": 0, "task": "x\ninjected: true"}
    manifest = {
        "name": MARKUP,
        "file": {"rows": 2, "name": "core.jsonl\ninjected: true"},
        "dataset": {"name": MARKUP, "instances": 4, "columns_read": {"text": MARKUP}},
        "selection": {"strategy": MARKUP, "command": "repmatch select d --where 'a\n```\n# c'"},
        "space": space,
    }
    text = card_text(manifest, {MARKUP: (1, 2)})
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert not re.search(r"^injected", head, re.M)
    assert "\x1b" not in text
    for line in body.splitlines():
        outside = re.sub(r"`[^`]*`", "", line)  # nothing is markup within a code span
        assert not re.search(r"(?<!\\)[\[\]]", outside), line
        assert "<script" not in line
        assert not line.startswith("# c")
    assert len(re.findall(r"^```", body, re.M)) == 2


def test_an_adapters_card_runs_nothing_of_a_store(tiny_space: Space) -> None:
    quoted = 'x"\nimport os; os.system("boo")  # '
    space = dataclasses.replace(tiny_space, model=quoted)
    adapter = Adapter("id", space.id, MARKUP, "m", {}, {}, {}, {})
    text = _card(adapter, space, ["```\nimport os", MARKUP])
    assert not re.search(r"^import os", text, re.M)
    assert len(re.findall(r"^```", text, re.M)) == 2
    assert "<script" not in text.split("```")[0]


@pytest.fixture
def tiny_space() -> Space:
    return make_space()
