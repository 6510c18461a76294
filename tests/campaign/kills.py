"""SIGKILL at random points of everything that writes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from campaign.checks import which, whole_after
from campaign.child import CONTEXT, Child, Fate, measure, wait_for
from campaign.damage import Base
from campaign.operations import KINDS, Author, Step, dump, states
from campaign.state import State, read_state
from campaign.tally import Outcome, Wrong
from repmatch import store as stores
from repmatch.errors import StoreNotFoundError


class Costs:
    """Lines of code and seconds that each kind of step takes, measured once.

    Args:
        folder: where to work.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "exports").mkdir()
        author = Author(random.Random(0), "m")
        script = author.script(4, ["ingest"]) + [author._step(kind) for kind in KINDS if kind not in ("ingest", "drop")]
        script.append(author._step("drop"))
        out = folder / "costs"
        process = CONTEXT.Process(
            target=measure, args=(str(folder / "s"), str(folder / "exports"), dump(script), str(out))
        )
        process.start()
        process.join()
        self.lines: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for line in out.read_text().splitlines():
            kind, lines, seconds = line.split()
            self.lines[kind] = max(self.lines.get(kind, 0), int(lines))
            self.seconds[kind] = max(self.seconds.get(kind, 0.0), float(seconds))


def script_for(rng: random.Random, bases: Sequence[Base], path: Path) -> tuple[list[Step], State]:
    """Put a store at a path, or none yet, and return what is to be done to it, the first step to be struck."""
    if rng.random() < 0.15:  # the making of a store
        author = Author(rng)
        return author.script(3), State()
    base = rng.choice([base for base in bases if base.logged is None])
    shutil.copytree(base.path, path)
    author = base.writer(rng)
    start = author.state.copy()
    return [author._step(rng.choice(KINDS)) for _ in range(2)], start


def kill(folder: Path, rng: random.Random, costs: Costs, bases: Sequence[Base]) -> Outcome:
    """Kill a writer before a random line of a step, or at a random moment of it; hold the store to the oracle."""
    path = folder / "s"
    script, start = script_for(rng, bases, path)
    step, expected = script[0], states(script, start)
    by_line = rng.random() < 0.6
    fate = Fate(line=rng.randint(1, costs.lines[step.kind] + 20)) if by_line else Fate()
    child = Child.start(path, script, folder / "said", fate)
    if by_line:
        child.join()
        struck = child.process.exitcode == -9
    else:
        struck = child.reached(0) and _after(rng.uniform(0, costs.seconds[step.kind]), child)
    if child.refusal():
        raise Wrong("crash", child.refusal())
    whole_after(path, script, expected, child.done())
    return Outcome(struck, note=step.kind)


def _after(seconds: float, child: Child) -> bool:
    wait_for(lambda: not child.process.is_alive(), seconds)
    return child.kill()


def kill_again(folder: Path, rng: random.Random, costs: Costs, bases: Sequence[Base]) -> Outcome:
    """Kill a writer, and then the writer that puts right what the first one left, up to three times."""
    path = folder / "s"
    script, start = script_for(rng, bases, path)
    expected = states(script, start)
    done = struck = 0
    while struck < 3 and done < len(script):
        fate = Fate(line=rng.randint(1, 2 * costs.lines[script[done].kind]))
        child = Child.start(path, script[done:], folder / "said", fate)
        child.join()
        struck += child.process.exitcode == -9
        if child.refusal():
            raise Wrong("crash", child.refusal())
        done = found_at(path, expected, done + child.done())
    whole_after(path, script, expected, done)
    return Outcome(struck > 0, note=f"{struck} kills")


def found_at(path: Path, expected: Sequence[State], acked: int) -> int:
    """Return the number of the state that a store is in, read only."""
    try:
        with stores.open(path, mode="r") as reader:
            return which(read_state(reader, path.with_name("exports")), expected, acked, "a reader")
    except StoreNotFoundError:
        if acked:
            raise Wrong("lost", "the store is gone") from None
        return 0
