"""Selection on a cluster: parts go out, proposals come back, the second round is done here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.cluster.connection import ClusterOptions, connected
from repmatch.curator.cluster.crew import Crew, check_in
from repmatch.selectors import Problem, Selection
from repmatch.selectors.greedi import distributed, solve_part
from repmatch.selectors.large import Part


@dataclass(frozen=True)
class Threads:
    """What a worker is told once.

    Attributes:
        count: cores it may use.
    """

    count: int


class PartWorker:
    """Solves parts.

    Args:
        threads: cores it may use.
    """

    def __init__(self, threads: Threads) -> None:
        os.environ["REPMATCH_THREADS"] = str(threads.count)

    def hello(self) -> tuple[str, str]:
        """Return version and node."""
        return check_in()

    def work(self, part: Part) -> NDArray[np.int64]:
        """Return what a part proposes."""
        return solve_part(part)


def select_on_cluster(
    strategy: str, problem: Problem, options: ClusterOptions, *, parts: int | None = None
) -> Selection:
    """Select in two rounds, the first of them on a cluster.

    Args:
        strategy: "facility-location" or "herding".
        problem: what to solve.
        options: the cluster.
        parts: how many parts; by default such that a part has about 10,000 instances.

    Returns:
        The selection.

    Raises:
        SelectionError: what cannot be selected in parts.
        ClusterError: the cluster cannot be reached, or its workers keep dying.
    """
    with connected(options) as ray, Crew(ray, PartWorker, (Threads(options.worker_cpus),), options) as crew:

        def workers(parts: Iterator[Part]) -> Iterator[NDArray[np.int64]]:
            for _, found in crew.run(((part,), part.kernel.shape[1]) for part in parts):
                yield found
            options.say(crew.summary())

        return distributed(strategy, problem, workers, parts=parts)
