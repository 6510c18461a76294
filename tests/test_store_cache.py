"""Rows that are kept to be used again: interrupted, damaged, made by several processes, not allowed to be kept."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from repmatch.store import cache
from repmatch.store.cache import CachedRows


@pytest.mark.parametrize(("struck", "byte", "first"), [(".part", 20, 0), (".part", 40, 2), (".sums", 13, 2)])
def test_an_interrupted_computation_goes_on_before_what_was_damaged(
    tmp_path: Path, struck: str, byte: int, first: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    cached, seen = CachedRows(tmp_path, "toy", "a"), []

    def make(done: int) -> Iterator[NDArray[np.float32]]:
        seen.append(done)
        yield from (rows[lo : lo + 2] for lo in range(done, 10, 2))

    with pytest.raises(ValueError, match="4 rows were made"):
        cached.fill(10, 4, lambda _: iter([rows[:2], rows[2:4]]))
    (file,) = (tmp_path / "cache").glob("*" + struck)
    data = bytearray(file.read_bytes())
    data[byte] ^= 16
    file.write_bytes(data)
    assert cached.fill(10, 4, make).tolist() == rows.tolist()
    assert seen == [first]
    kept = cached.read(10)
    assert kept is not None
    assert kept.tolist() == rows.tolist()


def test_one_process_makes_rows_and_others_wait(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    made, at_work = [], threading.Event()

    def make(done: int) -> Iterator[NDArray[np.float32]]:
        made.append(done)
        yield rows[:5]
        at_work.set()
        time.sleep(0.3)
        yield rows[5:]

    def fill() -> NDArray[np.float32]:
        return CachedRows(tmp_path, "toy", "a").fill(10, 4, make)

    with ThreadPoolExecutor(3) as pool:  # locks are those of open files: threads meet them as processes do
        first = pool.submit(fill)
        assert at_work.wait(30)
        others = [pool.submit(fill) for _ in range(2)]
        assert all(task.result(30).tolist() == rows.tolist() for task in (first, *others))
    assert made == [0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_that_are_let_go_of_while_they_are_made_are_returned_all_the_same(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)

    def make(_: int) -> Iterator[NDArray[np.float32]]:
        yield rows
        CachedRows(tmp_path, "toy", "newer").fill(2, 4, lambda _: iter([rows[:2]]))

    assert CachedRows(tmp_path, "toy", "older").fill(10, 4, make).tolist() == rows.tolist()
    assert CachedRows(tmp_path, "toy", "older").read(10) is None
    assert CachedRows(tmp_path, "toy", "newer").read(2) is not None


def test_rows_are_made_and_not_kept_where_the_store_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache, "open_to_write", refuse)
    made = CachedRows(tmp_path, "toy", "a").fill(10, 4, lambda done: iter([rows[done:7], rows[7:]]))
    assert made.tolist() == rows.tolist()


def test_what_a_killed_process_left_behind_new_rows_goes_with_the_next_compaction(tmp_path: Path) -> None:
    folder, rows = tmp_path / "cache", np.ones((3, 4), np.float32)
    old = CachedRows(tmp_path, "toy", "old")
    old.fill(3, 4, lambda _: iter([rows]))
    (kept,) = folder.iterdir()
    data = kept.read_bytes()
    new = CachedRows(tmp_path, "toy", "new")
    new.fill(3, 4, lambda _: iter([2 * rows]))
    kept.write_bytes(data)  # as if the process had died right after the new rows got their name
    os.utime(kept, (1, 1))
    (folder / f"{kept.name[:49]}-4.sums").write_bytes(b"")
    CachedRows(tmp_path, "gone", "x").fill(3, 4, lambda _: iter([rows]))
    with pytest.raises(ValueError, match="1 rows were made"):
        CachedRows(tmp_path, "toy", "half").fill(3, 4, lambda _: iter([rows[:1]]))
    cache.forget_others(tmp_path, ["toy"])
    assert sorted(file.suffix for file in folder.iterdir()) == [".f32", ".part", ".sums"]
    assert new.read(3) is not None
    assert old.read(3) is None
