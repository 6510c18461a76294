"""Selection against other packages, and on kernels too large to keep. `make bench-select` runs all of it.

    python benchmarks/bench_select.py --peers PYTHON [--objectives facility-location dpp] [--n 10000] [--k 100 1000]
    python benchmarks/bench_select.py --codes 100000 --k 1000 --algorithms partitioned pruned
    python benchmarks/bench_select.py --plot benchmarks/results/select_codes.jsonl docs/selection.svg

PYTHON is the interpreter of an environment of its own with the peers, which `make bench-select` makes in
build/select-peers: apricot-select with scikit-learn, which it imports without saying so, and submodlib-py. A peer that
is missing there is skipped. Every run is a process of its own on one thread, on the same array; see
`select_contestants.py`. Shown are the least processor seconds of some runs, for the greedy alone and with the kernel
made from the vectors, the objective in float64 relative to ours, and peak memory above the process without input,
relative to the input's size.

With --codes, all cores, a process an algorithm; see `select_codes.py`. Quality is the share of the margin between
chance (two random draws) and exact greedy that an algorithm recovers. Results are added as JSON lines to --save.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import select_contestants as contest
import select_plot as plot

HERE = Path(__file__).parent
ONE_THREAD = {
    name: "1"
    for name in (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
        "REPMATCH_THREADS",
    )
}
MEMORY = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # bytes that a contestant may take
OBJECTIVES = ("facility-location", "graph-cut", "saturated-coverage", "dpp", "feature-coverage")


def values(objective: str, folder: Path, picks: list[int]) -> float:
    """Return an objective's value in float64, computed here for everyone."""
    if objective == "feature-coverage":
        return float(np.sqrt(np.load(folder / "features.npy")[picks].sum(axis=0)).sum())
    kernel = np.load(folder / "kernel.npy", mmap_mode="r")
    lines = np.asarray(kernel[picks], np.float64)
    among = lines[:, picks]
    if objective == "facility-location":
        return float(lines.max(axis=0).sum())
    if objective == "graph-cut":
        return float(2.0 * lines.sum() - among.sum())
    if objective == "dpp":
        return float(np.linalg.slogdet(among + contest.RIDGE * np.eye(len(picks)))[1])
    totals = np.zeros(kernel.shape[1])
    for lo in range(0, len(kernel), 1000):
        totals += np.asarray(kernel[lo : lo + 1000], np.float64).sum(axis=0)
    return float(np.minimum(lines.sum(axis=0), contest.SATURATION * totals).sum())


def _leave_the_machine_alone() -> None:
    """Let a child fail where it would fill the memory, before the system ends some process for it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_child(arguments: Sequence[str], limit: float, env: dict[str, str] | None = None) -> dict[str, Any] | str:
    """Run a child; return its JSON object, or why there is none."""
    try:
        done = subprocess.run(
            arguments, env=env, capture_output=True, text=True, timeout=limit, preexec_fn=_leave_the_machine_alone
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode < 0 or "MemoryError" in done.stderr or "bad_alloc" in done.stderr:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return f"failed with {MEMORY / 2**30:.0f} GiB of memory: {last[:60]}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1][:100]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def contest_one(python: str, who: str, objective: str, folder: Path, given: argparse.Namespace, k: int) -> Any:
    """Return the best of a contestant's runs, with its memory."""
    script, env = str(HERE / "select_contestants.py"), os.environ | ONE_THREAD
    best: dict[str, Any] | str = "no run"
    for _ in range(given.runs):
        found = run_child([python, script, who, objective, str(folder), str(k)], given.limit, env)
        if isinstance(found, str):
            return found
        if isinstance(best, str):
            best = found
        for name in ("seconds", "kernel", "wall"):
            best[name] = min(best[name], found[name])
        if best["seconds"] > given.limit / 4:
            break
    if isinstance(best, dict):
        memory = run_child([python, script, "--memory", who, objective, str(folder), str(k)], given.limit, env)
        best["memory"] = memory["peak"] / memory["input"] if isinstance(memory, dict) else float("nan")
    return best


def compare(n: int, given: argparse.Namespace) -> None:
    """Let every package select from the same input."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = contest.vectors(n)
        kernel = contest.squared_cosines(x)
        np.save(folder / "x.npy", x)
        np.save(folder / "kernel.npy", np.maximum(kernel, kernel.T))
        np.save(folder / "features.npy", contest.features_of(x))
        del kernel
        for objective in given.objectives:
            for k in given.k:
                with machine.watching() as watch:
                    rows = _rows(objective, folder, given, k)
                print(f"{objective}, n = {n:,}, k = {k:,}; others used {watch.others:.2f} cores")
                for row in rows:
                    print("  " + row)
                print(flush=True)


def _rows(objective: str, folder: Path, given: argparse.Namespace, k: int) -> list[str]:
    ours: dict[str, Any] = {}
    rows = []
    for who in contest.contestants(objective):
        python = sys.executable if who == "repmatch" else given.peers
        if python is None:
            continue
        found = contest_one(python, who, objective, folder, given, k)
        if isinstance(found, str):
            rows.append(f"{who:18} {found}")
            continue
        found["value"] = values(objective, folder, found["picks"])
        ours = ours or found
        whole, own = found["seconds"] + found["kernel"], ours["seconds"] + ours["kernel"]
        rows.append(
            f"{who:18} greedy {found['seconds']:8.3f} cpu s ({found['seconds'] / ours['seconds']:6.1f}x)"
            f"  with kernel {whole:8.3f} cpu s ({whole / own:5.1f}x)"
            f"  objective {found['value'] / ours['value']:.7f}  peak {found['memory']:5.2f} x input"
        )
    return rows


def large(n: int, given: argparse.Namespace) -> None:
    """Let algorithms select from sign codes."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("random", *given.algorithms):
        command = [sys.executable, str(HERE / "select_codes.py"), name, str(n), str(given.k[0])]
        with machine.watching() as watch:
            done = subprocess.run([*command, "--clusters", str(given.clusters)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: failed")
            continue
        found[name] = {
            "name": name,
            "n": n,
            "k": given.k[0],
            "clusters": given.clusters,
            "others": round(watch.others, 2),
            **json.loads(done.stdout.strip().splitlines()[-1]),
        }
        if given.save:
            with Path(given.save).open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
    show(list(found.values()))


def show(results: list[dict[str, Any]]) -> None:
    """Print a table of results on sign codes."""
    for result in results:
        if result["name"] == "random":
            continue
        part = plot.share(result, results)
        busy = "" if result["others"] is None else f"  (others used {result['others']} cores)"
        print(
            f"n {result['n']:>9,}  k {result['k']:>6,}  clusters {result['clusters']:>4}  {result['algorithm']:12}"
            f" {result['seconds']:8.1f} s  {result['cpu']:8.1f} cpu s  {result['peak'] / 2**30:5.2f} GiB"
            f"  share {'     ?' if part is None else f'{part:6.4f}'}{busy}",
            flush=True,
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=[10_000, 20_000])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--peers", help="interpreter of an environment with the peers")
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the least counts")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a run is stopped")
    parser.add_argument("--codes", type=int, nargs="*", help="sign codes instead of the comparison")
    parser.add_argument("--clusters", type=int, default=300, help="clusters of the sign codes; 0: none")
    parser.add_argument("--algorithms", nargs="+", default=["partitioned", "pruned"])
    parser.add_argument("--save", help="file to add results on sign codes to")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "SVG"), help="draw saved results")
    given = parser.parse_args()
    if given.plot:
        source, target = given.plot
        target.write_text(plot.draw([json.loads(line) for line in source.read_text().splitlines()]))
        return
    print(machine.describe())
    for n in given.codes or ():
        large(n, given)
    for n in () if given.codes else given.n:
        compare(n, given)


if __name__ == "__main__":
    main()
