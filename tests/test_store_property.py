"""Any sequence of what users and machines do to a store leaves what a fresh build of the surviving rows would.

A kill is the store's folder as another process sees it at a random step of the write protocol: a copy is taken there,
and the test goes on with the copy, as after SIGKILL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_worker import make_batch, make_dataset, make_row, make_space, values_of

import repmatch.store.catalog
import repmatch.store.files
import repmatch.store.journal
import repmatch.store.recovery
import repmatch.store.segment
from repmatch import store as stores
from repmatch.datamodels import Encoding, Row

NAMES = ["a", "'; DROP", "7", "07", "ü🙂", "x" * 300]
SPACE = make_space(dims=(70, 9))


@contextmanager
def killed_at(step: int, folder: Path, image: Path) -> Iterator[None]:
    """Copy the folder to `image` just before the given step of whatever runs in the block, or at its end."""
    count = 0

    def here() -> None:
        nonlocal count
        if count == step:
            subprocess.run(["cp", "-a", str(folder), str(image)], check=True)
        count += 1

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here()
            return function(*args, **kwargs)

        return call

    places = [
        (repmatch.store.segment, "write_at"),
        (repmatch.store.journal, "write_at"),
        (repmatch.store.files, "write_at"),
        (os, "fdatasync"),
        (os, "truncate"),
        (repmatch.store.compaction, "remove_segments"),
        (repmatch.store.catalog.Catalog, "_connect"),
        (repmatch.store.catalog.Catalog, "checkpoint"),
        (repmatch.store.factors, "enter_batch"),
        (Path, "unlink"),
    ]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        yield
    if count <= step:
        subprocess.run(["cp", "-a", str(folder), str(image)], check=True)


class StoreMachine(RuleBasedStateMachine):
    """The model is what each id should be; the order is that of first arrival."""

    encoding: Encoding = "float32"

    @initialize(
        encoding=st.sampled_from(["float32", "float16", "sign"]), segment=st.sampled_from([4096 + 700, 1 << 20])
    )
    def begin(self, encoding: Encoding, segment: int) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.encoding, self.segment = encoding, segment
        self.model: dict[str, Row] = {}
        self.step: tuple[int, Path] | None = None
        self.count = 0
        self.path = self.home / "0"
        self.store = self.opened()
        self.store.save_space(SPACE)
        self.store.save_dataset(make_dataset(SPACE, "d", encoding))

    def opened(self) -> stores.Store:
        store = stores.open(self.path)
        store.segment_bytes = self.segment
        return store

    def do(self, action: Callable[[], object], kill: int | None) -> bool:
        """Run an action; with `kill`, go on with the folder as it was at that step. True where it surely ended."""
        if kill is None:
            action()
            return True
        self.count += 1
        image = self.home / str(self.count)
        with killed_at(kill, self.path, image):
            action()
        shutil.rmtree(self.path)
        self.path = image
        self.store = self.opened()
        assert self.store.factors("d").ids == tuple(self.store.ids("d"))  # readers bear what the kill left
        with stores.open(image, mode="w"):  # the next writer cuts tails and enters a batch that had reached the journal
            pass
        return False

    def agree(self, before: dict[str, Row], after: dict[str, Row], done: bool) -> None:
        """After a kill the action has happened in full or not at all."""
        found = {name: text for name, text in self.store.rows("d")}
        options = [after] if done else [before, after]
        fitting = [m for m in options if found == {name: row.json for name, row in m.items()}]
        assert fitting, (found.keys(), before.keys(), after.keys())
        self.model = fitting[0]

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
        text=st.sampled_from(["one", "two"]),
        extra=st.integers(0, 1),
        kill=st.none() | st.integers(0, 25),
    )
    def ingest(self, names: list[str], text: str, extra: int, kill: int | None) -> None:
        """Add new rows, change others, repeat others; rows that need no factor are only replaced."""
        rows = [make_row(name, text=f"{text} {name[:9]}", n=extra) for name in names]
        after = {**self.model, **{row.id: row for row in rows}}
        before = dict(self.model)

        def action() -> None:
            with self.store.writing(), self.store.stage("d") as stage:
                stage.add(rows)
                stage.resolve(SPACE.id, self.encoding)
                for part in stage.todo():
                    self.store.append("d", SPACE.id, self.encoding, make_batch(part, SPACE))
                stage.touch()

        done = self.do(action, kill)
        if done:
            self.agree(before, after, True)
            return
        found = dict(self.store.rows("d"))  # appending and touching are two commits: each row is old or new
        for name in {*before, *after}:
            choices = [m[name].json if name in m else None for m in (before, after)]
            assert found.get(name) in choices
            if name in found:
                self.model[name] = after[name] if found[name] == after[name].json else before[name]
        self.model = {name: self.model[name] for name in found}

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3), kill=st.none() | st.integers(0, 12))
    def delete(self, names: set[str], kill: int | None) -> None:
        there = [name for name in sorted(names) if name in self.model]
        before = dict(self.model)
        after = {name: row for name, row in before.items() if name not in names}
        done = self.do(lambda: self.store.delete("d", ids=there) if there else None, kill)
        self.agree(before, after, done)

    @rule(kill=st.none() | st.integers(0, 40))
    def compact(self, kill: int | None) -> None:
        before = dict(self.model)
        done = self.do(self.store.compact, kill)
        self.agree(before, before, done)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        with stores.open(self.path, mode="w"):
            pass
        self.store = self.opened()

    @invariant()
    def content_is_that_of_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        factors = self.store.factors("d")
        assert sorted(factors.ids) == sorted(self.model)
        assert self.store.ids("d") == list(factors.ids)
        raw = factors.bits if factors.bits is not None else factors.flat
        assert raw is not None
        expected = fresh([self.model[name] for name in factors.ids], self.encoding)
        np.testing.assert_array_equal(np.asarray(raw), expected)
        assert self.store.verify() == []

    def teardown(self) -> None:
        if hasattr(self, "home"):
            with tempfile.TemporaryDirectory() as folder:
                self.against_a_fresh_build(Path(folder) / "fresh")
            shutil.rmtree(self.home)

    def against_a_fresh_build(self, path: Path) -> None:
        with stores.open(path, mode="w") as other:
            other.save_space(SPACE)
            other.save_dataset(make_dataset(SPACE, "d", self.encoding))
            order = self.store.ids("d")
            if order:
                other.append("d", SPACE.id, self.encoding, make_batch([self.model[name] for name in order], SPACE))
            assert list(other.rows("d")) == list(self.store.rows("d"))
            mine, theirs = self.store.factors("d"), other.factors("d")
            assert mine.ids == theirs.ids
            for name in ("bits", "flat"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        assert len(list((self.path / "segments").glob("*.lost"))) == 0


def fresh(rows: list[Row], encoding: Encoding) -> np.ndarray:
    """What the store should keep of these rows, made without it."""
    from repmatch.signcodes import encode

    values = np.stack([values_of(row, SPACE) for row in rows]) if rows else np.zeros((0, SPACE.layout.width), "f4")
    return encode(values, SPACE.layout.dims) if encoding == "sign" else values.astype(encoding)


StoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("REPMATCH_EXAMPLES", "5")),
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_any_sequence_leaves_what_a_fresh_build_would = StoreMachine.TestCase
