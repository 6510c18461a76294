"""Stores and checkpoints that were made to do harm: nothing outside is read, written or run, nothing takes for ever."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from conftest import Run
from safetensors.numpy import save_file
from store_worker import filled, make_batch, make_rows

from repmatch import store as stores
from repmatch.curator.lora import CONFIG, WEIGHTS, read_lora
from repmatch.errors import InputError, RepMatchError, StoreCorruptError
from repmatch.store import journal
from repmatch.store.journal import Journal, pack_frame
from repmatch.store.segment import HEADER_BYTES, MAGIC, SegmentFile

SECRET = b"not a word of this\n" * 4000
CATALOG = "catalog.duckdb"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of six instances."""
    filled(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize(
    "name",
    [
        *("store.lock", "turn.lock", f"{CATALOG}.wal", "catalog.rebuilt.duckdb", "segments/000001.bin"),
        *("segments/000001.journal", "segments/000002.bin", "adapters/x.safetensors", "adapters/x.safetensors.tmp"),
        *("staging/x.lock", "segments", "adapters", "staging", "cache", "cache/x.f32"),
    ],
)
def test_a_link_in_a_store_leads_nowhere(run: Run, path: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    target = path / name
    if target.is_dir():
        shutil.move(target, outside)
    else:
        outside.write_bytes(SECRET)
        target.unlink(missing_ok=True)
        target.parent.mkdir(exist_ok=True)
    before = sorted((str(p), p.read_bytes()) for p in (outside.rglob("*") if outside.is_dir() else [outside]))
    target.symlink_to(outside)
    for command in (["info"], ["compact"], ["verify"], ["repair"], ["export", "d", "-o", tmp_path / "out.jsonl"]):
        refused = run("--store", path, *command)
        assert refused.code == 1, command
        assert "is a link" in refused.err
        assert "Traceback" not in refused.err
    after = sorted((str(p), p.read_bytes()) for p in (outside.rglob("*") if outside.is_dir() else [outside]))
    assert after == before


def test_a_link_that_comes_later_is_not_written_through(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    store = stores.open(path)
    (path / "store.lock").unlink()
    (path / "store.lock").symlink_to(outside)
    with pytest.raises(StoreCorruptError, match="is a link"), store.writing():
        pass
    assert outside.read_bytes() == SECRET


def test_a_pipe_does_not_hang_a_reader(path: Path) -> None:
    os.mkfifo(path / "segments" / "000009.bin")
    with pytest.raises(StoreCorruptError, match="no plain file"):
        stores.open(path)


def test_the_folder_of_a_store_may_be_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(path)
    with stores.open(tmp_path / "elsewhere", mode="w") as store:
        assert len(store.ids("d")) == 6


def catalog(path: Path, *statements: str) -> None:
    with duckdb.connect(str(path / CATALOG)) as conn:
        for statement in statements:
            conn.execute(statement)


def test_views_in_place_of_tables_and_macros_are_not_run(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    reads = f"SELECT 'k' AS key, content AS value FROM read_text('{tmp_path / 'secret'}')"
    tricks = {
        "a": ["ALTER TABLE registry.coresets RENAME TO old", f"CREATE VIEW registry.coresets AS {reads}"],
        "b": ["CREATE MACRO count(x) AS 7"],
        "c": [f"CREATE MACRO main.latest() AS TABLE {reads}"],
        "d": ["CREATE SCHEMA other", f"CREATE VIEW other.instances AS {reads}"],
    }
    for name, statements in tricks.items():
        other = shutil.copytree(path, tmp_path / name)
        catalog(other, *statements)
        for command in (["info"], ["compact"], ["export", "d", "-o", tmp_path / "out.jsonl"], ["sql", "SELECT 1"]):
            refused = run("--store", other, *command)
            assert refused.code == 1, (name, command)
            assert "what no version of repmatch puts there" in refused.err
            assert "not a word of this" not in refused.out + refused.err


def test_a_trigger_is_not_run(path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(path, tmp_path / "other")  # this process has looked at the first one already
    try:
        insert = "INSERT INTO registry.copied VALUES ('x')"
        catalog(
            other,
            "CREATE TABLE registry.copied (a VARCHAR)",
            f"CREATE TRIGGER t AFTER INSERT ON registry.runs FOR EACH STATEMENT {insert}",
        )
    except duckdb.Error as error:
        pytest.skip(f"this DuckDB has no triggers: {error}")
    with pytest.raises(StoreCorruptError, match="trigger"):
        stores.open(other, mode="w")


def test_a_documented_view_that_reads_files_reads_none(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    catalog(
        path,
        "DROP VIEW main.coresets",
        f"CREATE VIEW main.coresets AS SELECT content FROM read_text('{tmp_path / 'secret'}')",
    )
    for command in (["sql", "SELECT * FROM coresets"], ["info"], ["export", "d", "-o", tmp_path / "out.jsonl"]):
        shown = run("--store", path, *command)
        assert "not a word of this" not in shown.out + shown.err
        assert "Traceback" not in shown.err
    assert b"not a word" not in (tmp_path / "out.jsonl").read_bytes()


NONSENSE = [
    "UPDATE registry.segments SET row_bytes = 0",
    "UPDATE registry.segments SET row_bytes = 4611686018427387904",
    "UPDATE registry.segments SET pk = -1",
    "UPDATE registry.batches SET count = 4611686018427387904",
    "UPDATE registry.batches SET first = -5",
    "UPDATE registry.factors SET row = -1",
    "UPDATE registry.factors SET row = 4611686018427387904",
    "UPDATE registry.spaces SET json = '[]'",
    "UPDATE registry.spaces SET json = '{\"model\": 1}'",
    "UPDATE registry.spaces SET json = replace(json, '70', '70000000000')",
    "UPDATE registry.spaces SET json = repeat('[', 100000)",
    "UPDATE registry.datasets SET fields = 'x'",
    "UPDATE registry.datasets SET labels = '{}'",
    "UPDATE registry.datasets SET columns = '[1]'",
    "UPDATE registry.datasets SET encoding = '../../x'",
    "UPDATE registry.datasets SET name = '../../x'",
    "UPDATE registry.instances SET id = NULL",
    "DELETE FROM registry.meta",
    "INSERT INTO registry.meta VALUES ('schema', 'x')",
    "DROP TABLE registry.picks",
    "ALTER TABLE registry.factors ALTER row TYPE VARCHAR",
    "ALTER TABLE registry.factors DROP row",
    "INSERT INTO registry.adapters VALUES (1, '../../x', 's', 'd', '', '{}', '{}', 'x', 1, now()::TIMESTAMP)",
    "INSERT INTO registry.runs VALUES (1, 'merge', '[]', now()::TIMESTAMP, now()::TIMESTAMP, 'ok', '1', "
    '\'{"shards": [{"dataset": "d", "input": "x", "number": 1, "of": 1000000000000, "tokens": 1}]}\', 1, \'h\')',
]
QUICK = [statement for statement in NONSENSE if "row = -1" in statement or "labels" in statement or '"of"' in statement]


def spoilt(run: Run, path: Path, tmp_path: Path, statement: str) -> None:
    """Spoil a catalog; every command says what is wrong or does its work."""
    try:
        catalog(path, statement)
    except duckdb.ConstraintException:
        return  # DuckDB itself refuses to hold it
    began = time.monotonic()
    for command in (
        *(["info"], ["verify"], ["sql", "SELECT * FROM instances"], ["export", "d", "-o", tmp_path / "out.jsonl"]),
        *(["nearest", "d", "r1", "-k", "2"], ["merge", tmp_path / "merged", path], ["compact"], ["repair"]),
    ):
        done = run("--store", path, *command)
        assert done.code in (0, 1, 2), command
        assert "defect of repmatch" not in done.err, (command, done.err)
    assert time.monotonic() - began < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # 8 GiB: a blow-up of any of these is far more


@pytest.mark.parametrize("statement", QUICK)
def test_a_catalog_of_nonsense(run: Run, path: Path, tmp_path: Path, statement: str) -> None:
    spoilt(run, path, tmp_path, statement)


@pytest.mark.slow
@pytest.mark.parametrize("statement", [statement for statement in NONSENSE if statement not in QUICK])
def test_more_catalogs_of_nonsense(run: Run, path: Path, tmp_path: Path, statement: str) -> None:
    spoilt(run, path, tmp_path, statement)


HEADER = {"store": "u", "number": 7, "space_id": "s", "encoding": "float32", "row_bytes": 4}


def header(value: object) -> bytes:
    body = json.dumps(value).encode()
    return (MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body).ljust(
        HEADER_BYTES, b"\0"
    )


@pytest.mark.parametrize(
    "value",
    [
        *([], {}, 1, {"store": 1, "number": 1, "space_id": "s", "encoding": "float32", "row_bytes": 4}),
        *(
            {"store": "u", "number": 7, "space_id": "s", "encoding": "float32", "row_bytes": size}
            for size in (0, -1, 1 << 62)
        ),
        {"store": "u", "number": "../7", "space_id": "s", "encoding": "float32", "row_bytes": 4},
    ],
)
def test_headers_of_nonsense(path: Path, value: object) -> None:
    (path / "segments" / "000007.bin").write_bytes(header(value) + b"x" * 100)
    with stores.open(path, mode="w") as store:  # set aside as a stranger's
        assert len(store.ids("d")) == 6
    first = path / "segments" / "000001.bin"
    first.write_bytes(header(value) + first.read_bytes()[HEADER_BYTES:])
    with stores.open(path) as store:
        assert store.verify()
        assert store.repair().left == ()
        assert len(store.factors("d")) == 6


def test_a_header_that_claims_four_gigabytes(path: Path) -> None:
    block = MAGIC + b"\xff" * 8 + b"x" * 5000
    (path / "segments" / "000001.bin").write_bytes(block)
    with pytest.raises(StoreCorruptError):
        SegmentFile(path / "segments", 1, 8).header()


SOUND = {"id": "x", "space_id": "s", "subset": "d", "members": "m", "recipe": {}, "record": {}}
ORDER = {"a": ["m"], "b": ["m"], "full": []}


@pytest.mark.parametrize(
    "about",
    [
        *("3", "[]", "null", '"x"', "", "[" * 100_000, "{}"),
        json.dumps(SOUND),
        *(json.dumps({**SOUND, "order": order}) for order in (3, [], "m", {"a": 5}, {"a": [["m"]]}, {"a": ["n"]})),
        json.dumps({**SOUND, "order": {"a": ["m"]}}),
        *(json.dumps({**SOUND, "order": ORDER, **more}) for more in ({"id": 5}, {"recipe": [1]}, {"record": "x"})),
        json.dumps({**SOUND, "order": {"a": ["m"], "b": ["m"], "full": ["h"]}}),
        json.dumps({**SOUND, "order": {"a": ["wide"], "b": ["wide"]}}),
        json.dumps({**SOUND, "order": ORDER, "more": 1}),
        json.dumps({**SOUND, "order": ORDER, "id": "y"}),
    ],
    ids=range(22),
)
def test_adapter_files_of_nonsense_are_not_entered(path: Path, run: Run, about: str) -> None:
    part = np.ones((1, 2), np.float32)
    tensors = {"A/m": part, "B/m": part.T.copy(), "A/wide": part, "B/wide": part, "full/h": part.astype(np.float64)}
    (path / "adapters").mkdir(exist_ok=True)
    save_file(tensors, path / "adapters" / "x.safetensors", metadata={"repmatch": about})
    for command in (["info"], ["verify"], ["repair"], ["adapter", "list"]):
        shown = run("--store", path, *command)
        assert "Traceback" not in shown.err
        assert "defect of repmatch" not in shown.err
    with stores.open(path, mode="w") as store:
        assert len(store.ids("d")) == 6
        assert len(store.adapters()) == 0


BAD_BATCHES: list[Callable[[dict[str, Any]], Any]] = [
    lambda value: {},
    lambda value: {**value, "rows": 5},
    lambda value: {**value, "rows": [[1] * 9]},
    lambda value: {**value, "rows": value["rows"] * 2},
    lambda value: {**value, "losses": []},
    lambda value: {**value, "losses": ["x"] * 3},
    lambda value: {**value, "tokens": [1 << 40] * 3},
    lambda value: {**value, "number": "x"},
    lambda value: {**value, "number": 1 << 80},
    lambda value: {**value, "dataset": {"name": "d"}},
    lambda value: {**value, "dataset": [1]},
    lambda value: {**value, "dataset": {**value["dataset"], "encoding": "none"}},
    lambda value: {**value, "more": 1},
]


@pytest.mark.parametrize("spoil", BAD_BATCHES)
def test_a_journal_of_nonsense_is_not_entered(path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    file = Journal(path / "segments" / "000001.journal")
    frames = list(file.frames())
    with stores.open(path) as store:  # a third batch, of which the catalog then knows nothing
        space = store.space(str(store.dataset("d").space_id))
        store.append("d", space.id, "float32", make_batch(make_rows(6, 7, 8), space))
    value = list(file.frames())[-1][1]
    catalog(path, "DELETE FROM registry.batches WHERE pk = 3", "DELETE FROM registry.factors WHERE row > 5",
            "DELETE FROM registry.instances WHERE pk > 6")  # fmt: skip
    file.truncate(frames[-1][0])
    file.write(frames[-1][0], pack_frame(spoil(value)))
    with stores.open(path, mode="w") as store:
        assert len(store.ids("d")) == 6
        assert store.verify() == []


def test_a_frame_that_unpacks_without_end_is_not_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_FRAME", 1 << 20)
    body = zlib.compress(b'{"a": "' + b"x" * (300 << 20) + b'"}', 9)
    file = Journal(path / "segments" / "000001.journal")
    end = file.size()
    file.write(end, b"RPMJ" + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body)
    del body
    tracemalloc.start()
    try:
        assert list(file.frames(end)) == []
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_batch_too_large_for_a_frame_is_refused_before_anything_is_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_FRAME", 1000)
    with stores.open(path) as store:
        space = store.space(str(store.dataset("d").space_id))
        with pytest.raises(RepMatchError, match="Append fewer at once"):
            store.append("d", space.id, "float32", make_batch(make_rows(*range(10, 40)), space))
        assert len(store.ids("d")) == 6
        assert store.verify() == []


def checkpoint(folder: Path, config: object, alpha: float | None = None) -> Path:
    folder.mkdir()
    name = "base_model.model.layer.0.query"
    tensors = {f"{name}.lora_A.weight": np.ones((2, 8), "f4"), f"{name}.lora_B.weight": np.ones((8, 2), "f4")}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.array(alpha, "f4")
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        *({"lora_alpha": value} for value in ("x", [1], {}, True, 1e300)),
        *({"alpha_pattern": {key: 1}} for key in ("(", "(a+)+$", "(.*.*.*.*.*.*)x", "(?P<a>.)", "x{1,99999999999}")),
        *({"alpha_pattern": value} for value in (["x"], "x", 1)),
        *("[" * 100_000, "[]", "1", '{"lora_alpha": NaN}', '{"peft_type": [1]}', "\x00"),
    ],
)
def test_configs_of_nonsense(tmp_path: Path, config: object) -> None:
    began = time.monotonic()
    with pytest.raises(InputError):
        read_lora(checkpoint(tmp_path / "c", config))
    assert time.monotonic() - began < 10


def test_an_alpha_of_nonsense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a number"):
        read_lora(checkpoint(tmp_path / "c", {}, float("nan")))


def test_patterns_that_peft_writes_are_still_read(tmp_path: Path) -> None:
    lora = read_lora(checkpoint(tmp_path / "c", {"lora_alpha": 4, "alpha_pattern": {r"layer\.\d+\.query": 16}}))
    assert lora.layers["layer.0.query"].scale == 8


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text", ["", "[", "[]", "3", "[" * 100_000, "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_models_of_nonsense(run: Run, tmp_path: Path, tiny_model: Path, name: str, text: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / name).write_text(text, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "text": "a film", "label": i}) + "\n" for i in "ab"), encoding="utf-8")
    shown = run("--store", tmp_path / "s", "ingest", rows, "--dataset", "d", "--model", model)
    assert shown.code == 1
    assert str(model) in shown.err
    assert "defect of repmatch" not in shown.err
