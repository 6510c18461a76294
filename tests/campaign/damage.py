"""Bits flipped, sectors emptied, files cut and lost: all is to be noticed, and what was not struck to come back."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store_worker import make_batch, make_row

from campaign.checks import sound
from campaign.child import CONTEXT, SEGMENT_BYTES, Child
from campaign.operations import SPACE, Author, Step, dump, load, states
from campaign.state import State, read_state
from campaign.tally import Outcome, Wrong
from repmatch import store as stores
from repmatch.errors import RepMatchError
from repmatch.store.health import Finding

TARGETS = ("segment", "journal", "adapter", "catalog", "log", "lock")
WAYS = ("flip", "empty", "cut", "remove", "swap")
CATALOG = "catalog.duckdb"


@dataclass(frozen=True)
class Base:
    """A sound store to be damaged.

    Attributes:
        path: where; it is copied for every trial.
        state: what it holds.
        author: writes what may come next.
        logged: what it holds with its write-ahead log, which has one commit that `state` lacks; None: it has no log.
    """

    path: Path
    state: State
    author: Author
    logged: State | None = None

    def writer(self, rng: random.Random) -> Author:
        """Return an author of one's own."""
        author = copy.deepcopy(self.author)
        author.rng = rng
        return author


def make_base(folder: Path, seed: int, logged: bool = False) -> Base:
    """Make a store by a script of a seed, in another process.

    Args:
        folder: where.
        seed: of the script.
        logged: let the last commit lie in the write-ahead log, as a kill does right after it.
    """
    rng = random.Random(seed)
    author = Author(rng, batch=25)
    script = author.script(4, ["ingest"])
    script += [author._step(kind) for kind in ("adapter", "score", "subset", "select", "delete", "compact", "ingest")]
    kinds = ["ingest", "ingest", "subset", "select", "adapter", "quarantine"]
    script += [author._step(rng.choice(kinds)) for _ in range(3)]
    path = folder / "s"
    child = Child.start(path, script, folder / "said")
    child.join()
    if child.refusal() or child.done() != len(script):
        raise AssertionError(child.lines())
    state = states(script)[-1]  # with the exported files, which a copy leaves behind
    if not logged:
        return Base(path, state, author)
    last = author._step(rng.choice(["ingest", "ingest", "subset", "select", "quarantine"]))
    trial, counted = folder / "counted", folder / "commits"
    shutil.copytree(path, trial)
    _in_another_process(commits_of, trial, last, folder / "exports", counted)
    _in_another_process(leave_log, path, last, folder / "exports", counted)
    shutil.rmtree(trial)
    if not (path / f"{CATALOG}.wal").exists():
        raise AssertionError(f"{last.kind}: the write-ahead log is not there")
    return Base(path, state, author, last.then(state))


def _in_another_process(act: Callable[..., None], path: Path, step: Step, exports: Path, counted: Path) -> None:
    process = CONTEXT.Process(target=act, args=(str(path), dump([step]), str(exports), str(counted)))
    process.start()
    process.join()


class Connection:
    """A connection that calls something behind each commit."""

    def __init__(self, inner: Any, then: Callable[[], None]) -> None:
        self._inner = inner
        self._then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commit(self) -> None:
        self._inner.commit()
        self._then()


def _do(path: str, script: str, exports: str, then: Callable[[], None]) -> None:
    from repmatch.store import catalog

    real = catalog.Catalog._connect
    catalog.Catalog._connect = lambda *given, **more: Connection(real(*given, **more), then)  # type: ignore
    (step,) = load(script)
    with stores.open(Path(path)) as store:
        store.segment_bytes = SEGMENT_BYTES
        step.do(store, Path(exports))


def commits_of(path: str, script: str, exports: str, counted: str) -> None:
    """Do a step, and write down how many commits it took."""
    done = [0]

    def count() -> None:
        done[0] += 1

    _do(path, script, exports, count)
    Path(counted).write_text(str(done[0]))


def leave_log(path: str, script: str, exports: str, counted: str) -> None:
    """Do a step and die right behind its last commit, before the connection is closed."""
    left = [int(Path(counted).read_text())]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _do(path, script, exports, die)


def damage(folder: Path, rng: random.Random, bases: list[Base], target: str, way: str) -> Outcome:
    """Damage one file of a store; it is to be noticed; repair is to bring back all that was not struck.

    Args:
        folder: of the trial.
        rng: what decides.
        bases: sound stores; those with a write-ahead log serve the damage of that.
        target: which file.
        way: how.
    """
    if way == "swap" and target in ("catalog", "log"):
        way = "flip"  # DuckDB's checksum is the XOR over a block's words: it does not see words change places
    base = rng.choice([b for b in bases if (b.logged is not None) == (target == "log")])
    path = folder / "s"
    shutil.copytree(base.path, path)
    file = _file(path, rng, target)
    if not strike(file, rng, way):
        return Outcome(struck=False, note=f"{target} {way}: no byte changed")
    findings = findings_of(path)
    allowed = [base.state] + ([base.logged] if base.logged else [])
    if not findings:
        _must_be_harmless(path, allowed, target, way)
        return Outcome(detected=False, note=f"{target} {way}: harmless")
    if not all(finding.remedy for finding in findings):
        raise Wrong("undetected", f"no remedy is given: {findings}")
    if target in ("segment", "journal", "adapter") and not any(file.name in finding.where for finding in findings):
        raise Wrong("undetected", f"{file.name} was struck, found was {findings[0]}")
    with stores.open(path) as store:
        report = store.repair()
        if report.left:
            raise Wrong("unrecovered", f"{target} {way}: {report.left[0]}")
        sound(store, f"after the repair of {target} {way}")
        note = _came_back(store, base, target, report.factors)
        sound(store, f"after all was put in again: {target} {way}")
    return Outcome(detected=True, note=f"{target} {way}{note}")


def _file(path: Path, rng: random.Random, target: str) -> Path:
    found = {
        "segment": sorted(path.glob("segments/*.bin")),
        "journal": sorted(path.glob("segments/*.journal")),
        "adapter": sorted(path.glob("adapters/*.safetensors")),
        "catalog": [path / CATALOG],
        "log": [path / f"{CATALOG}.wal"],
        "lock": [path / "store.lock"],
    }
    return rng.choice(found[target])


def strike(file: Path, rng: random.Random, way: str) -> bool:
    """Damage a file, from another process: this one may hold DuckDB's lock; say whether a byte changed."""
    size = file.stat().st_size
    at = rng.randrange(max(1, size))
    code = {
        "flip": "b=bytearray(d); b[at] ^= 1 << bit",
        "empty": "b=bytearray(d); b[at // 512 * 512 : at // 512 * 512 + 512] = bytes(len(b[at // 512 * 512 :][:512]))",
        "cut": "b=d[:at]",
        "swap": "b=bytearray(d); n=min(64, len(b) // 2); x=min(at, len(b) - 2 * n); "
        "b[x:x+n], b[x+n:x+2*n] = d[x+n:x+2*n], d[x:x+n]",
        "remove": "b=None",
    }[way]
    program = (
        "import os, sys; file, at, bit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        f"d = open(file, 'rb').read()\n{code}\n"
        "os.unlink(file) if b is None else open(file, 'wb').write(b)\nprint(int(b is None or bytes(b) != d))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(file), str(at), str(rng.randrange(8))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().endswith("1")


def findings_of(path: Path) -> list[Finding]:
    """What `repmatch verify` says: findings, or a refusal."""
    try:
        with stores.open(path, mode="r") as store:
            return store.verify()
    except RepMatchError as error:
        return [Finding(str(path), str(error), "as it says")]


def _must_be_harmless(path: Path, allowed: list[State], target: str, way: str) -> None:
    with stores.open(path, mode="r") as store:
        found = read_state(store)
    bare = [_without_files(state) for state in allowed]
    if not any(found.same(state) for state in bare):
        raise Wrong("undetected", f"{target} {way}: verify finds nothing, missing: {bare[0].missing_from(found)[:4]}")
    with stores.open(path, mode="w") as store:
        if not any(read_state(store).same(state) for state in bare):
            raise Wrong("undetected", f"{target} {way}: a writer changed it")
        sound(store, "after a writer came")


def _without_files(state: State) -> State:
    out = state.copy()
    out.exports = {}
    return out


def _came_back(store: stores.Store, base: Base, target: str, dropped: int) -> str:  # noqa: C901
    """Hold the repaired store against what it was; put the dropped factors in again, as an ingest does."""
    found, want = read_state(store), _without_files(base.state)
    if target == "log" and base.logged is not None and set(base.logged.rows) == set(found.rows):
        newer = _without_files(base.logged)
        want = newer if all(set(newer.rows[n]) <= set(found.rows[n]) for n in newer.rows) else want
    note = ""
    gone = {(name, key) for name, rows in want.rows.items() for key in rows if key not in found.rows.get(name, {})}
    if gone:
        raise Wrong("lost", f"rows that were not damaged: {sorted(gone)[:4]}")
    bare = 0
    for name, rows in want.rows.items():
        for key, (raw, value) in rows.items():
            if found.rows[name][key] == (raw, None) and value is not None:
                bare += 1
            elif found.rows[name][key] != (raw, value):
                raise Wrong("lost", f"{name}/{key} has other content than was committed")
    if bare != dropped or (bare and target != "segment"):
        raise Wrong("lost", f"{bare} factors are gone, {dropped} were said to be, by damage of the {target}")
    extra = [(n, key) for n, rows in found.rows.items() for key in rows if key not in want.rows.get(n, {})]
    note += f", {'deleted rows back' if extra else ''}" if extra else ""
    for part in ("subsets", "coresets", "scores", "quarantine", "adapters"):
        kept, there = getattr(base.state, part), getattr(found, part)
        lost = {name for name in kept if name not in there}
        if lost and target not in ("catalog", "adapter"):  # "catalog": what cannot be read; counted in the note
            raise Wrong("lost", f"{part} {sorted(lost)[:3]} by damage of the {target}")
        if lost and target == "adapter" and part not in ("adapters", "scores"):
            raise Wrong("lost", f"{part} {sorted(lost)[:3]} by damage of an adapter")
        note += f", {part} lost" if lost else ""
    for name, rows in want.rows.items():
        missing = [make_row(key, _text(raw)) for key, (raw, _) in rows.items() if found.rows[name][key][1] is None]
        if missing:
            store.append(name, SPACE.id, "float32", make_batch(missing, SPACE))
    again = read_state(store)
    for name, rows in want.rows.items():
        if any(again.rows[name][key] != value for key, value in rows.items()):
            raise Wrong("unrecovered", f"{name} is not what it was after the factors were put in again")
    return note


def _text(raw: str) -> str:
    import json

    return str(json.loads(raw)["text"])


def repair_killed(folder: Path, rng: random.Random, bases: list[Base], lines: int) -> Outcome:
    """Kill a repair before a random line of it; the next repair is to end where an undisturbed one does."""
    from campaign.child import Fate

    base = rng.choice([b for b in bases if b.logged is None])
    path, quiet = folder / "s", folder / "quiet" / "s"
    target, way = rng.choice(["segment", "journal", "adapter", "catalog"]), rng.choice(["flip", "cut", "remove"])
    shutil.copytree(base.path, path)
    if not strike(_file(path, rng, target), rng, way):
        return Outcome(struck=False, note="no byte changed")
    shutil.copytree(path, quiet)
    with stores.open(quiet) as store:
        store.repair()
        want = read_state(store)
    step = Step("repair", "r")
    child = Child.start(path, [step], folder / "said", Fate(line=rng.randint(1, lines), step=0))
    child.join()
    struck = child.process.exitcode == -9
    if child.refusal():
        raise Wrong("crash", child.refusal())
    with stores.open(path) as store:
        report = store.repair()
        if report.left:
            raise Wrong("unrecovered", f"{report.left[0]}")
        found = read_state(store)
    if found != want:
        raise Wrong("lost", f"{target} {way}: {want.missing_from(found)[:4]} {found.missing_from(want)[:4]}")
    return Outcome(struck, detected=True, note=target)
