"""The commands that look after a store, and `nearest` for several ids and under a condition."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import Run
from store_worker import start

import repmatch
from repmatch.store.segment import HEADER_BYTES


def test_delete_compact_verify_repair(run: Run, toy_store: Path, toy_file: Path, tiny_model: Path) -> None:
    at = ("--store", toy_store)
    assert run(*at, "verify").out == "sound\n"
    deleted = run(*at, "delete", "toy", "toy-3", "toy-4", "--json")
    assert deleted.objects == [{"rows": 2, "coresets": []}]
    assert run(*at, "delete", "toy", "--where", "stars = 0").out == "12 instances deleted\n"
    assert "compact" in run(*at, "delete", "toy", "toy-6").err
    done = run(*at, "compact", "--json").objects[0]
    assert (done["moved"], done["segments"]) == (45, 1)
    (segment,) = (toy_store / "segments").glob("*.bin")
    data = bytearray(segment.read_bytes())
    data[HEADER_BYTES + 9] ^= 1
    segment.write_bytes(data)
    found = run(*at, "verify")
    assert found.code == 1
    assert "fail their CRC-32 (45 factors to compute again)" in found.out
    assert "toy: 45 instances need their factors computed again" in found.out
    assert "repmatch repair" in found.err
    assert run(*at, "verify", "--json").objects[0]["factors"] == 45
    repaired = run(*at, "repair")
    assert repaired.code == 0
    assert "45 factors and 0 adapters dropped" in repaired.out
    assert ".damaged" in repaired.out
    assert "repmatch ingest FILE --dataset toy" in repaired.err
    assert run(*at, "verify").out == "sound\n"
    again = run(*at, "ingest", toy_file, "--dataset", "toy", "--model", tiny_model, "--json").objects[0]
    assert (again["new"], again["unchanged"]) == (15, 45)
    with repmatch.open(toy_store) as store:
        assert len(store.factors("toy")) == 60
    assert run(*at, "delete", "toy", "--all").out == "60 instances deleted\n"
    assert run(*at, "info", "--json").objects[0]["store"]["datasets"] == []


def test_delete_says_what_to_name(run: Run, toy_store: Path, tmp_path: Path) -> None:
    for words in ((), ("toy-1", "--all"), ("--where", "true", "--all")):
        result = run("--store", toy_store, "delete", "toy", *words)
        assert result.code == 2
        assert "one of the three" in result.err
    for name in ("compact", "verify", "repair"):
        result = run("--store", tmp_path / "none", name)
        assert result.code == 2
        assert "there is no store" in result.err
        assert not (tmp_path / "none").exists()


def test_a_second_writer_waits_or_is_told(run: Run, toy_store: Path) -> None:
    process = start("hold", toy_store)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        for words in (("compact",), ("delete", "toy", "toy-1", "--wait", "0.2")):
            result = run("--store", toy_store, *words)
            assert result.code == 1
            assert f"process {process.pid}" in result.err
        assert "after waiting 0.2 s" in result.err
        assert run("--store", toy_store, "nearest", "toy", "toy-1", "-k", 1).code == 0
    finally:
        process.kill()
        process.wait()
    assert run("--store", toy_store, "delete", "toy", "toy-1", "--wait", "5").code == 0


def test_nearest_to_several_and_under_a_condition(run: Run, toy_store: Path) -> None:
    at = ("--store", toy_store, "nearest", "toy")
    both = run(*at, "toy-1", "toy-2", "-k", 3, "--json").objects
    assert [(row["query"], row["rank"]) for row in both] == [(f"toy-{i}", rank) for i in (1, 2) for rank in (1, 2, 3)]
    one = run(*at, "toy-2", "-k", 3, "--json").objects
    assert one == [{key: row[key] for key in ("rank", "id", "score")} for row in both[3:]]
    shown = run(*at, "toy-1", "toy-2", "-k", 3).out
    assert shown.count("nearest to toy-") == 2
    some = run(*at, "toy-2", "-k", 60, "--where", "label = 'yes' AND stars > 2", "--json").objects
    assert {str(row["id"]) for row in some} == {f"toy-{i}" for i in range(60) if i % 2 and i % 5 > 2}
    assert run(*at, "toy-1", "toy-2", "--text", "x").code == 2


def test_info_tells_sizes(run: Run, toy_store: Path) -> None:
    store = run("--store", toy_store, "info", "--json").objects[0]["store"]
    assert isinstance(store, dict)
    (encoding,) = store["encodings"]
    assert encoding["factors"] == 60
    assert encoding["bytes"] == 60 * encoding["row_bytes"]
    assert encoding["dead_bytes"] == 0
    assert store["tables"]["instances"]["rows"] == 60
    assert store["tables"]["instances"]["bytes"] > 0
    run("--store", toy_store, "delete", "toy", "toy-0")
    store = run("--store", toy_store, "info", "--json").objects[0]["store"]
    assert isinstance(store, dict)
    assert store["encodings"][0]["dead_bytes"] == encoding["row_bytes"]
    assert "MB dead" in run("--store", toy_store, "info").out


def test_a_lost_catalog_says_how_to_get_it_back(run: Run, toy_store: Path) -> None:
    (toy_store / "catalog.duckdb").unlink()
    result = run("--store", toy_store, "nearest", "toy", "toy-1")
    assert result.code == 1
    assert "repmatch repair" in result.err
    assert run("--store", toy_store, "repair").code == 0
    assert len(run("--store", toy_store, "nearest", "toy", "toy-1", "-k", 4, "--json").objects) == 4


def test_the_documentation_of_the_store_is_true(toy_store: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "store.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for old, new in (
        ('"repmatch-store"', repr(str(toy_store))),
        ('"docs', '"toy'),
        ("id-", "toy-"),
        ("'files'", "'yes'"),
    ):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/store.md", "exec"), {})
    views = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE))
    with repmatch.open(toy_store, mode="r") as store:
        found = store.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal")["view_name"].to_list()
        assert sorted(views) == sorted(found)
        for name, listed in views.items():
            columns = [re.sub(r"[(:].*", "", word).strip() for word in re.sub(r"\(.*?\)", "", listed).split(", ")]
            assert [c.split(":")[0] for c in columns] == store.sql(f"SELECT * FROM {name} LIMIT 0").columns, name


def test_info_tells_spaces_apart() -> None:
    from repmatch.curator.overview import _spaces

    steps = {"name": "adamw", "lr": 0.001, "eps": 1e-8}
    one: dict[str, object] = {
        **{"id": "a" * 32, "model": "m", "task": "masked-lm", "rank": 1, "matrices": ["q"], "max_length": 9, "seed": 0},
        **{"optimizer": steps, "warm_start": None, "alpha": 4.0, "template": "t"},
        **{"model_fingerprint": "1" * 64, "tokenizer_fingerprint": "2" * 64},
    }
    usual = ["space", "model", "task", "rank", "matrices", "max length", "seed", "step", "start"]
    changes: list[tuple[dict[str, object], list[str], list[object]]] = [
        ({"task": "causal-lm"}, [], ["bbbbbbbb", "m", "causal-lm", 1, 1, 9, 0, "adamw 0.001", "cold"]),
        ({"optimizer": {"name": "sgd", "lr": 0.1, "steps": 5}}, [], ["sgd 0.1 x5", "cold"]),
        ({"warm_start": "c" * 32}, [], ["adamw 0.001", "warm cccccccc"]),
        ({"matrices": ["v"]}, ["names"], ["cold", "v"]),
        ({"optimizer": 3, "model": ["x"]}, [], [0, "3", "cold"]),  # a store of another's may hold anything
        ({"alpha": 8.0, "template": "u"}, ["alpha", "template"], ["cold", 8.0, "u"]),
        ({"model_fingerprint": "3" * 64}, ["weights"], ["cold", "33333333"]),
    ]
    for change, more, last in changes:
        header, (first, second) = _spaces([one, {**one, "id": "b" * 32, **change}])
        assert header == usual + more
        assert second[-len(last) :] == last
        assert first[1:] != second[1:]


def test_info_shows_task_step_and_start(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "info")
    (line,) = [line for line in result.out.splitlines() if "sequence-classification" in line]
    assert line.split()[-3:] == ["adamw", "0.001", "cold"]
    (space,) = run("--store", toy_store, "info", "--json").objects[0]["store"]["spaces"]  # type: ignore[index]
    assert (space["task"], space["optimizer"]["name"], space["template"][:9]) == (
        "sequence-classification",
        "adamw",
        "tokenizer",
    )
