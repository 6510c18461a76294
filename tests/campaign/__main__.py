"""The fault campaign: does a store keep what was committed, whatever happens to it?

    PYTHONPATH=tests python -m campaign --trials 500 --seed 0

Every trial has a seed of its own, told where it goes wrong; --only KIND --seed N repeats one. Exits 1 if anything went
wrong: something committed was lost, something half-written was seen, damage was not noticed, a repair left damage.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from campaign import cached, child, commands, company, damage, kills, limits
from campaign.tally import Outcome, Tally

Act = Callable[[Path, random.Random], Outcome]
# How many of a hundred trials each kind gets.
SHARES = {
    "kill": 30,
    "kill again": 10,
    "damage": 30,
    "repair killed": 6,
    "full disk": 2,
    "read-only": 6,
    "no memory": 4,
    "clock": 4,
    "two writers": 3,
    "ten readers": 2,
    "hang": 3,
    "cache": 4,
    **{f"command {name}": 0.7 for name in commands.ORDERS},
}
GROUPS = {"command": [kind for kind in SHARES if kind.startswith("command ")]}


def acts(folder: Path, seed: int, heavy: bool = True) -> dict[str, Act]:
    """Return what each kind of trial does.

    Args:
        folder: where sound stores are made to be struck.
        seed: of those stores.
        heavy: whether whole commands will run, so that torch is loaded once, for all children.
    """
    child.CONTEXT.set_forkserver_preload(
        [*child.LIGHT, *(child.HEAVY if heavy else ())]
    )  # children start at once, and need no files of Python's
    for i in range(4):
        (folder / f"base{i}").mkdir(parents=True)
    bases = [damage.make_base(folder / f"base{i}", seed + i, logged=i % 2 == 1) for i in range(4)]
    quiet = [base for base in bases if base.logged is None]
    costs = kills.Costs(folder / "costs")
    repair_lines = costs.lines.get("repair", 200)

    made: list[commands.Commands] = []

    def command(place: Path, rng: random.Random, name: str) -> Outcome:
        if not made:  # a model and six stores: only where they are needed
            made.append(commands.Commands(folder / "commands"))
        return commands.command(place, rng, made[0], name)

    def struck(place: Path, rng: random.Random) -> Outcome:
        return damage.damage(place, rng, bases, rng.choice(damage.TARGETS), rng.choice(damage.WAYS))

    return {
        "kill": partial(kills.kill, costs=costs, bases=bases),
        "kill again": partial(kills.kill_again, costs=costs, bases=bases),
        "damage": struck,
        "repair killed": partial(damage.repair_killed, bases=bases, lines=2 * repair_lines),
        "full disk": partial(limits.full_disk, bases=quiet),
        "read-only": partial(limits.read_only, bases=quiet),
        "no memory": partial(limits.no_memory, bases=quiet),
        "clock": partial(limits.clock, bases=quiet),
        "two writers": company.two_writers,
        "ten readers": company.ten_readers,
        "hang": partial(company.hang, costs=costs, bases=quiet),
        "cache": partial(cached.cache, bases=quiet),
        **{f"command {name}": partial(command, name=name) for name in commands.ORDERS},
    }


def order(trials: int, only: Sequence[str], seed: int) -> list[tuple[str, int]]:
    """Return kind and seed of each trial; of kinds chosen by name, as many as asked for of each in turn."""
    if only:
        named = [kind for name in only for kind in GROUPS.get(name, [name])]
        return [(named[i % len(named)], seed + i) for i in range(trials)]
    rng = random.Random(seed)
    kinds = rng.choices(list(SHARES), weights=list(SHARES.values()), k=max(0, trials - len(SHARES)))
    every = [*list(SHARES)[:trials], *kinds]  # each kind once before chance decides
    return [(kind, seed + i) for i, kind in enumerate(every)]


def run(
    trials: int,
    seed: int,
    only: Sequence[str] = (),
    folder: Path | None = None,
    stop: threading.Event | None = None,
) -> Tally:
    """Run a campaign.

    Args:
        trials: how many.
        seed: of the first trial; the others count on from it.
        only: kinds or groups of them, all by default.
        folder: where to work; what went wrong stays there.
        stop: no further trial is begun when it is set.

    Returns:
        The tally.
    """
    tally = Tally()
    work = Path(tempfile.mkdtemp(prefix="campaign-")) if folder is None else folder
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o755)
    found = acts(work / "sound", 0, heavy=not only or any(kind.startswith("command") for kind in only))
    for at, (kind, own) in enumerate(order(trials, only, seed)):
        if stop is not None and stop.is_set():
            break
        place = work / f"{at:05}-{kind.replace(' ', '-')}"
        tally.trial(kind, own, place, lambda place, kind=kind, own=own: found[kind](place, random.Random(own)))  # type: ignore[misc]
        if (at + 1) % 20 == 0:
            print(f"{at + 1} of {trials}, wrong {len(tally.wrong)}", file=sys.stderr, flush=True)  # noqa: T201
    if not tally.wrong and folder is None:
        shutil.rmtree(work, ignore_errors=True)
    return tally


def main() -> int:
    """Run what the command line asks for and print the tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (default 0)")
    kinds = [*SHARES, *GROUPS]
    parser.add_argument("--only", nargs="+", default=[], choices=kinds, metavar="KIND", help=", ".join(kinds))
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # the trial under way is finished, and the tally printed
    tally = run(options.trials, options.seed, options.only, stop=stop)
    ended = f", ended after {tally.trials} of them" if stop.is_set() else ""
    print(f"{options.trials} trials, seed {options.seed}{ended}\n\n{tally.table()}")  # noqa: T201
    return bool(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
