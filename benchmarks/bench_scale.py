"""Two-round selection on a cluster of local processes beside one machine's selection.

    python benchmarks/bench_scale.py --n 20000 200000 --k 1000 --nodes 2

Needs the extra `ray`. Every node is processes of its own on this machine, so times say nothing about a network; what
counts is the objective. One machine takes the algorithm that it would take by itself: up to 5e9 pairs it is exact.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from machine import say
from select_codes import sign_codes, value


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its seconds."""
    began = time.perf_counter()
    found = make()
    return found, time.perf_counter() - began


def main() -> None:
    """Select on a cluster and on one machine, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--k", type=int, default=1_000)
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=2)
    given = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray.cluster_utils import Cluster

    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.curator.cluster.selecting import select_on_cluster
    from repmatch.selectors import FactorKernel, Problem, facility_location, herding, random

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(given.nodes):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    k, options = given.k, ClusterOptions()
    for n in given.n:
        factors = sign_codes(n, given.clusters)
        problem = Problem(n, k, FactorKernel(factors))
        say(f"n = {n:,}, k = {k:,}, {given.clusters} clusters, {given.nodes} nodes of one core")
        far, far_seconds = timed(lambda p=problem: select_on_cluster("facility-location", p, options))
        near, near_seconds = timed(lambda f=factors: facility_location(FactorKernel(f), k))
        chance = value(factors, random(n, k, 0).indices)
        there, here = value(factors, far.indices), value(factors, near.indices)
        say(f"  facility location  cluster {there:10.1f} in {far_seconds:6.1f} s  ({far.notes[-1]})")
        say(f"                 one machine {here:10.1f} in {near_seconds:6.1f} s  ({near.algorithm})")
        same = "the same picks" if np.array_equal(far.indices, near.indices) else "other picks"
        say(f"                 share {there / here:.4f}, {same}; by chance {chance:.1f}")
        far, far_seconds = timed(lambda p=problem: select_on_cluster("herding", p, options))
        near, near_seconds = timed(lambda f=factors: herding(FactorKernel(f), k))
        say(f"  herding            cluster {far.value:10.6f} in {far_seconds:6.1f} s")
        say(f"                 one machine {near.value:10.6f} in {near_seconds:6.1f} s  (exact)")
        say(f"                 share {far.value / near.value:.4f}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
