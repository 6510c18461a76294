"""A crew of workers on a cluster: who died is replaced, and what it was at is done again by others.

Ray could restart actors by itself; it would also wait for ever for a node that does not come back, with the work of the
dead actor in its queue. So work stays with the driver until its result is here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from repmatch import __version__
from repmatch.curator.cluster.connection import ClusterOptions, room
from repmatch.errors import ClusterError

AHEAD = 2  # jobs that a worker is given at once, so that it never waits for the driver
ATTEMPTS = 4  # workers that one job may kill
PATIENCE = 600.0  # seconds without any worker after which the cluster is given up
SLOWER = 20.0  # times the slowest job so far, and PATIENCE: a worker that takes longer hangs
_POLL = 1.0
NOTICE = 10.0  # seconds between lines about throughput


@dataclass
class Node:
    """What a node did.

    Attributes:
        workers: that are alive there.
        instances: computed there.
        seconds: since its first worker was ready.
    """

    workers: int = 0
    instances: int = 0
    seconds: float = 0.0
    began: float = 0.0


@dataclass
class _Job:
    number: int
    arguments: tuple[Any, ...]
    size: int
    deaths: int = 0


@dataclass
class _Worker:
    handle: Any
    node: str = ""
    ready: Any = None
    since: float = 0.0  # when it went on to its present job
    jobs: dict[Any, _Job] = field(default_factory=dict)

    def takes(self, job: _Job | None) -> bool:
        """Whether it can be given a job, None: one that is new.

        A job that a worker died with is done alone: only then is it known what the next one dies of.
        """
        suspect = any(j.deaths for j in [*self.jobs.values(), *([] if job is None else [job])])
        return self.ready is None and len(self.jobs) < (1 if suspect else AHEAD)


class Crew:
    """Workers of one kind, and the jobs given to them.

    Attributes:
        nodes: what each node did, by its address.
        died: workers that died.

    Args:
        ray: the module, connected.
        make: the actor class; its instances answer `hello()` with (version, node) once ready, and `work(*arguments)`.
        given: what the class is made with.
        options: how many workers, and what each takes.
        gpus: of a worker, where the options leave it open.
    """

    def __init__(
        self, ray: Any, make: type, given: tuple[Any, ...], options: ClusterOptions, gpus: float = 0.0
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.died = 0
        self._ray = ray
        self._options = options
        needs = options.needs(gpus)
        self._wanted = options.workers or room(ray, needs)
        if not self._wanted:
            raise ClusterError(
                f"no node of the cluster has {needs['num_cpus']:g} cores and {needs['num_gpus']:g} GPUs for a worker; "
                "ask for less with --worker-cpus and --worker-gpus, or name how many will come with --workers."
            )
        self._kind = ray.remote(max_restarts=0, max_task_retries=0, **needs)(make)
        self._given = tuple(ray.put(value) for value in given)
        self._workers: list[_Worker] = []
        self._slowest = 0.0
        self._told = self._alone = time.monotonic()

    def __enter__(self) -> Crew:
        for _ in range(self._wanted):
            self._hire()
        return self

    def __exit__(self, *_: object) -> None:
        """Let all workers go."""
        for worker in self._workers:
            self._ray.kill(worker.handle)
        self._workers.clear()

    def run(self, jobs: Iterator[tuple[tuple[Any, ...], int]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Do jobs side by side.

        Args:
            jobs: (arguments, instances) of each, taken as workers become free.

        Yields:
            (arguments, result) in the order of the jobs.

        Raises:
            ClusterError: a job killed several workers, or there has been no worker for long.
        """
        waiting: deque[_Job] = deque()
        open_jobs: dict[int, _Job] = {}  # not yielded yet
        done: dict[int, Any] = {}
        number = head = 0
        ended = False
        while True:
            while not ended and len(open_jobs) < (AHEAD + 1) * max(1, self._wanted) and self._free(waiting):
                found = next(jobs, None)
                if found is None:
                    ended = True
                    break
                job = _Job(number, *found)
                number += 1
                open_jobs[job.number] = job
                waiting.append(job)
                self._hand_out(waiting)
            while head in done:
                job = open_jobs.pop(head)
                yield job.arguments, done.pop(head)
                head += 1
            if ended and not open_jobs:
                return
            for job, result in self._collect(waiting):
                done[job.number] = result
            self._hand_out(waiting)
            self._check_alone()

    def _free(self, waiting: deque[_Job]) -> bool:
        return not waiting and any(worker.takes(None) for worker in self._workers)

    def _hire(self) -> None:
        handle = self._kind.remote(*self._given)
        self._workers.append(_Worker(handle, ready=handle.hello.remote()))

    def _hand_out(self, waiting: deque[_Job]) -> None:
        while waiting:
            able = [worker for worker in self._workers if worker.takes(waiting[0])]
            if not able:
                return
            worker = min(able, key=lambda w: len(w.jobs))
            if not worker.jobs:
                worker.since = time.monotonic()
            job = waiting.popleft()
            worker.jobs[worker.handle.work.remote(*job.arguments)] = job

    def _collect(self, waiting: deque[_Job]) -> list[tuple[_Job, Any]]:
        """Wait a little; return what was finished, and put back what was lost."""
        refs = {ref: w for w in self._workers for ref in ([w.ready] if w.ready is not None else w.jobs)}
        ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=_POLL) if refs else ([], [])
        found: list[tuple[_Job, Any]] = []
        for ref in ready:
            worker = refs[ref]
            result, error = self._result(ref)
            if error is not None:
                found += self._salvage(worker, ref)
                self._replace(worker, error, waiting)
            elif ref == worker.ready:
                self._welcome(worker, *result)
            else:
                found.append((self._finish(worker, ref), result))
        for worker in [w for w in self._workers if self._hangs(w)]:
            self._replace(worker, TimeoutError("it hung"), waiting)
        self._tell()
        return found

    def _hangs(self, worker: _Worker) -> bool:
        """Whether a worker is at one job for far longer than any job has taken."""
        limit = max(PATIENCE, SLOWER * self._slowest) if self._slowest else float("inf")
        return bool(worker.jobs) and time.monotonic() - worker.since > limit

    def _finish(self, worker: _Worker, ref: Any) -> _Job:
        job = worker.jobs.pop(ref)
        now = time.monotonic()
        self._slowest, worker.since = max(self._slowest, now - worker.since), now
        self.nodes[worker.node].instances += job.size
        return job

    def _result(self, ref: Any) -> tuple[Any, Exception | None]:
        """Return a result, or why it was lost with its worker or node."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(ref), None
        except RayTaskError as error:  # the work itself failed, and would fail anywhere
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayError as error:
            return None, error

    def _salvage(self, worker: _Worker, dead: Any) -> list[tuple[_Job, Any]]:
        """Return what a dead worker had finished before the job that it died of."""
        others = [ref for ref in worker.jobs if ref != dead]
        ready, _ = self._ray.wait(others, num_returns=len(others), timeout=0) if others else ([], [])
        found = []
        for ref in ready:
            result, error = self._result(ref)
            if error is None:
                found.append((self._finish(worker, ref), result))
        return found

    def _replace(self, worker: _Worker, error: Exception, waiting: deque[_Job]) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.handle)
        self.died += 1
        lost = list(worker.jobs.values())
        for job in lost:
            job.deaths += 1
        if lost and lost[0].deaths >= ATTEMPTS:
            raise ClusterError(
                f"{ATTEMPTS} workers died while they computed the same {lost[0].size} instances: "
                f"{str(error).splitlines()[0][:300]}. Perhaps a worker needs more memory than its node has: fewer of "
                "them a node with --worker-cpus, smaller batches with --batch-tokens. What was stored stays."
            )
        if not worker.node and self.died >= ATTEMPTS * self._wanted:
            raise ClusterError(
                f"no worker comes up on the cluster: {str(error).splitlines()[0][:300]}. repmatch and the base model "
                "must be on every node under the same path."
            )
        waiting.extendleft(reversed(lost))
        if worker.node:
            self.nodes[worker.node].workers -= 1
        again = f"; {sum(job.size for job in lost)} instances are computed again" if lost else ""
        self._options.say(f"a worker on {worker.node or 'a node'} died{again}")
        self._hire()

    def _welcome(self, worker: _Worker, version: str, node: str) -> None:
        if version != __version__:
            raise ClusterError(
                f"the node {node} has repmatch {version}, this machine {__version__}; expected the same."
            )
        worker.ready, worker.node = None, node
        there = self.nodes.setdefault(node, Node(began=time.monotonic()))
        there.workers += 1
        if self.died:
            self._options.say(f"a new worker on {node}")

    def _check_alone(self) -> None:
        now = time.monotonic()
        if any(w.ready is None for w in self._workers):
            self._alone = now
        elif now - self._alone > PATIENCE:
            raise ClusterError(
                f"the cluster has had no worker for {PATIENCE:.0f} s; start nodes with `ray start --address=...` and "
                "run the same command again: what was stored stays."
            )

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= NOTICE:
            self._told = now
            self._options.say(self.summary())

    def summary(self) -> str:
        """Return one line: workers, instances and instances a second of each node."""
        now = time.monotonic()
        parts = []
        for name, node in sorted(self.nodes.items()):
            node.seconds = now - node.began if node.workers else node.seconds
            rate = node.instances / max(node.seconds or now - node.began, 1e-9)
            parts.append(f"{name}: {node.workers} workers, {node.instances} instances, {rate:.1f}/s")
        return "; ".join(parts) or "no worker is ready yet"


def check_in() -> tuple[str, str]:
    """Return this worker's version and node, from inside a worker."""
    import ray

    address: Any = ray.util.get_node_ip_address
    return __version__, f"{address()}/{ray.get_runtime_context().get_node_id()[:6]}"
