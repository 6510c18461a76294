"""What is fuzzed: each target takes bytes and may raise what a user is told, nothing else."""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import click
import duckdb
import numpy as np
from store_worker import filled, make_space

from repmatch import store as stores
from repmatch.cli import cli
from repmatch.config import VARIABLE, read_config
from repmatch.curator.lora import CONFIG, WEIGHTS, as_adapter, read_lora
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.errors import RepMatchError
from repmatch.store.adapter_file import parse_adapter
from repmatch.store.catalog import Catalog
from repmatch.store.journal import MAGIC, BatchEntry, Journal
from repmatch.store.records import dataset_of, space_of, stored_object
from repmatch.store.segment import HEADER_BYTES, SegmentHeader
from repmatch.store.segment import MAGIC as SEGMENT

Target = Callable[[bytes, Path], object]
ROW = b'{"id": "a", "text": "one", "label": "x", "n": 1.5, "deep": {"a": [null, true]}}\n'
HEADER = SegmentHeader("u" * 32, 1, "s" * 32, "float32", 64)


@cache
def place() -> Path:
    """Where targets write what they read, one folder a process."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def run(target: Target, data: bytes) -> None:
    """Give bytes to a target.

    Args:
        target: one of `TARGETS`.
        data: the bytes.
    """
    with suppress(RepMatchError, click.ClickException):
        target(data, place())


def _rows(kind: str) -> Target:
    def target(data: bytes, folder: Path) -> None:
        file = folder / f"rows.{kind}"
        file.write_bytes(data)
        for chunk in open_rows([str(file)], FieldChoice()):
            assert chunk

    return target


def _toml(data: bytes, folder: Path) -> None:
    file = folder / "repmatch.toml"
    file.write_bytes(data)
    os.environ[VARIABLE] = str(file)
    try:
        defaults = read_config(cli)
        with click.Context(cli, default_map=defaults.get("select", {})) as context:
            cli.commands["select"].make_context("select", ["d", "-k", "1"], parent=context)
    finally:
        del os.environ[VARIABLE]


class OpenCatalog(Catalog):
    """A catalog that stays open: to open it takes a hundred times as long as what is asked of it here."""

    _open: Any = None

    @contextmanager
    def reading(self) -> Iterator[Any]:
        with self.guarded() as conn:
            yield conn

    @contextmanager
    def guarded(self) -> Iterator[Any]:
        if self._open is None:
            self._open = self._connect(read_only=True)
            self._check(self._open, write=False)
            self._open.execute("SET lock_configuration = true")
        try:
            yield self._open
        except RepMatchError as error:
            if isinstance(error.__cause__, (duckdb.FatalException, duckdb.InternalException)):
                self._open = None  # of no use after these
            raise


@cache
def _store() -> stores.Store:
    store, _ = filled(place() / "store")
    store._catalog = OpenCatalog(store.path)
    return store


def _where(data: bytes, _: Path) -> None:
    _store().ids("d", where=data.decode("utf-8", "replace"))


def _sql(data: bytes, _: Path) -> None:
    _store().sql(data.decode("utf-8", "replace"))


def _checkpoint(data: bytes, folder: Path) -> None:
    """The config up to the first NUL, then the weights."""
    config, _, weights = data.partition(b"\0")
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    as_adapter(read_lora(folder), "x", make_space())


def _adapter(data: bytes, folder: Path) -> None:
    """The bytes as a file; then as what a sound file says of itself."""
    from safetensors.numpy import save

    part = np.ones((1, 2), "f4")
    about = {"repmatch": data.decode("utf-8", "replace")}
    for content in (data, save({"A/m": part, "B/m": part.T.copy(), "full/h": part}, metadata=about)):
        with suppress(RepMatchError):
            parse_adapter(content, folder / "x.safetensors")


def _header(data: bytes, folder: Path) -> None:
    body = data[16:].rstrip(b"\0")[: HEADER_BYTES - 16]
    head = SEGMENT + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")
    SegmentHeader.from_bytes((head + body).ljust(HEADER_BYTES, b"\0"), folder)
    SegmentHeader.from_bytes(data, folder)


def _journal(data: bytes, folder: Path) -> None:
    """The bytes as a file; then as what a sound frame packs."""
    body = zlib.compress(data, 1)
    packed = MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body
    for content in (data, packed):
        file = folder / "000001.journal"
        file.write_bytes(content)
        for _, value in Journal(file).frames():
            try:
                entry = BatchEntry.from_value(value)
            except ValueError:  # what recovery takes for damage
                continue
            dataset_of(entry.dataset)
        Journal(file).torn(0)


def _records(data: bytes, _: Path) -> None:
    text = data.decode("utf-8", "replace")
    for read in (space_of, lambda text: dataset_of(stored_object(text, "a record"))):
        try:
            read(text)
        except RepMatchError:
            continue


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["one", "two"], "label": ["x", "y"], "n": [1, None]}), out)
    return out.getvalue()


def _lora() -> bytes:
    from safetensors.numpy import save

    name = "base_model.model.layer.0"
    tensors = {f"{name}.lora_A.weight": np.ones((1, 8), "f4"), f"{name}.lora_B.weight": np.ones((70, 1), "f4")}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 4, "alpha_pattern": {"layer.0": 8}}
    return json.dumps(config).encode() + b"\0" + save({**tensors, f"{name}.alpha": np.array(1.0, "f4")})


def _stored_adapter() -> bytes:
    from repmatch.datamodels import Adapter
    from repmatch.store.adapter_file import adapter_bytes

    a, b = {"m": np.ones((1, 2), "f4")}, {"m": np.ones((2, 1), "f4")}
    return adapter_bytes(Adapter("id", "space", "d", "members", {"lr": 1}, {"losses": [1.0]}, a, b))


_ABOUT = {"id": "i", "space_id": "s", "subset": "d", "members": "m", "recipe": {}, "record": {"losses": [1.0]}}
_ORDER = {"a": ["m"], "b": ["m"], "full": ["h"]}


def _batch() -> bytes:
    row = ["a", '{"id":"a"}', "one", None, "x", "h", "t", "rows.jsonl", 1]
    fields = {
        "id_field": "id",
        "text_field": "text",
        "text_pair_field": None,
        "label_field": "label",
        "form": "classes",
    }
    dataset = {"name": "d", "fields": fields, "labels": ["x"], "columns": {"id": "string"}, "space_id": "s"}
    value = {"number": 1, "first": 0, "crc32": 5, "dataset": {**dataset, "encoding": "float32"}, "rows": [row]}
    return json.dumps({**value, "losses": [0.5], "tokens": [3], "truncated": [False]}).encode()


_TOML = [b'model = "x"\n[select]\nk = "5%"\nbalance = "label"\nseed = 3\n', b"[study.field]\nk = 1\n"]
_WHERE = [b"label = 'a' AND n > 2", b"EXISTS (SELECT 1)", b"json_extract(text, '$.a') IS NULL"]
_SQL = [b"SELECT id, json->>'n' FROM instances WHERE label = 'a' ORDER BY 1", b"WITH a AS (SELECT 1) FROM a"]
TARGETS: dict[str, tuple[Target, Callable[[], list[bytes]]]] = {
    "jsonl": (_rows("jsonl"), lambda: [ROW * 3, b"\xef\xbb\xbf" + ROW, b'{"id": 1, "text": "\\ud800"}\n']),
    "json": (_rows("json"), lambda: [b"[" + ROW.strip() + b", " + ROW.strip() + b"]"]),
    "csv": (_rows("csv"), lambda: [b'id,text,label\na,"one, ""two""",x\nb,"a\nb",y\n']),
    "tsv": (_rows("tsv"), lambda: [b"id\ttext\tlabel\na\tone\tx\n"]),
    "gz": (_rows("jsonl.gz"), lambda: [gzip.compress(ROW * 3, mtime=0)]),
    "parquet": (_rows("parquet"), lambda: [_parquet()]),
    "toml": (_toml, lambda: _TOML),
    "where": (_where, lambda: _WHERE),
    "sql": (_sql, lambda: _SQL),
    "checkpoint": (_checkpoint, lambda: [_lora()]),
    "adapter": (_adapter, lambda: [_stored_adapter(), json.dumps({**_ABOUT, "order": _ORDER}).encode()]),
    "header": (_header, lambda: [HEADER.to_bytes(), HEADER.to_bytes().rstrip(b"\0")]),
    "journal": (_journal, lambda: [_batch(), b'{"segment": 1, "space": "{}", "encoding": "sign"}']),
    "records": (_records, lambda: [make_space().to_json().encode(), _batch()]),
}
"""Name -> (target, sound inputs to begin with; the first one is accepted)."""
