"""Rows that can be made again: their making killed, their files damaged, the disk full, two processes at once."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from campaign.child import CONTEXT, Lines
from campaign.damage import Base, strike
from campaign.state import State, read_state
from campaign.tally import Outcome, Wrong
from repmatch import store as stores
from repmatch.errors import RepMatchError
from repmatch.store.cache import CachedRows, forget_others

ROWS, WIDTH, STEP = 60, 48, 7
WAYS = ("killed", "killed, struck", "struck", "full disk", "two at once", "one of two killed")


def rows_of(seed: int) -> NDArray[np.float32]:
    """Return the rows that are cached, (ROWS, WIDTH) float32."""
    return np.random.default_rng(seed).standard_normal((ROWS, WIDTH), dtype=np.float32)


def fill(store: str, seed: int, said: str, line: int | None, file_bytes: int | None) -> None:
    """Make the rows in a process of its own.

    Args:
        store: the store's folder.
        seed: of the rows.
        said: file for the end: lines of repmatch's code, and "ok" or the error.
        line: die before this line; None: do not.
        file_bytes: largest file that it may write.
    """
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    lines, end = Lines(line), "ok"
    sys.settrace(lines)
    try:
        found = _fill(Path(store), seed)
        end = "ok" if np.array_equal(found, rows_of(seed)) else "other rows than were made"
    except RepMatchError as error:
        end = f"!{error}"
    except BaseException as error:
        end = f"?{type(error).__name__} {error}"
    finally:
        sys.settrace(None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    os.write(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), f"{lines.count} {end}"[:400].encode())


def _fill(store: Path, seed: int) -> NDArray[np.float32]:
    rows, cached = rows_of(seed), CachedRows(store, "toy", seed)

    def make(done: int) -> Iterator[NDArray[np.float32]]:
        for lo in range(done, ROWS, STEP):
            yield rows[lo : lo + STEP]

    found = cached.read(ROWS)
    return cached.fill(ROWS, WIDTH, make) if found is None else found


class Filler:
    """A process that makes rows.

    Args:
        path: the store.
        seed: of the rows.
        said: its file.
        line: it dies before this line.
        file_bytes: largest file that it may write.
    """

    def __init__(
        self, path: Path, seed: int, said: Path, line: int | None = None, file_bytes: int | None = None
    ) -> None:
        self.said = said
        said.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=fill, args=(str(path), seed, str(said), line, file_bytes), daemon=True)
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its lines and what it said, "" where it was killed."""
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            raise Wrong("crash", "the making of rows hangs")
        lines, _, end = (self.said.read_text() if self.said.exists() else "0 ").partition(" ")
        if end.startswith("?") or end.startswith("other"):
            raise Wrong("crash", end)
        return int(lines), end


def cache(folder: Path, rng: random.Random, bases: Sequence[Base]) -> Outcome:
    """Break the making of rows or their file; they are made again, equal, and nothing else of the store is touched."""
    path, way = folder / "s", rng.choice(WAYS)
    base = rng.choice([base for base in bases if base.logged is None])
    shutil.copytree(base.path, path)
    lines, _ = Filler(path, 0, folder / "said").end()  # rows of an earlier state of the dataset
    seed = rng.randrange(1, 1 << 30)
    struck, detected = _break(path, folder / "said", rng, (way, seed, lines))
    held = CachedRows(path, "toy", seed).read(ROWS)
    if held is not None and not np.array_equal(held, rows_of(seed)):
        raise Wrong("undetected", f"{way}: damaged rows are given out")
    if "struck" in way and struck and "killed" not in way and held is not None:
        raise Wrong("undetected", f"{way}: the file was changed and passes as whole")
    _, end = Filler(path, seed, folder / "said").end()
    if end != "ok":
        raise Wrong("unrecovered", f"{way}: {end}")
    forget_others(path, ["toy"])  # as compact does
    left = sorted(file.suffix for file in (path / "cache").iterdir())
    if left != [".f32"]:
        raise Wrong("half-written", f"{way}: left behind {left}")
    _untouched(path, base.state, way)
    return Outcome(struck, detected or ("struck" in way and struck), note=way)


def _break(path: Path, said: Path, rng: random.Random, what: tuple[str, int, int]) -> tuple[bool, bool]:
    """Do what is to be done; return whether it struck, and whether it was said."""
    way, seed, lines = what
    if way.startswith("killed"):
        filler = Filler(path, seed, said, line=rng.randint(1, lines))
        filler.end()
        struck = filler.process.exitcode == -9
        if way == "killed, struck":
            struck &= _strike(path, rng, ("*.part", "*.sums"))
        return struck, False
    if way == "struck":
        Filler(path, seed, said).end()
        return _strike(path, rng, ("*.f32",)), True
    if way == "full disk":
        _, end = Filler(path, seed, said, file_bytes=rng.randrange(4 * ROWS * WIDTH)).end()
        if end != "ok" and not end.startswith("!cannot write"):
            raise Wrong("crash", end)
        return end != "ok", end != "ok"
    first = Filler(path, seed, said, line=rng.randint(1, lines) if "killed" in way else None)
    second = Filler(path, seed, said.with_name("said2"))
    first.end()
    _, end = second.end()
    if end != "ok":
        raise Wrong("lost", f"{way}: the other process: {end}")
    return first.process.exitcode == -9 or "killed" not in way, False


def _strike(path: Path, rng: random.Random, patterns: Sequence[str]) -> bool:
    files = sorted(file for pattern in patterns for file in (path / "cache").glob(pattern))
    return bool(files) and strike(rng.choice(files), rng, rng.choice(["flip", "empty", "cut", "remove", "swap"]))


def _untouched(path: Path, state: State, way: str) -> None:
    want = state.copy()
    want.exports = {}
    with stores.open(path, mode="r") as store:
        found, findings = read_state(store), store.verify()
    if findings or not found.same(want):
        raise Wrong("lost", f"{way}: {findings[:1] or want.missing_from(found)[:4]}")
