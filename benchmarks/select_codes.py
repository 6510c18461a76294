"""One algorithm selecting from sign codes in a process of its own; `bench_select.py --codes` starts it.

Prints one JSON object: wall and processor seconds, peak resident memory of the whole process, the facility-location
value of the picks counted on the same rows for every algorithm, and why the algorithm was chosen.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import numpy as np

COUNTED = 100_000  # rows on which values are compared


def sign_codes(n: int, clusters: int, seed: int = 0) -> Any:
    """Return n sign codes of 12 matrices × 384 bits.

    Args:
        n: instances.
        clusters: centres, in clusters of uneven size, with an eighth of the bits flipped; 0: bits by chance, where no
            instance resembles another.
        seed: of the draw.
    """
    from repmatch.datamodels import Factors, Layout, Matrix

    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, (n, 72), dtype=np.uint64)
    if clusters:
        centres = rng.integers(0, 2**64, (clusters, 72), dtype=np.uint64)
        which = rng.choice(clusters, n, p=rng.dirichlet(np.ones(clusters)))
        for _ in range(2):  # each bit flips with probability 1/8
            bits &= rng.integers(0, 2**64, (n, 72), dtype=np.uint64)
        bits ^= centres[which]
    layout = Layout(tuple(Matrix(f"m{i}", 384, 384) for i in range(12)), 1)
    ids = tuple(map(str, range(n)))
    return Factors(ids, layout, "sign", None, bits, np.ones((n, 12), np.float32), None, "bench")


def value(factors: Any, picks: np.ndarray) -> float:
    """Return the facility-location value of picks, counted on a fixed sample of rows and scaled to all."""
    from repmatch.blocks import take
    from repmatch.selectors import FactorKernel, represent

    n = len(factors)
    rows = np.arange(n) if n <= COUNTED else np.sort(np.random.default_rng(9).choice(n, COUNTED, replace=False))
    kernel = FactorKernel(factors, represented=take(factors, rows))
    return float(represent(kernel, picks, n)[1].sum(dtype=np.float64)) * n / len(rows)


def main() -> None:
    """Run one algorithm and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm")
    parser.add_argument("n", type=int)
    parser.add_argument("k", type=int)
    parser.add_argument("--clusters", type=int, default=300)
    given = parser.parse_args()
    from repmatch.selectors import FactorKernel, facility_location, random

    factors = sign_codes(given.n, given.clusters)
    for name in ("incremental", "pruned", "partitioned"):  # compile before the clock starts
        facility_location(FactorKernel(sign_codes(400, 3)), 20, algorithm=name)  # type: ignore[arg-type]
    if given.algorithm == "random":
        values = [value(factors, random(given.n, given.k, seed).indices) for seed in range(2)]
        print(json.dumps({"value": float(np.mean(values)), "spread": abs(values[0] - values[1])}))
        return

    def tell(done: int, total: int) -> None:
        if done in (1, 10) or done % max(1, total // 10) == 0:
            print(f"  {done} of {total} picks, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    start, before = time.perf_counter(), time.process_time()
    found = facility_location(FactorKernel(factors), given.k, algorithm=given.algorithm, progress=tell)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "peak": peak,
                "value": value(factors, found.indices),
                "certainty": found.certainty,
                "algorithm": found.algorithm,
                "reason": found.reason,
            }
        )
    )


if __name__ == "__main__":
    main()
