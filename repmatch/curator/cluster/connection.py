"""The way to a Ray cluster: what the user asks of it, and a connection that is left as it was found."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from repmatch.errors import ClusterError, MissingExtraError, UsageError


@dataclass(frozen=True)
class ClusterOptions:
    """Where and how to work on a cluster.

    Attributes:
        address: of a running cluster, "auto" for the one this machine belongs to; None: RAY_ADDRESS, else a cluster of
            this machine alone, for as long as the command runs.
        workers: how many processes hold the base model; None: as many as the cluster has room for.
        worker_cpus: cores of each.
        worker_gpus: GPUs of each, a share where several are to use one; None: 1 where the device is cuda, else none.
        notice: called with lines for a person: throughput by node, workers that died and came.
    """

    address: str | None = None
    workers: int | None = None
    worker_cpus: int = 1
    worker_gpus: float | None = None
    notice: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a number is out of range.
        """
        for name, value in (("--workers", self.workers), ("--worker-cpus", self.worker_cpus)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is out of range; expected 1 or more.")
        if self.worker_gpus is not None and self.worker_gpus < 0:
            raise UsageError(f"--worker-gpus {self.worker_gpus} is out of range; expected 0 or more.")

    def say(self, text: str) -> None:
        """Tell a person.

        Args:
            text: one line.
        """
        if self.notice is not None:
            self.notice(text)

    def needs(self, gpus: float) -> dict[str, float]:
        """Return what a worker takes of a node, as Ray is told.

        Args:
            gpus: of a worker, where `worker_gpus` leaves it open.
        """
        return {"num_cpus": self.worker_cpus, "num_gpus": gpus if self.worker_gpus is None else self.worker_gpus}


@contextmanager
def connected(options: ClusterOptions) -> Iterator[Any]:
    """Connect to a cluster.

    Args:
        options: name it.

    Yields:
        The module `ray`. A connection that was there before is used and stays.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray", "ray") from error
    with redirect_stdout(sys.stderr):  # Ray prints what it has to say of dead workers, from a thread of its own
        yield from _connected(ray, options)


def _connected(ray: Any, options: ClusterOptions) -> Iterator[Any]:
    if ray.is_initialized():
        yield ray
        return
    local = options.address is None and not os.environ.get("RAY_ADDRESS")
    more: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = options.address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ClusterError(
            f"the Ray cluster at {where!r} cannot be reached: {str(error).splitlines()[0][:300]}. Expected the address "
            "that `ray start --head` printed, such as 10.0.0.1:6379; Ray and Python must be of one version on all "
            "machines."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def room(ray: Any, needs: dict[str, float]) -> int:
    """Return how many workers the cluster's nodes have room for together.

    Args:
        ray: the module, connected.
        needs: of a worker.

    Returns:
        The number; 0 where no node is large enough.
    """
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            fits = [
                int(there.get(kind, 0.0) / needs[name] + 1e-9)
                for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
                if needs[name]
            ]
            total += min(fits)
    return total
