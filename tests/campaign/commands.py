"""SIGKILL at random lines of real commands, from the parsing of the command line to the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from campaign.child import CONTEXT, Lines
from campaign.state import State, read_state
from campaign.tally import Outcome, Wrong
from repmatch import store as stores
from repmatch.errors import StoreCorruptError, StoreNotFoundError, StoreVersionError

OLD = Path(__file__).parent.parent / "data" / "schema-1-1e2d0f5.tar.xz"


@dataclass(frozen=True)
class Order:
    """A command to be killed.

    Attributes:
        arguments: of the command line; {place} is the folder with rows, model and stores, {store} the store, {out} the
            folder beside it.
        base: the store it works on, a folder beside them.
        grows: whether a part of what it adds may be there, committed bit by bit; otherwise all or nothing.
        again: whether it may be run again when it had done all.
    """

    arguments: str
    base: str = "toy"
    grows: bool = False
    again: bool = True


ORDERS = {
    "ingest": Order("ingest {place}/more.jsonl --dataset toy", grows=True),
    "ingest warm": Order("ingest {place}/rows.jsonl --dataset warm --model {place}/model --warm-start 8", grows=True),
    "ingest shard": Order(
        "ingest {place}/more.jsonl --dataset toy --model {place}/model --shard 2/2", base="none", grows=True
    ),
    "score": Order("score toy --epochs 1", grows=True),
    "compare": Order("compare toy toy[stars<3] --epochs 1", grows=True),
    "study seeds": Order("study seeds toy --seeds 2 --epochs 1 --no-halves", grows=True),
    "select": Order("select toy -k 5 --name core", again=False),
    "select top": Order("select toy -k 5 --strategy top --name core", grows=True, again=False),
    "select embeddings": Order("select toy -k 5 --kernel embeddings --name core", again=False),
    "select joined": Order("select toy -k 5 --kernel joined --name core", again=False),
    "study field": Order("study field toy --field label"),
    "delete": Order("delete toy --where stars=1", again=False),
    "delete all": Order("delete gone --all", again=False),
    "compact": Order("compact"),
    "migrate": Order("compact", base="old"),
    "merge": Order("merge {store} {place}/shard1 {place}/shard2", base="none", grows=True),
    "repair": Order("repair", base="damaged"),
    "adapter import": Order("adapter import {place}/checkpoint --name imported"),
    "adapter export": Order("adapter export toy[stars>2] -o {out}/exported --epochs 1 --replace"),
    "evaluate": Order("evaluate toy --test {place}/test.jsonl --sizes 6 --seeds 1 --steps 2", grows=True),
}


def act(arguments: list[str], folder: str, line: int | None, said: str) -> None:
    """Run a command line as its own process would; note the lines it took and how it ended.

    Args:
        arguments: of the command line.
        folder: to work in; output goes to `out` in it.
        line: die before this line of repmatch's code; None: do not.
        said: file for the end: lines and exit code.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    sys.stdout = sys.stderr = open("out", "a")  # noqa: SIM115, PTH123 -- for the rest of this process
    import torch

    from repmatch.cli import main
    from repmatch.curator import embeddings

    embeddings.CHUNK = 5  # several steps of what can be interrupted
    torch.set_num_threads(1)
    lines, code = Lines(line), "none"
    sys.settrace(lines)
    try:
        main(arguments)
    except SystemExit as left:
        code = str(left.code)
    finally:
        sys.settrace(None)
        sys.stdout.flush()
        Path(said).write_text(f"{lines.count} {code}")


def prepare(place: str) -> None:
    """Make a model, rows and the stores that commands are given, by the commands themselves."""
    from conftest import toy_rows, write_rows
    from tiny_models import checkpoint

    folder = Path(place)
    model = checkpoint(folder / "model")
    rows = toy_rows(48)
    files = {"rows": rows[:24], "more": rows[12:40], "test": rows[40:]}
    for name, records in files.items():
        write_rows(folder / f"{name}.jsonl", records)

    def do(store: str, *arguments: str) -> None:
        process = CONTEXT.Process(
            target=act, args=(["--store", f"{place}/{store}", *arguments], place, None, f"{place}/said")
        )
        process.start()
        process.join()
        said = (folder / "said").read_text()
        if said.split()[1] != "0":
            raise AssertionError(f"{arguments}: {said} {(folder / 'out').read_text()[-2000:]}")

    options = ["--dataset", "toy", "--model", str(model)]
    do("toy", "ingest", f"{place}/rows.jsonl", *options)
    do("toy", "ingest", f"{place}/more.jsonl", "--dataset", "gone", "--model", str(model))
    do("toy", "delete", "gone", "--where", "stars > 1")  # rows for a compaction to give back
    for i in (1, 2):
        do(f"shard{i}", "ingest", f"{place}/more.jsonl", *options, "--shard", f"{i}/2")
    do("toy", "adapter", "export", "toy", "-o", f"{place}/checkpoint")
    shutil.copytree(folder / "toy", folder / "damaged")
    (segment,) = (folder / "damaged" / "segments").glob("*.bin")
    data = bytearray(segment.read_bytes())
    data[4096 + 5] ^= 1
    segment.write_bytes(data)
    with tarfile.open(OLD) as tar:
        tar.extractall(folder / "tar", filter="data")
    (folder / "tar" / "store").rename(folder / "old")


class Commands:
    """The orders, each with its lines of code, and what is there before it and after it.

    Args:
        folder: where to work.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.place = folder
        prepare(str(folder))
        self._known: dict[str, tuple[State, State, int, int]] = {}

    def known(self, name: str) -> tuple[State, State, int, int]:
        """Return the states before and after an order, its lines of code and its trainings; by a quiet run, once."""
        if name not in self._known:
            folder = self.place / f"quiet-{name.replace(' ', '-')}"
            path = self.copy(ORDERS[name], folder)
            before = _look(path)
            lines = self.run(name, folder)
            self._known[name] = (before or State(), _must(path), lines, _trainings(path))
        return self._known[name]

    def copy(self, order: Order, folder: Path) -> Path:
        """Put an order's store into a new folder."""
        folder.mkdir()
        if order.base != "none":
            shutil.copytree(self.place / order.base, folder / "s")
        return folder / "s"

    def run(self, name: str, folder: Path, line: int | None = None) -> int:
        """Run an order in a folder; return its lines of code, 0 where it was killed.

        Raises:
            Wrong: it ended by itself and not well.
        """
        path, said = folder / "s", folder / "said"
        said.unlink(missing_ok=True)
        words = ORDERS[name].arguments.format(place=self.place, store=path, out=folder).split()
        process = CONTEXT.Process(target=act, args=(["--store", str(path), *words], str(folder), line, str(said)))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise Wrong("crash", f"{name} hangs")
        if process.exitcode == -9:
            return 0
        lines, code = said.read_text().split()
        if code != "0" or process.exitcode:
            raise Wrong("crash", f"{name} left {code}: {(folder / 'out').read_text()[-600:]}")
        return int(lines)


def command(folder: Path, rng: random.Random, commands: Commands, name: str) -> Outcome:
    """Kill a command before a random line; what it found is there or what it makes; run again, it makes all of it."""
    order = ORDERS[name]
    before, after, lines, trainings = commands.known(name)
    shutil.rmtree(folder)
    path = commands.copy(order, folder)
    struck = commands.run(name, folder, rng.randint(1, lines)) == 0
    found = _look(path)
    whole = found is not None and found.same(after)
    if found is not None:
        _hold(name, found, before, after)
    elif before != State():
        raise Wrong("lost", f"{name}: the store cannot be read")
    if order.again or not whole:
        commands.run(name, folder)
    with stores.open(path, mode="w") as store:
        found = read_state(store)
        if not found.same(after):
            raise Wrong("unrecovered", f"{name}: {(after.missing_from(found) or found.missing_from(after))[:4]}")
        findings = store.verify()
        running = store.sql("SELECT count(*) AS n FROM runs WHERE status = 'running'")["n"][0]
    if findings or running:
        raise Wrong("half-written", f"{name}: {findings[:1]}, {running} runs still count as running")
    if _trainings(path) != trainings:
        raise Wrong("unrecovered", f"{name}: {_trainings(path)} trainings kept, expected {trainings}")
    marks = (".tmp", ".part", ".lost", *([] if name == "repair" else [".damaged"]))
    stray = [p.name for p in path.rglob("*") if p.name.endswith(marks)] + [p.name for p in (path / "staging").glob("*")]
    if stray:
        raise Wrong("half-written", f"{name}: left behind {stray}")
    return Outcome(struck)


def _hold(name: str, found: State, before: State, after: State) -> None:
    if found.same(before) or found.same(after):
        return
    lost = before.missing_from(found)
    if lost:
        raise Wrong("lost", f"{name}: {lost[:4]}")
    if not ORDERS[name].grows or found.missing_from(after):
        raise Wrong("half-written", f"{name}: {found.missing_from(after)[:4] or after.missing_from(found)[:4]}")


def _look(path: Path) -> State | None:
    """What a reader sees; None: no store, one of an earlier schema, or a damaged one."""
    with suppress(StoreNotFoundError, StoreVersionError, StoreCorruptError):
        return _must(path)
    return None


def _must(path: Path) -> State:
    with stores.open(path, mode="r") as store:
        return read_state(store)


def _trainings(path: Path) -> int:
    with suppress(StoreVersionError), stores.open(path, mode="r") as store:
        rows = store.sql("SELECT arguments::VARCHAR AS a FROM runs WHERE command = 'retrain' AND status = 'ok'")["a"]
        return len({json.dumps(json.loads(text), sort_keys=True) for text in rows})
    return 0
