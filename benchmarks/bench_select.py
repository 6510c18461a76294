"""Facility location against other packages, and on kernels too large to keep. Run by hand on a quiet machine.

    python benchmarks/bench_select.py --n 10000 --k 100 1000 --peers PYTHON
    python benchmarks/bench_select.py --codes 100000 --k 1000 --algorithms partitioned sparse lazy
    python benchmarks/bench_select.py --codes 1000000 --k 1000 --algorithms partitioned

PYTHON is the interpreter of an environment of its own that holds the peers; a peer that is missing there is skipped:

    python -m venv peers && peers/bin/pip install apricot-select submodlib-py

Every run is a process of its own on one thread: n clustered unit vectors, the squared-cosine kernel in float32, the
same array for everyone. "greedy" is the selection alone, "whole" includes making the kernel from the vectors. Printed
are seconds, the ratio to repmatch, the objective relative to repmatch's, and the peak of resident memory above what was
resident once the input was loaded.

With --codes, n sign codes of 12 matrices × 384 bits in clusters, all cores: seconds, and what share of the margin
between two random draws and exact greedy each algorithm reaches, where an exact one ("incremental", "lazy") is among
them. Peak memory there is what a run adds to the highest of the runs before it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ONE_THREAD = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
} | {"REPMATCH_THREADS": "1"}


def vectors(n: int, d: int = 384, clusters: int = 200, seed: int = 0) -> np.ndarray:
    """Return (n, d) float32 unit rows in clusters of uneven size."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(clusters))
    centres = rng.standard_normal((clusters, d)).astype(np.float32)
    x = centres[rng.choice(clusters, n, p=share)] + rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def squared_cosines(x: np.ndarray) -> np.ndarray:
    """Return the (n, n) kernel."""
    kernel = x @ x.T
    np.square(kernel, out=kernel)
    return kernel


def as_factors(x: np.ndarray) -> Any:
    """Return the vectors as factors of one matrix."""
    from repmatch.datamodels import Factors, Layout, Matrix

    layout = Layout((Matrix("m", x.shape[1], 1),), 1)
    ids = tuple(map(str, range(len(x))))
    return Factors(ids, layout, "float32", x, None, np.ones((len(x), 1), np.float32), None, "bench")


def with_repmatch(kernel: np.ndarray, k: int) -> list[int]:
    """Select with this package."""
    from repmatch.selectors import facility_location

    picks: list[int] = facility_location(kernel, k).indices.tolist()
    return picks


def with_apricot(kernel: np.ndarray, k: int) -> list[int]:
    """Select with apricot-select."""
    from apricot import FacilityLocationSelection

    model = FacilityLocationSelection(k, metric="precomputed", optimizer="two-stage")
    return [int(i) for i in model.fit(kernel).ranking]


def with_submodlib(kernel: np.ndarray, k: int) -> list[int]:
    """Select with submodlib-py."""
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(n=len(kernel), mode="dense", sijs=kernel, separate_rep=False)
    return [int(i) for i, _ in function.maximize(budget=k, optimizer="LazyGreedy", show_progress=False)]


RUNNERS: dict[str, Callable[[np.ndarray, int], list[int]]] = {
    "repmatch": with_repmatch,
    "apricot": with_apricot,
    "submodlib": with_submodlib,
}


def child(name: str, folder: Path, k: int) -> None:
    """Run one package in this process and print a JSON object."""
    run = RUNNERS[name]
    small = squared_cosines(vectors(60, 8, 3))
    run(small, 5)  # compile and load before the clock starts
    x = np.load(folder / "x.npy")
    start = time.perf_counter()
    if name == "repmatch":
        from repmatch.selectors import FactorKernel

        FactorKernel(as_factors(x), memory_limit=1 << 40).dense()
    else:
        squared_cosines(x)
    kernel_seconds = time.perf_counter() - start
    kernel = np.load(folder / "kernel.npy")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    picks = run(kernel, k)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "kernel": kernel_seconds, "picks": picks, "peak_mb": peak / 1024}))


def objective(kernel: np.ndarray, picks: list[int]) -> float:
    """Return facility location's value in float64."""
    return float(kernel[picks].max(axis=0).astype(np.float64).sum())


def compare(n: int, sizes: list[int], peers: str | None) -> None:
    """Time every package on one kernel."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = vectors(n)
        kernel = squared_cosines(x)
        kernel = np.maximum(kernel, kernel.T)
        np.save(folder / "x.npy", x)
        np.save(folder / "kernel.npy", kernel)
        for k in sizes:
            print(f"n {n}, k {k}: load before {os.getloadavg()[0]:.2f}")
            ours: dict[str, Any] | None = None
            for who in RUNNERS:
                python = sys.executable if who == "repmatch" else peers
                if python is None:
                    continue
                command = [python, __file__, "--child", who, "--folder", str(folder), "--k", str(k)]
                done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
                if done.returncode:
                    print(f"  {who:10} skipped: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:90]}")
                    continue
                found = json.loads(done.stdout.strip().splitlines()[-1])
                found["value"] = objective(kernel, found["picks"])
                ours = ours or found
                whole = found["seconds"] + found["kernel"]
                print(
                    f"  {who:10} greedy {found['seconds']:8.3f} s ({found['seconds'] / ours['seconds']:6.1f}x)"
                    f"  whole {whole:8.3f} s ({whole / (ours['seconds'] + ours['kernel']):5.1f}x)"
                    f"  objective {found['value'] / ours['value']:.7f}  peak +{found['peak_mb']:.0f} MB",
                    flush=True,
                )


def sign_codes(n: int, clusters: int = 300, seed: int = 0) -> Any:
    """Return n sign codes of 12 matrices × 384 bits: cluster centres with an eighth of the bits flipped."""
    from repmatch.datamodels import Factors, Layout, Matrix

    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, (clusters, 72), dtype=np.uint64)
    which = rng.choice(clusters, n, p=rng.dirichlet(np.ones(clusters)))
    draw = [rng.integers(0, 2**64, (n, 72), dtype=np.uint64) for _ in range(3)]
    flips = draw[0] & draw[1] & draw[2]  # each bit with probability 1/8
    layout = Layout(tuple(Matrix(f"m{i}", 384, 384) for i in range(12)), 1)
    ids = tuple(map(str, range(n)))
    return Factors(ids, layout, "sign", None, centres[which] ^ flips, np.ones((n, 12), np.float32), None, "bench")


def large(n: int, k: int, algorithms: list[str]) -> None:
    """Time algorithms on sign codes."""
    from repmatch.selectors import FactorKernel, facility_location, partitioned, random, represent

    factors = sign_codes(n)
    kernel = FactorKernel(factors)
    facility_location(FactorKernel(sign_codes(300)), 5)

    def value(picks: np.ndarray) -> float:
        return float(represent(kernel, picks, n)[1].astype(np.float64).sum())

    chance = float(np.mean([value(random(n, k, seed).indices) for seed in range(2)]))
    found: dict[str, float] = {}
    for name in algorithms:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        fresh = FactorKernel(factors)
        picks = (
            partitioned(fresh, k) if name == "partitioned" else facility_location(fresh, k, algorithm=name)  # type: ignore[arg-type]
        ).indices
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        found[name] = value(picks)
        print(f"n {n}, k {k}: {name:12} {seconds:9.2f} s  f {found[name]:.2f}  peak +{peak / 1024:.0f} MB", flush=True)
    exact = found.get("incremental", found.get("lazy"))
    print(f"  random f {chance:.2f}")
    for name, reached in found.items():
        if exact is not None:
            print(f"  {name:12} reaches {(reached - chance) / (exact - chance):.4f} of the margin")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=[10_000])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--peers", help="interpreter of an environment with the peers")
    parser.add_argument("--child", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--codes", type=int, help="sign codes instead of the comparison")
    parser.add_argument("--algorithms", nargs="+", default=["partitioned", "sparse", "incremental"])
    given = parser.parse_args()
    if given.codes:
        large(given.codes, given.k[0], given.algorithms)
        return
    if given.child:
        child(given.child, given.folder, given.k[0])
        return
    for n in given.n:
        compare(n, given.k, given.peers)


if __name__ == "__main__":
    main()
