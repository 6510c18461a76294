"""Hold what `repmatch plan` predicts against the ingest that follows: time, peak memory, size of the store.

    export REPMATCH_DATA=folder-with-trec.train.jsonl-sst2.train.jsonl-and-so-on
    python benchmarks/bench_plan.py

Each job is planned and run as a process of its own, from an empty store. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from machine import QUIET, Patience, describe, run, say


@dataclass(frozen=True)
class Job:
    """Rows and options that are planned and ingested.

    Attributes:
        name: what the table calls it.
        file: of the data folder.
        rows: how many of its first rows.
        options: of both commands.
    """

    name: str
    file: str
    rows: int
    options: tuple[str, ...] = ()


JOBS = (
    Job("questions", "trec.train.jsonl", 2000),
    Job("sentences", "sst2.train.jsonl", 6920),
    Job("sentences, few", "sst2.train.jsonl", 300),
    Job("long texts", "imdb.train.jsonl", 400),
    Job("pairs, sign codes", "snli.train.jsonl", 3000, ("--encoding", "sign")),
    Job("rank 4", "trec.train.jsonl", 1000, ("--rank", "4")),
    Job("warm start", "sst2.train.jsonl", 1500, ("--warm-start", "200")),
    Job("three steps, warm start", "trec.train.jsonl", 300, ("--steps", "3", "--warm-start", "100")),
)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(job: Job, data: Path, patience: Patience) -> str:
    """Plan and run one job.

    Args:
        job: the job.
        data: folder of the datasets.
        patience: waits for a quiet machine.

    Returns:
        A line of the table.
    """
    command = [sys.executable, "-m", "repmatch", "--quiet"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, store = folder / "rows.jsonl", folder / "store"
        with (data / job.file).open(encoding="utf-8") as lines:
            rows.write_text("".join(islice(lines, job.rows)), encoding="utf-8")
        patience.wait()
        planned = run([*command, "plan", str(rows), *job.options, "--json"])
        patience.wait()
        real = run([*command, "--store", str(store), "ingest", str(rows), "--dataset", "d", *job.options, "--json"])
        said, done = json.loads(planned.stdout), json.loads(real.stdout)
        pairs = (
            (said["seconds"], done["seconds"], 1.0),
            (said["memory_bytes"], real.peak_bytes, 1e6),
            (said["store_bytes"], _size(store), 1e6),
        )
    cells = "".join(f"{a / unit:>9.1f} {b / unit:>9.1f} {a / b - 1:>+6.0%}" for a, b, unit in pairs)
    mark = " *" if max(planned.others, real.others) > QUIET else ""
    return f"{job.name:<26}{job.rows:>6} {planned.seconds:>7.1f}{cells}{mark}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("REPMATCH_DATA"), help="folder of the datasets")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of jobs", choices=[job.name for job in JOBS])
    parser.add_argument("--wait", type=float, default=120.0, help="seconds to wait for a quiet machine, in all")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("set REPMATCH_DATA or --data to a folder with the datasets; README.md says where they come from.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    patience = Patience(options.wait)
    print(f"repmatch plan; {describe()}\n")
    print(f"{'':<26}{'':>6} {'plan':>7}{'seconds':>26}{'peak memory, MB':>26}{'store, MB':>26}")
    print(f"{'':<26}{'rows':>6} {'took s':>7}" + f"{'planned':>9} {'real':>9} {'':>6}" * 3)
    for job in JOBS:
        if options.only and job.name not in options.only:
            continue
        say(job.name)
        print(measure(job, options.data, patience), flush=True)


if __name__ == "__main__":
    main()
