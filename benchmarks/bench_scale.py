"""Two-round selection on a cluster of local processes, beside the best that any selection could reach.

    python benchmarks/bench_scale.py --n 200000 --k 1000 --nodes 2

Needs the extra `ray`. Every node is a set of processes of its own on this machine, so times say nothing about a network;
what counts is the objective. The bound holds for any selection of k, the one of exact greedy included: f(S) plus the k
largest gains left, counted on a sample of rows.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from machine import say
from select_codes import sign_codes


def bounded(factors: object, picks: np.ndarray, k: int, rows: int) -> tuple[float, float]:
    """Return the objective of some picks, and a bound on that of any k, both on a sample of rows and scaled to all."""
    from repmatch.blocks import take
    from repmatch.selectors import FactorKernel, represent

    n = len(factors)  # type: ignore[arg-type]
    sample = np.sort(np.random.default_rng(9).choice(n, min(n, rows), replace=False))
    kernel = FactorKernel(factors, represented=take(factors, sample))  # type: ignore[arg-type]
    cover = represent(kernel, picks, n)[1].astype(np.float64)
    gains = np.empty(n)
    for lo in range(0, n, 512):
        at = np.arange(lo, min(n, lo + 512))
        gains[at] = np.maximum(kernel.columns(at) - cover[:, None], 0.0).sum(axis=0)
    scale = n / len(sample)
    return float(cover.sum()) * scale, float(cover.sum() + np.sort(gains)[-k:].sum()) * scale


def main() -> None:
    """Select on a cluster and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--k", type=int, default=1_000)
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000, help="Rows on which objective and bound are counted.")
    given = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.curator.cluster.selecting import select_on_cluster
    from repmatch.selectors import FactorKernel, Problem, random

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(given.nodes):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    factors = sign_codes(given.n, given.clusters)
    say(f"n = {given.n:,}, k = {given.k:,}, {given.clusters} clusters, {given.nodes} nodes of one core")
    for strategy in ("facility-location", "herding"):
        began = time.perf_counter()
        problem = Problem(given.n, given.k, FactorKernel(factors))
        found = select_on_cluster(strategy, problem, ClusterOptions(notice=lambda line: print(" ", line, flush=True)))
        say(f"{strategy}: {time.perf_counter() - began:.1f} s; {'; '.join(found.notes)}")
        if strategy == "facility-location":
            value, bound = bounded(factors, found.indices, given.k, given.rows)
            chance, _ = bounded(factors, random(given.n, given.k, 0).indices, given.k, given.rows)
            say(f"  objective {value:.1f}, at least {value / bound:.4f} of any selection's; by chance {chance:.1f}")
        else:
            chance = random(given.n, given.k, 0).indices
            say(f"  squared mean minus MMD²: {found.value:.6f}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
