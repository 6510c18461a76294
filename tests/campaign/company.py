"""Several processes at one store: two writers, ten readers, and a writer that hangs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from campaign.checks import sound, which, whole_after
from campaign.child import CONTEXT, Child, Fate, wait_for, watch
from campaign.damage import Base
from campaign.kills import Costs
from campaign.operations import KINDS, Author, Step, dump, states
from campaign.state import State, read_state
from campaign.tally import Outcome, Wrong
from repmatch import store as stores
from repmatch.errors import StoreLockedError


def two_writers(folder: Path, rng: random.Random) -> Outcome:
    """Two writers take turns at one store, step by step; one of them may be killed; neither loses a step."""
    path, killed = folder / "s", rng.random() < 0.5
    authors = [Author(rng, prefix) for prefix in "pq"]
    kinds = [kind for kind in KINDS if kind != "export"]
    scripts = [author.script(4, kinds) for author in authors]
    children = [Child.start(path, scripts[i], folder / f"said{i}", Fate(wait=90.0)) for i in (0, 1)]
    struck = False
    if killed:
        children[0].reached(rng.randrange(4))
        time.sleep(rng.uniform(0, 0.2))
        struck = children[0].kill()
    for child in children:
        child.join()
        if child.refusal():
            raise Wrong("crash", child.refusal())
    with stores.open(path, mode="w") as store:
        found = read_state(store)
        for i, prefix in enumerate("pq"):
            at = which(found.of(prefix), states(scripts[i]), children[i].done(), f"writer {prefix}")
            if not struck and at != len(scripts[i]):
                raise Wrong("lost", f"writer {prefix} did {at} of {len(scripts[i])} steps")
            for step in scripts[i][at:]:
                step.do(store, folder)
        found = read_state(store)
        for i, prefix in enumerate("pq"):
            if not found.of(prefix).same(states(scripts[i])[-1]):
                raise Wrong("unrecovered", f"writer {prefix}: {states(scripts[i])[-1].missing_from(found)[:4]}")
        sound(store, "after two writers")
    return Outcome(note="one killed" if struck else "both to their ends")


def ten_readers(folder: Path, rng: random.Random) -> Outcome:
    """Ten readers during a write: each sees only moments that were committed, and only factors that were written."""
    path = folder / "s"
    kinds = [kind for kind in KINDS if kind not in ("export", "repair")]
    script = Author(rng).script(14, kinds)
    expected = states(script)
    child = Child.start(path, script, folder / "said")
    child.reached(1)
    said, stop = [folder / f"reader{i}" for i in range(10)], folder / "stop"
    readers = [CONTEXT.Process(target=watch, args=(str(path), dump(script), str(stop), str(file))) for file in said]
    for reader in readers:
        reader.start()
    child.join()
    stop.touch()
    for reader in readers:
        reader.join()
    if child.refusal():
        raise Wrong("crash", child.refusal())
    known = {state.digest() for state in expected}
    moments: set[str] = set()
    for file in said:
        for line in file.read_text().splitlines() if file.exists() else []:
            if line.startswith("?"):
                raise Wrong("half-written", f"a reader: {line}")
            if line[1:] not in known:
                raise Wrong("half-written", "a reader saw a moment that was never committed")
            moments.add(line)
    whole_after(path, script, expected, child.done())
    return Outcome(
        struck=len(moments) > 0, note=f"{min(len(moments), 4)}{'+' if len(moments) > 3 else ''} moments seen"
    )


def hang(folder: Path, rng: random.Random, costs: Costs, bases: Sequence[Base]) -> Outcome:
    """Stop a writer before a random line: others are told who holds the store; when it goes on or dies all is whole."""
    path = folder / "s"
    base = rng.choice(bases)
    shutil.copytree(base.path, path)
    author = base.writer(rng)
    start: State = author.state.copy()
    script = [author._step(rng.choice(["ingest", "select", "compact", "delete", "score"])), author._step("ingest")]
    expected = states(script, start)
    child = Child.start(
        path, script, folder / "said", Fate(line=rng.randint(1, costs.lines[script[0].kind]), stop=True)
    )
    try:
        return _beside(path, child, script, expected, rng.random() < 0.5)
    finally:
        child.kill()


def _beside(path: Path, child: Child, script: list[Step], expected: list[State], goes_on: bool) -> Outcome:
    """What others meet beside a writer that hangs, and what there is when it goes on or is killed."""
    pid = child.process.pid or 0
    wait_for(lambda: not child.process.is_alive() or _state(pid) == "T", 60)
    if _state(pid) != "T":
        child.join()
        whole_after(path, script, expected, child.done())
        return Outcome(struck=False, note="done before")
    detected = False
    with stores.open(path) as other:
        other._catalog.patience = 0.3
        try:
            with other.writing():
                pass
        except StoreLockedError as error:
            detected = str(pid) in str(error)
        try:
            which(
                read_state(other, path.with_name("exports")), expected, child.done(), "a reader beside a hanging writer"
            )
        except StoreLockedError as error:
            detected = detected and str(pid) in str(error)
    if child.done() == 0 and not detected and _holds(path, pid):
        raise Wrong("undetected", "the second writer was not told who holds the store")
    if goes_on:
        os.kill(pid, signal.SIGCONT)
        child.join()
    else:
        child.kill()
    whole_after(path, script, expected, child.done())
    return Outcome(detected=detected, note="went on" if goes_on else "was killed")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def _holds(path: Path, pid: int) -> bool:
    """Whether a process holds the writer's lock, as the kernel says."""
    inode = (path / "store.lock").stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any(
        line.split()[4] == str(pid) and line.split()[5].endswith(f":{inode}") for line in lines if "->" not in line
    )
