"""SIGKILL at random moments of a real ingest: nothing committed is lost, and the end is that of a quiet run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.sharedctypes import Synchronized
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


def ingest(computed: Synchronized[int], store: str, file: str, model: str) -> None:
    """Ingest in small windows, so that there are many commits to be killed between."""
    import torch

    from repmatch.curator import windows as module

    def tell(stage: str, done: int, _: int | None) -> None:
        if stage == "factors":
            computed.value = done

    torch.set_num_threads(1)
    module._WINDOW_ROWS = (WINDOW, WINDOW)
    with repmatch.open(store) as opened:
        repmatch.Curator(opened, model, progress=tell).ingest(file, "toy")


@dataclass(frozen=True)
class Ingest:
    """An ingest in a process of its own.

    Attributes:
        process: the process.
        computed: rows whose factors it has computed; -1 until it begins with them.
    """

    process: multiprocessing.process.BaseProcess
    computed: Synchronized[int]

    @classmethod
    def start(cls, context: ForkServerContext, *arguments: object) -> Ingest:
        computed = context.Value("i", -1)
        process = context.Process(target=ingest, args=(computed, *map(str, arguments)))
        process.start()
        return cls(process, computed)

    def wait(self, rows: int, seconds: float) -> None:
        """Wait until it has computed so many rows, however long that takes, and then for some time more."""
        while self.process.is_alive() and self.computed.value < rows:
            time.sleep(0.001)
        self.process.join(timeout=seconds)

    def finish(self) -> None:
        self.process.join()
        assert self.process.exitcode == 0


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
        Ingest.start(context, tmp_path / name, file, tiny_model).finish()
        seconds = time.monotonic() - began
    ids, values, rows = content(tmp_path / "quiet")
    assert len(ids) == len(values) == ROWS

    generator = random.Random(5)
    killed = partial = finished = 0
    path, before = tmp_path / "store-0", 0
    while killed < KILLS:
        at_work = Ingest.start(context, path, file, tiny_model)
        # Told by what it has done, not by the clock, which runs on when others use the cores; only the moment within a
        # window is. One in four is killed earlier: while it opens the store, reads, or loads the model.
        left = ROWS - before
        target = generator.randrange(0, left, WINDOW // 2) if generator.random() < 0.75 else -1
        at_work.wait(target, generator.uniform(0, 0.5 if target < 0 else 1.5 * WINDOW / ROWS) * seconds)
        if at_work.process.is_alive():
            os.kill(at_work.process.pid or 0, signal.SIGKILL)
            at_work.process.join()
        assert at_work.process.exitcode in (0, -signal.SIGKILL)  # it may have ended on its own just then
        killed += at_work.process.exitcode != 0
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
    Ingest.start(context, path, file, tiny_model).finish()
    assert content(path) == (ids, values, rows)
