"""SIGKILL at random moments of a real ingest: nothing committed is lost, and the end is that of a quiet run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_rows, write_rows

import repmatch

ROWS, WINDOW, KILLS = 160, 16, 20
PRELOAD = [  # imported once: what is killed is an ingest at work, not an import
    *("torch", "duckdb", "polars", "pyarrow", "peft", "transformers.models.bert.modeling_bert"),
    *("transformers.models.auto.modeling_auto", "repmatch.curator.workbench", "repmatch.curator.engine"),
]


def ingest(store: str, file: str, model: str) -> None:
    """Ingest in small windows, so that there are many commits to be killed between."""
    import torch

    from repmatch.curator import windows as module

    torch.set_num_threads(1)
    module._WINDOW_ROWS = (WINDOW, WINDOW)
    with repmatch.open(store) as opened:
        repmatch.Curator(opened, model).ingest(file, "toy")


def start(context: ForkServerContext, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = context.Process(target=ingest, args=tuple(map(str, arguments)))
    process.start()
    return process


def content(path: Path) -> tuple[list[str], dict[str, bytes], list[str]]:
    """Return ids in order, each stored instance's factor bytes, and the rows as they came."""
    with repmatch.open(path, mode="r") as store:
        assert store.verify() == []
        if not store.has_dataset("toy"):
            return [], {}, []
        ids, factors = store.ids("toy"), store.factors("toy")
        assert factors.flat is not None
        values = {name: np.asarray(row).tobytes() for name, row in zip(factors.ids, factors.flat, strict=True)}
        return ids, values, list(store.rows("toy"))


@pytest.mark.timeout(240)
def test_twenty_kills_of_an_ingest_lose_nothing(tmp_path: Path, tiny_model: Path) -> None:
    file = write_rows(tmp_path / "toy.jsonl", toy_rows(ROWS))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for name in ("first", "quiet"):  # the first one also starts the server that the others are forked from
        began = time.monotonic()
        quiet = start(context, tmp_path / name, file, tiny_model)
        quiet.join()
        seconds = time.monotonic() - began
        assert quiet.exitcode == 0
    ids, values, rows = content(tmp_path / "quiet")
    assert len(ids) == len(values) == ROWS

    generator = random.Random(5)
    killed = partial = finished = 0
    path, before = tmp_path / "store-0", 0
    while killed < KILLS:
        process = start(context, path, file, tiny_model)
        process.join(timeout=generator.uniform(0.1, 0.7) * seconds)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            killed += 1
        else:
            assert process.exitcode == 0
        if not (path / "catalog.duckdb").exists():
            continue  # killed before there was a store
        _, found, _ = content(path)
        assert found.items() <= values.items()
        assert len(found) >= before
        assert len(found) % WINDOW == 0
        partial += 0 < len(found) < ROWS
        before = len(found)
        if before == ROWS:
            finished, before = finished + 1, 0
            assert content(path) == (ids, values, rows)
            path = tmp_path / f"store-{finished}"
    assert partial >= KILLS // 4, "the kills came too early or too late to test anything"
    last = start(context, path, file, tiny_model)
    last.join()
    assert last.exitcode == 0
    assert content(path) == (ids, values, rows)
