"""Tables as sources: Parquet files and datasets of the hub."""

import datetime
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repmatch.curator.rows import FieldChoice, RowReader, open_rows
from repmatch.datamodels import BadRow, Row
from repmatch.errors import InputError, MissingExtraError, UsageError

LINE = b'{"id": "a", "text": "t", "label": "l"}\n'


def read(path: object, choice: FieldChoice | None = None) -> list[Row | BadRow]:
    return [row for chunk in open_rows([str(path)], choice or FieldChoice()) for row in chunk]


def good(path: object) -> list[Row]:
    rows = read(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row for row in rows if isinstance(row, Row)]


def reasons(rows: list[Row | BadRow]) -> dict[int, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


# ---------------------------------------------------------------------------------------------------- Parquet


def test_parquet_values_become_json(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table(
        {
            "text": ["a", "b"],
            "label": pa.array([1, 0], pa.int8()),
            "score": [0.5, float("nan")],
            "day": [datetime.date(2024, 2, 29), None],
            "at": pa.array([1, None], pa.timestamp("ns")),
            "at_us": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5), None], pa.timestamp("us")),
            "price": pa.array([Decimal("12.50"), Decimal("3.00")], pa.decimal128(6, 2)),
            "exact": pa.array([Decimal("0.1234567890123456789"), None], pa.decimal128(25, 19)),
            "raw": pa.array([b"text", b"\xff\x00"], pa.binary()),
            "took": pa.array([datetime.timedelta(seconds=1.5), None]),
            "tags": [["x", "y"], []],
            "nested": [{"k": 1}, None],
        }
    )
    pq.write_table(table, path)
    first, second = good(path)
    assert json.loads(first.json) == {
        "text": "a",
        "label": 1,
        "score": 0.5,
        "day": "2024-02-29",
        "at": "1970-01-01 00:00:00.000000001",
        "at_us": "2024-01-02T03:04:05",
        "price": 12.5,
        "exact": "0.1234567890123456789",
        "raw": "text",
        "took": 1.5,
        "tags": ["x", "y"],
        "nested": {"k": 1},
    }
    assert list(json.loads(second.json).values()) == [
        "b", 0, None, None, None, None, 3, None, "data:;base64,/wA=", None, [], None,
    ]  # fmt: skip
    assert (first.label, second.line) == ("1", 2)


def test_parquet_rows_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    far = pa.array([0, 4_000_000], pa.date32())
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"], "day": far}), path)
    rows = read(path)
    assert [type(row) for row in rows] == [Row, BadRow]
    assert "a value cannot be read" in reasons(rows)[2]
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"], "n": [float("inf"), 1.0]}), path)
    assert "not finite (inf" in reasons(read(path))[1]


def test_parquet_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": range(2500), "text": ["t"] * 2500, "label": ["l"] * 2500}), path, row_group_size=700)
    rows = good(path)
    assert [row.id for row in rows] == [str(i) for i in range(2500)]
    assert [row.line for row in rows] == list(range(1, 2501))


@pytest.mark.parametrize("content", [b"", b"PAR1", LINE, b"PAR1" + bytes(50) + b"PAR1"])
def test_what_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"in\.parquet.*not readable as Parquet after row 0"):
        read(tmp_path / "in.parquet")


# -------------------------------------------------------------------------------------------------------- hub


class ClassLabel(SimpleNamespace):
    names: list[str]


class Rows(list[dict[str, object]]):
    features = {"label": ClassLabel(names=["neg", "pos"])}  # noqa: RUF012


class BreakingRows(Rows):
    def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        yield {"text": "a", "label": 1}
        raise ConnectionError("reset by peer")


def hub(monkeypatch: pytest.MonkeyPatch, **splits: Rows) -> list[tuple[object, ...]]:
    """Stand in for the `datasets` library; returns the calls it got."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, streaming: bool) -> dict[str, Rows]:
        calls.append((name, config, streaming))
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist on the Hub")
        return splits

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_datasets_are_streamed_with_named_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([{"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": object(), "label": 0}])
    calls = hub(monkeypatch, train=Rows(), test=rows)
    reader: RowReader = open_rows(["hf:org/name@small:test"], FieldChoice())
    first, missing, odd = [row for chunk in reader for row in chunk]
    assert calls == [("org/name", "small", True)]
    assert isinstance(first, Row)
    assert (first.json, first.label, first.source) == ('{"text": "a", "label": "pos"}', "pos", "hf:org/name@small:test")
    assert isinstance(missing, BadRow)
    assert "the label in column 'label' is None" in missing.reason
    assert isinstance(odd, BadRow)
    assert "column 'text' holds a object, which JSON cannot hold" in odd.reason
    again = open_rows(["hf:org/name@small:test"], FieldChoice())
    list(again)
    assert again.input_hash == reader.input_hash


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, only=Rows([{"text": "a", "label": 1}]))
    assert good("hf:name")[0].label == "pos"
    hub(monkeypatch, dev=Rows(), test=Rows())
    with pytest.raises(UsageError, match=r"hf:name': there is no split 'train'; expected one of 'dev', 'test'"):
        read("hf:name")


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=BreakingRows())
    with pytest.raises(InputError, match=r"hf:missing': the dataset cannot be loaded: FileNotFoundError"):
        read("hf:missing")
    with pytest.raises(InputError, match=r"reading stopped after row 1: ConnectionError: reset by peer"):
        read("hf:name")
    with pytest.raises(UsageError, match="does not name a hub dataset"):
        open_rows(["hf:"], FieldChoice())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repmatch\[hub\]'"):
        open_rows(["hf:name"], FieldChoice())
