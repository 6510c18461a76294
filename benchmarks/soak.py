"""A soak of the store: one process writes and some read, for an hour, all of them mixed.

    python benchmarks/soak.py --minutes 60 [--readers 3] [--store build/soak]

The writer appends batches of 64 (some of them rows that are there already), saves scores and coresets, deletes, and
compacts now and then, so that the number of instances stays near --instances. Readers search, filter, read factors,
rows and SQL. Printed: for each operation how often it ran and percentiles of its latency; resident memory of every
process over time; bytes of the store over time, and before and after a last compaction. Exits 1 where an operation
failed, `verify` finds something, or, from five minutes on, memory of the last third is more than a tenth above that of
the second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from store_data import rows_of, space_of

from repmatch import store as stores
from repmatch.datamodels import Adapter, Coreset, Dataset, FactorBatch, Fields
from repmatch.errors import StoreLockedError
from repmatch.store.health import folder_bytes

BATCH, SHAPE = 64, (12, 384)
SPACE = space_of(*SHAPE)


def batch_of(numbers: list[int], rng: np.random.Generator) -> FactorBatch:
    """Return rows of these numbers with random factors."""
    n, (m, d) = len(numbers), SHAPE
    values = rng.standard_normal((n, m, d), dtype=np.float32)
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    rows = tuple(row for number in numbers for row in rows_of(number, number + 1))
    ones = np.ones(n, np.float32)
    return FactorBatch(
        rows, values.reshape(n, m * d), None, np.ones((n, m), "f4"), ones, np.full(n, 9, "i4"), np.zeros(n, bool)
    )


class Log:
    """Times operations and samples memory; one line of JSON for each, in a file of the process."""

    def __init__(self, path: Path) -> None:
        self._file, self._sampled, self._began = path.open("w"), 0.0, time.monotonic()

    def time(self, name: str, act: Callable[[], Any]) -> Any:
        """Do something and note how long it took."""
        began = time.perf_counter()
        out, failed = None, None
        try:
            out = act()
        except StoreLockedError as error:
            failed = f"locked: {error}"
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        self.say({"op": name, "ms": 1000 * (time.perf_counter() - began), "failed": failed})
        now = time.monotonic()
        if now - self._sampled > 5:
            self._sampled = now
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.say({"at": now - self._began, "rss": pages * os.sysconf("SC_PAGE_SIZE")})
        return out

    def say(self, value: dict[str, Any]) -> None:
        """Add a line."""
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()


def write(path: str, seconds: float, instances: int, out: str) -> None:
    """Write until the time is up."""
    rng, chance, log = np.random.default_rng(0), random.Random(0), Log(Path(out))
    deadline, number, turn = time.monotonic() + seconds, 0, 0
    part = {m.name: np.ones((1, m.d_in), "f4") for m in SPACE.matrices}
    with stores.open(path) as store:
        store.segment_bytes = 32 << 20
        store.save_space(SPACE)
        columns = {"id": "string", "text": "string", "label": "string"}
        store.save_dataset(
            Dataset("d", Fields("id", "text", None, "label"), ("negative", "positive"), columns, SPACE.id, "float16")
        )
        store.save_adapter(Adapter("a", SPACE.id, "d", "m", {}, {}, part, part))
        while time.monotonic() < deadline:
            turn += 1
            again = [chance.randrange(max(0, number - 1000), number) for _ in range(8)] if number > 1000 else []
            numbers = [*dict.fromkeys(again), *range(number, number + BATCH - 8)]
            log.time("append 64", lambda n=numbers: store.append("d", SPACE.id, "float16", batch_of(n, rng)))  # type: ignore[misc]
            number += BATCH - 8
            ids = store.ids("d")
            if turn % 4 == 0:
                some = chance.sample(ids, min(500, len(ids)))
                scores = np.ones(len(some))
                log.time(
                    "save scores",
                    lambda s=some, v=scores: store.save_scores("d", "a", s, v, np.ones((len(s), SHAPE[0]), "f4")),  # type: ignore[misc]
                )
            if turn % 6 == 0:
                picks = tuple(chance.sample(ids, min(50, len(ids))))
                near = np.zeros(len(picks), np.int64)
                made = Coreset("c", "d", "top", {}, picks, np.ones(len(picks)), picks, near, np.ones(len(picks), "f4"))
                log.time("save coreset", lambda c=made: store.save_coreset(c, replace=True))  # type: ignore[misc]
            if len(ids) > instances:
                old = ids[: len(ids) - instances + 500]
                log.time("delete", lambda o=old: store.delete("d", ids=o, coresets=True))  # type: ignore[misc]
            if turn % 60 == 0:
                done = log.time("compact", store.compact)
                if done is not None:
                    log.say({"compacted": [done.before, done.after], "instances": len(store.ids("d"))})
            time.sleep(0.02)


def read(path: str, seconds: float, seed: int, out: str) -> None:
    """Read until the time is up, each time something else."""
    chance, log = random.Random(seed), Log(Path(out))
    deadline = time.monotonic() + seconds
    with stores.open(path, mode="r") as store:
        while time.monotonic() < deadline:
            ids = log.time("ids", lambda: store.ids("d")) or []
            if len(ids) < 100:
                time.sleep(0.5)
                continue
            recent = ids[-200:]  # the oldest may be deleted before they are asked for
            some = chance.sample(recent, 20)
            acts: dict[str, Callable[[], Any]] = {
                "nearest 1 of all": lambda s=some: store.nearest("d", s[:1], k=10),  # type: ignore[misc]
                "20 factors by id": lambda s=some: store.factors("d", ids=s),  # type: ignore[misc]
                "filter": lambda: store.ids("d", where="label = 'positive' AND text LIKE '%7%'"),
                "SQL": lambda: store.sql("SELECT label, count(*), avg(loss) FROM instances GROUP BY label"),
                "20 rows": lambda s=some: list(store.rows("d", ids=s)),  # type: ignore[misc]
                "info": store.info,
            }
            name = chance.choice(list(acts))
            log.time(name, acts[name])
            time.sleep(0.05)


def summarise(logs: dict[str, list[dict[str, Any]]]) -> bool:
    """Print latencies and memory; return whether something was wrong."""
    wrong = False
    times: dict[str, list[float]] = {}
    for lines in logs.values():
        for line in lines:
            if "op" in line:
                times.setdefault(line["op"], []).append(line["ms"])
                if line["failed"]:
                    wrong = True
                    print(f"FAILED {line['op']}: {line['failed']}")
    print(f"\n{'operation':<18}{'times':>7}{'p50 ms':>10}{'p95':>10}{'p99':>10}{'worst':>10}")
    for name, found in sorted(times.items()):
        cuts = np.percentile(found, [50, 95, 99, 100])
        print(f"{name:<18}{len(found):>7}" + "".join(f"{cut:>10.1f}" for cut in cuts))
    print("\nresident memory, MB, median of each third of the time")
    for name, lines in logs.items():
        rss = [line["rss"] / 1e6 for line in lines if "rss" in line]
        if len(rss) >= 6:
            thirds = [float(np.median(part)) for part in np.array_split(np.array(rss), 3)]
            grows = max(line["at"] for line in lines if "rss" in line) > 280 and thirds[2] > 1.1 * thirds[1]
            wrong |= grows
            print(f"{name:<10}" + "".join(f"{t:>8.0f}" for t in thirds) + ("  GROWS" if grows else ""))
    done = [(*line["compacted"], line["instances"]) for line in logs["writer"] if "compacted" in line]
    shown = done[:: max(1, len(done) // 8)]
    print(f"\n{len(done)} compactions, MB before -> after (instances): ", end="")
    print(", ".join(f"{before / 1e6:.0f} -> {after / 1e6:.0f} ({n})" for before, after, n in shown))
    return wrong


def main() -> int:
    """Soak a store and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--instances", type=int, default=20_000, help="kept at most (default 20000)")
    parser.add_argument("--store", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    path, seconds = options.store / "store", 60 * options.minutes
    shutil.rmtree(options.store, ignore_errors=True)
    options.store.mkdir(parents=True)
    print(f"{describe()}\n{options.minutes:g} minutes, one writer, {options.readers} readers")
    context = get_context("spawn")
    files = {
        name: options.store / f"{name}.jsonl" for name in ["writer", *(f"reader {i}" for i in range(options.readers))]
    }
    first = context.Process(target=write, args=(str(path), seconds, options.instances, str(files["writer"])))
    first.start()
    while not (path / "segments").is_dir():
        time.sleep(0.1)
    others = [
        context.Process(target=read, args=(str(path), seconds, i, str(files[f"reader {i}"])))
        for i in range(options.readers)
    ]
    for process in others:
        process.start()
    began, sizes = time.monotonic(), []
    while any(process.is_alive() for process in (first, *others)):
        time.sleep(min(10.0, seconds / 20))
        try:
            sizes.append((time.monotonic() - began, folder_bytes(path) / 1e6))
        except FileNotFoundError:
            continue  # a file went while they were counted
    logs = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    wrong = summarise(logs) or any(process.exitcode for process in (first, *others))
    shown = sizes[:: max(1, len(sizes) // 12)]
    print("\nstore, MB, over time: " + ", ".join(f"{mb:.0f} at {at / 60:.1f} min" for at, mb in shown))
    largest = [
        max(mb for _, mb in part)
        for part in (sizes[i * len(sizes) // 6 : (i + 1) * len(sizes) // 6] for i in range(6))
        if part
    ]
    print("store, MB, largest of each sixth of the time: " + ", ".join(f"{mb:.0f}" for mb in largest))
    if options.minutes >= 30 and largest[-1] > 1.1 * largest[-4]:
        wrong = True
        print("the store GROWS")
    with stores.open(path, mode="w") as store:
        done, findings, left = store.compact(), store.verify(), len(store.ids("d"))
    print(f"last compaction: {done.before / 1e6:.1f} MB before, {done.after / 1e6:.1f} MB after, {left} instances left")
    print(f"verify: {len(findings)} findings")
    return bool(wrong or findings)


if __name__ == "__main__":
    sys.exit(main())
