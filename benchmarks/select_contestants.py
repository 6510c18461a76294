"""One package solving one selection problem in a process of its own; `bench_select.py` starts it.

Prints one JSON object: wall and processor seconds of the greedy alone, processor seconds of making the kernel from the
vectors, and the picks; with --memory first, the peak of resident memory above what the process took before it held the
input. Everything runs on one thread, so that processor seconds are those of a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RIDGE, SATURATION = 1e-6, 0.1
Run = Callable[[np.ndarray, int], Any]


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


def features_of(x: np.ndarray) -> np.ndarray:
    """Return (n, d) features from 0 to 1, in every column both reached: then nobody's scaling changes them."""
    out = np.abs(x).astype(np.float64)
    out -= out.min(axis=0)
    return np.ascontiguousarray(out / out.max(axis=0))


def warm_up(run: Run, objective: str) -> None:
    """Let a contestant compile and load all that it will use: its ways of working change with size and picks."""
    small = vectors(700, 8, 40)
    kernel = squared_cosines(small)
    run(features_of(small) if objective == "feature-coverage" else np.maximum(kernel, kernel.T), 100)


def as_factors(x: np.ndarray) -> Any:
    """Return the vectors as factors of one matrix."""
    from repmatch.datamodels import Factors, Layout, Matrix

    layout = Layout((Matrix("m", x.shape[1], 1),), 1)
    ids = tuple(map(str, range(len(x))))
    return Factors(ids, layout, "float32", x, None, np.ones((len(x), 1), np.float32), None, "bench")


def _repmatch(name: str) -> Run:
    from repmatch import selectors

    def run(given: np.ndarray, k: int) -> Any:
        more: dict[str, float] = {"dpp": {"ridge": RIDGE}, "saturated-coverage": {"saturation": SATURATION}}.get(
            name, {}
        )
        return getattr(selectors, name.replace("-", "_"))(given, k, **more).indices

    return run


def _apricot(name: str, optimizer: str) -> Run:
    import apricot

    def run(given: np.ndarray, k: int) -> Any:
        model = {
            "facility-location": lambda: apricot.FacilityLocationSelection(k, "precomputed", optimizer=optimizer),
            "graph-cut": lambda: apricot.GraphCutSelection(k, "precomputed", alpha=2.0, optimizer=optimizer),
            "saturated-coverage": lambda: apricot.SaturatedCoverageSelection(
                k, "precomputed", alpha=SATURATION, optimizer=optimizer
            ),
            "feature-coverage": lambda: apricot.FeatureBasedSelection(k, "sqrt", optimizer=optimizer),
        }[name]()
        return model.fit(given).ranking

    return run


def _submodlib(name: str) -> Run:
    import submodlib

    def run(given: np.ndarray, k: int) -> Any:
        n = len(given)
        function = {
            "facility-location": lambda: submodlib.FacilityLocationFunction(n, "dense", False, sijs=given),
            "graph-cut": lambda: submodlib.GraphCutFunction(n, "dense", 0.5, separate_rep=False, ggsijs=given),
            "dpp": lambda: submodlib.LogDeterminantFunction(n, "dense", RIDGE, sijs=given),
            "feature-coverage": lambda: submodlib.FeatureBasedFunction(
                n, given.tolist(), given.shape[1], False, mode=submodlib.functions.featureBased.FeatureBased.squareRoot
            ),
        }[name]()
        found = function.maximize(
            budget=k,
            optimizer="LazyGreedy",
            stopIfZeroGain=False,
            stopIfNegativeGain=False,
            show_progress=False,
        )
        return [int(i) for i, _ in found]

    return run


def contestants(objective: str) -> dict[str, Callable[[], Run]]:
    """Return who can maximise an objective: name -> what makes the runner, in its own environment."""
    out: dict[str, Callable[[], Run]] = {"repmatch": lambda: _repmatch(objective)}
    if objective != "dpp":
        for optimizer in ("lazy", "two-stage"):
            out[f"apricot {optimizer}"] = lambda optimizer=optimizer: _apricot(objective, optimizer)
    if objective != "saturated-coverage":
        out["submodlib lazy"] = lambda: _submodlib(objective)
    return out


def _peak() -> int:
    """Return this process's peak resident memory; ru_maxrss would count that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run one contestant and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who")
    parser.add_argument("objective")
    parser.add_argument("folder", type=Path)
    parser.add_argument("k", type=int)
    given = parser.parse_args()
    run = contestants(given.objective)[given.who]()
    warm_up(run, given.objective)
    x = np.load(given.folder / "x.npy")
    start = time.process_time()
    if given.objective == "feature-coverage":
        made = 0.0
        name = "features.npy"
    else:
        name = "kernel.npy"
        if given.who == "repmatch":
            from repmatch.selectors import FactorKernel

            FactorKernel(as_factors(vectors(60, 8, 3)), memory_limit=1 << 40).dense()
            start = time.process_time()
            FactorKernel(as_factors(x), memory_limit=1 << 40).dense()
        else:
            squared_cosines(x)
        made = time.process_time() - start
    # The peak of making the kernel is not the greedy's: so measure that in a process that did not make one.
    data = np.load(given.folder / name)
    start, before = time.perf_counter(), time.process_time()
    picks = run(data, given.k)
    wall, cpu = time.perf_counter() - start, time.process_time() - before
    print(json.dumps({"seconds": cpu, "wall": wall, "kernel": made, "picks": [int(i) for i in picks]}))


def memory() -> None:
    """Run one contestant on the input alone and print its peak memory above the process without input."""
    import sys

    who, objective, folder, k = sys.argv[2:6]
    run = contestants(objective)[who]()
    warm_up(run, objective)
    before = _peak()
    data = np.load(Path(folder) / ("features.npy" if objective == "feature-coverage" else "kernel.npy"))
    run(data, int(k))
    print(json.dumps({"peak": _peak() - before, "input": data.nbytes}))


if __name__ == "__main__":
    import sys

    memory() if sys.argv[1] == "--memory" else main()
