"""Readers that never pause do not starve a writer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_worker import filled, make_batch, make_rows

import repmatch
from repmatch.errors import StoreLockedError
from repmatch.store.turn import Turn, taking_turns

READ = """
import sys, time
from repmatch import store as stores
store, deadline, times = stores.open(sys.argv[1], mode="r"), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < deadline:
    with store._catalog.reading() as conn:  # a reader that holds the catalog nearly all of the time
        conn.execute("SELECT count(*) FROM registry.instances").fetchall()
        time.sleep(0.05)
    times += 1
print(times)
"""


def test_ten_readers_without_a_pause_let_a_writer_in(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    env = {**os.environ, "PYTHONPATH": str(Path(repmatch.__file__).parent.parent)}
    command = [sys.executable, "-c", READ, str(tmp_path / "s"), "600"]
    readers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(10)]
    try:
        time.sleep(3)
        began = time.monotonic()
        with store.writing():
            for i in range(6, 9):
                store.append("d", space.id, "float32", make_batch(make_rows(i), space))
        assert (
            time.monotonic() - began < 25
        )  # each of its openings waits half a second and then for the readers there are
        assert all(reader.poll() is None for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    assert len(store.ids("d")) == 9


def test_a_reader_waits_for_a_writer_that_asks_and_not_for_ever(tmp_path: Path) -> None:
    writer = Turn(tmp_path / "turn.lock")
    writer.ask()
    assert not (tmp_path / "turn.lock").exists()  # it has not tried for long yet
    writer._began -= 10
    writer.ask()
    other = Turn(tmp_path / "turn.lock", writer._began)
    other.ask()
    assert other._descriptor is None
    began = time.monotonic()
    Turn(tmp_path / "turn.lock").let_go_first(0.2)
    assert 0.2 <= time.monotonic() - began < 3
    writer.release()
    began = time.monotonic()
    with taking_turns(tmp_path, read_only=True):
        assert time.monotonic() - began < 3


def test_reading_makes_no_file(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    assert len(store.ids("d")) == 6
    assert not (tmp_path / "s" / "turn.lock").exists()


HOLD = (
    "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(60)"
)


def test_a_writer_that_has_not_written_its_name_yet_is_named(tmp_path: Path) -> None:
    if not Path("/proc/locks").exists():
        pytest.skip("the holder of a lock is looked up in /proc/locks")
    store, _ = filled(tmp_path / "s")  # store.lock names this process, which holds it no longer
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "s" / "store.lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreLockedError, match=rf"process {holder.pid}[;.]"), store.writing():
            pass
    finally:
        holder.kill()
        holder.wait()
