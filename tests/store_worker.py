"""Small literal data for the store's tests, and a process that writes until it is killed.

python store_worker.py append STORE BATCHES   appends batches, prints the number of each when it is committed
python store_worker.py hold STORE             takes the writer's lock, says so, waits for its end
python store_worker.py read STORE SECONDS     reads ids and factors again and again, prints how often
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import repmatch
from repmatch import store as stores
from repmatch.datamodels import Dataset, Encoding, FactorBatch, Fields, Matrix, Row, Space, digest

COLUMNS = {"id": "string", "text": "string", "label": "string", "n": "number"}


def make_space(rank: int = 1, dims: Sequence[int] = (70, 64), seed: int = 0) -> Space:
    matrices = tuple(Matrix(f"layer.{i}", d, 8) for i, d in enumerate(dims))
    return Space("model", "f" * 64, "t" * 64, "sequence-classification", "x", 16, rank, 4.0, seed, matrices, {"k": 1})


def make_row(ident: str, text: str | None = None, label: str = "a", line: int = 1, **more: Any) -> Row:
    record = {"id": ident, "text": text if text is not None else f"text of {ident[:50]}", "label": label, **more}
    raw = json.dumps(record, ensure_ascii=False)
    task = digest([record["text"], None, label])
    return Row(ident, raw, record["text"], None, label, digest(record), task, "rows.jsonl", line)


def make_rows(*numbers: int, **more: Any) -> list[Row]:
    return [make_row(f"r{n}", line=n + 1, n=n, **more) for n in numbers]


def values_of(row: Row, space: Space) -> np.ndarray:
    """Return unit columns that depend on the row's id and task alone."""
    seed = int(digest([row.id, row.task_hash]), 16) % 2**63
    out = np.random.default_rng(seed).standard_normal(space.layout.width).astype(np.float32)
    for lo, hi in zip(space.layout.offsets, space.layout.offsets[1:], strict=False):
        block = out[lo:hi].reshape(-1, space.layout.rank)
        block /= np.linalg.norm(block, axis=0)
    return out


def make_batch(rows: Sequence[Row], space: Space) -> FactorBatch:
    n, m, r = len(rows), len(space.matrices), space.rank
    values = np.stack([values_of(row, space) for row in rows]) if rows else np.zeros((0, space.layout.width), "f4")
    cores = None if r == 1 else np.arange(n * m * r * r, dtype=np.float32).reshape(n, m, r, r)
    norms = np.arange(1, n * m + 1, dtype=np.float32).reshape(n, m)
    floats = np.linspace(0.5, 1.0, n).astype(np.float32)
    return FactorBatch(tuple(rows), values, cores, norms, floats, np.full(n, 7, np.int32), np.arange(n) % 2 == 0)


def make_dataset(space: Space, name: str = "d", encoding: Encoding = "float32", **more: Any) -> Dataset:
    return Dataset(
        name, Fields("id", "text", None, "label"), ("a", "b"), more.get("columns", COLUMNS), space.id, encoding
    )


def prepare(store: stores.Store, space: Space, encoding: Encoding = "float32", name: str = "d", **more: Any) -> None:
    store.save_space(space)
    store.save_dataset(make_dataset(space, name, encoding, **more))


def filled(path: Path, count: int = 6, batch: int = 3, encoding: Encoding = "float32") -> tuple[stores.Store, Space]:
    """Return a store of `count` rows in batches."""
    store, space = stores.open(path), make_space()
    with store.writing():
        prepare(store, space, encoding)
        for lo in range(0, count, batch):
            rows = make_rows(*range(lo, min(count, lo + batch)))
            store.append("d", space.id, encoding, make_batch(rows, space))
    return store, space


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start this file in another process."""
    root = Path(repmatch.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def _append(path: str, batches: int) -> None:
    space = make_space()
    with stores.open(path) as store, store.writing():
        prepare(store, space)
        start_at = len(store.ids("d"))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for i in range(batches):
            rows = make_rows(*range(start_at + i * 20, start_at + i * 20 + 20))
            store.append("d", space.id, "float32", make_batch(rows, space))
            sys.stdout.write(f"{start_at + i * 20 + 20}\n")
            sys.stdout.flush()


def _hold(path: str) -> None:
    with stores.open(path, mode="w"):
        sys.stdout.write("holding\n")
        sys.stdout.flush()
        time.sleep(60)


def _read(path: str, seconds: float) -> None:
    times, deadline = 0, time.monotonic() + seconds
    with stores.open(path, mode="r") as store:
        while time.monotonic() < deadline:
            ids = store.ids("d")
            factors = store.factors("d", ids=ids[:50])
            assert np.isfinite(factors.norms).all()
            assert factors.ids == tuple(ids[:50])
            times += 1
    sys.stdout.write(f"{times}\n")


if __name__ == "__main__":
    if sys.argv[1] == "append":
        _append(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "hold":
        _hold(sys.argv[2])
    else:
        _read(sys.argv[2], float(sys.argv[3]))
