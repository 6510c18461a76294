"""Ingest on a real local cluster: a head without work, and nodes that are processes of their own and get killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows

import repmatch
from repmatch import __version__
from repmatch.curator import windows
from repmatch.curator.cluster import crew as crews
from repmatch.curator.cluster.connection import ClusterOptions, connected, room
from repmatch.curator.cluster.crew import Crew
from repmatch.errors import ClusterError, ModelError, UsageError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'repmatch[ray]'")

WINDOW = 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of a head for the driver and two nodes of one core."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    # Ray gives its workers the lowest priority; on a busy machine they would not come up in time.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    cloudpickle.register_pickle_by_value(__import__(__name__))  # the nodes cannot import tests
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.spare = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    before, windows._WINDOW_ROWS = windows._WINDOW_ROWS, (WINDOW, WINDOW)
    yield made
    windows._WINDOW_ROWS = before
    ray.shutdown()
    made.shutdown()


@pytest.fixture(autouse=True)
def settled(cluster: Any) -> None:
    """Wait until Ray has missed the nodes that an earlier test killed: it gives work to them until then."""
    cluster.wait_for_nodes(60)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = toy_rows(100)
    rows.insert(3, {"id": "textless", "label": "no"})
    return write_rows(tmp_path_factory.mktemp("cluster-rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path, cluster: Any) -> dict[str, Any]:
    """What one process makes of the rows."""
    path = tmp_path_factory.mktemp("one") / "store"
    with repmatch.open(path) as store:
        repmatch.Curator(store, str(tiny_model)).ingest(rows_file, "toy")
    return content(path)


def content(path: Path) -> dict[str, Any]:
    with repmatch.open(path, mode="r") as store:
        assert store.verify() == []
        factors = store.factors("toy")
        facts = store.sql("SELECT id, loss, tokens, truncated FROM instances ORDER BY id").rows()
        return {
            "ids": store.ids("toy"),
            "bytes": np.asarray(factors.flat).tobytes(),
            "norms": factors.norms.tobytes(),
            "rows": list(store.rows("toy")),
            "facts": facts,
            "bad": store.sql("SELECT line, id, reason FROM quarantine").rows(),
        }


def test_a_cluster_makes_what_one_process_makes(
    tmp_path: Path, tiny_model: Path, rows_file: Path, whole: dict[str, Any], cluster: Any, run: Run
) -> None:
    out = run(
        *("--store", tmp_path / "s", "ingest", rows_file, "--dataset", "toy", "--model", tiny_model),
        *("--engine", "ray", "--json"),
    )
    assert out.code == 1  # one row is bad
    assert {"new": 100, "quarantined": 1}.items() <= json.loads(out.out).items()
    assert content(tmp_path / "s") == whole
    with repmatch.open(tmp_path / "s", mode="r") as store:
        detail = store.runs()["detail"].str.json_decode().to_list()[0]
    nodes = detail["cluster"]["nodes"]
    assert detail["cluster"]["died"] == 0
    assert sum(node["instances"] for node in nodes.values() if node) == 100
    assert all(name in out.err for name in nodes)
    assert "1 workers" in out.err


@pytest.mark.timeout(240)
def test_a_node_killed_at_work_leaves_no_trace(
    tmp_path: Path, tiny_model: Path, rows_file: Path, whole: dict[str, Any], cluster: Any
) -> None:
    told: list[str] = []
    seen: list[int] = []

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage != "factors":
            return
        seen.append(done)
        if done >= 2 * WINDOW and cluster.spare:
            node = cluster.spare.pop()
            cluster.remove_node(node, allow_graceful=False)  # SIGKILL of its processes
            assert len([n for n in ray.nodes() if n["Alive"]]) <= 3
            cluster.spare.clear()
            cluster.add_node(num_cpus=1)

    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, str(tiny_model), progress=progress)
        report = curator.ingest(rows_file, "toy", cluster=ClusterOptions(notice=told.append))
    assert report.new == report.computed == 100
    assert content(tmp_path / "s") == whole
    assert report.detail["cluster"]["died"] >= 1
    assert any("died" in line for line in told)
    assert seen == sorted(seen)
    assert seen[-1] == 101 - 1


DRIVER = """
import sys
import time
import repmatch
from repmatch.curator import windows
from repmatch.curator.cluster.connection import ClusterOptions
windows._WINDOW_ROWS = ({window}, {window})

def progress(*told):
    print(*told, file=sys.stderr, flush=True)
    if told[0] == "factors":  # so that it is at work still when it is killed
        time.sleep(0.5)

with repmatch.open({store!r}) as store:
    repmatch.Curator(store, {model!r}, progress=progress).ingest(
        {rows!r}, "toy", cluster=ClusterOptions(address={address!r}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_that_is_killed_is_followed_by_the_next_run(
    tmp_path: Path, tiny_model: Path, rows_file: Path, whole: dict[str, Any], cluster: Any
) -> None:
    given = {"store": tmp_path / "s", "model": tiny_model, "rows": rows_file, "address": cluster.address}
    text = DRIVER.format(window=WINDOW, **{name: str(value) for name, value in given.items()})
    with subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:
            if line.startswith("factors 3"):  # three windows are stored
                driver.kill()
                break
    assert driver.returncode == -signal.SIGKILL
    with repmatch.open(tmp_path / "s") as store:
        stored = len(store.factors("toy"))
        assert 3 * WINDOW <= stored < 100
        assert stored % WINDOW == 0
        report = repmatch.Curator(store, str(tiny_model)).ingest(rows_file, "toy", cluster=ClusterOptions(workers=1))
        assert report.computed == 100 - stored
    assert content(tmp_path / "s") == whole


def test_a_selection_on_the_cluster_is_that_of_parts_on_one_machine(
    tmp_path: Path, toy_store: Path, cluster: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repmatch.selectors.large.PART", 16)
    found = {}
    for name, more in (
        ("here", ("--algorithm", "partitioned")),
        ("there", ("--engine", "ray")),
        ("herd", ("--engine", "ray", "--strategy", "herding")),
    ):
        arguments = ("--store", toy_store, "select", "toy", "-k", 6, "--balance", "label", "--name", name, *more)
        out = run(*arguments, "--json")
        assert out.code == 0, out.err
        picks = [
            json.loads(line) for line in out.out.splitlines() if line.startswith("{")
        ]  # the fixture's Ray prints too
        found[name] = [pick["id"] for pick in picks]
        assert "4 parts" in out.err
        assert ("2 workers" in out.err or "1 workers" in out.err) == (name != "here")
    assert found["there"] == found["here"]
    assert len(set(found["herd"])) == 6


class Echo:
    """A worker whose jobs are what to do."""

    def hello(self) -> tuple[str, str]:
        return crews.check_in()

    def work(self, what: str, number: int) -> int:
        if what == "fail":
            raise ModelError(f"number {number} cannot be computed")
        if what == "die":
            os._exit(1)
        if what == "hang":  # once
            path = Path(f"/tmp/repmatch-hung-{number}")
            if not path.exists():
                path.touch()
                time.sleep(600)
            path.unlink()
        time.sleep(0.05 * (number % 3))
        return number * number


def test_results_come_in_order_whatever_order_they_are_done_in(cluster: Any) -> None:
    with Crew(ray, Echo, (), ClusterOptions(workers=2)) as crew:
        found = list(crew.run((("square", i), 1) for i in range(25)))
        assert [result for _, result in found] == [i * i for i in range(25)]
        assert [arguments[1] for arguments, _ in found] == list(range(25))
        assert sum(node.instances for node in crew.nodes.values()) == 25
        assert list(crew.run(iter([]))) == []


def test_work_that_fails_raises_its_own_error(cluster: Any) -> None:
    jobs = [("square", 1), ("fail", 2), ("square", 3)]
    with Crew(ray, Echo, (), ClusterOptions(workers=1)) as crew:
        with pytest.raises(ModelError, match="number 2 cannot be computed"):
            list(crew.run((job, 1) for job in jobs))
        assert crew.died == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_work_that_kills_every_worker_is_given_up(cluster: Any) -> None:
    told: list[str] = []
    jobs = [("square", 1), ("die", 2), ("square", 3), ("square", 4)]
    with Crew(ray, Echo, (), ClusterOptions(workers=1, notice=told.append)) as crew:
        results = crew.run((job, 7) for job in jobs)
        assert next(results)[1] == 1  # perhaps lost with the worker that died of the next, and computed again
        with pytest.raises(ClusterError, match=r"4 workers died while they computed the same 7 instances"):
            list(results)
    assert crew.died == 4
    assert sum("computed again" in line for line in told) == 3


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "PATIENCE", 8.0)
    jobs = [("square", 0), ("square", 3), ("hang", os.getpid()), ("square", 6)]
    with Crew(ray, Echo, (), ClusterOptions(workers=1)) as crew:
        found = [result for _, result in crew.run((job, 1) for job in jobs)]
    assert found == [number * number for _, number in jobs]
    assert crew.died == 1


def test_a_cluster_without_room_or_without_an_answer_is_told(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, run: Run, toy_file: Path
) -> None:
    assert room(ray, {"num_cpus": 1, "num_gpus": 0}) == 2
    with pytest.raises(ClusterError, match="no node of the cluster has 64 cores and 0 GPUs"):
        Crew(ray, Echo, (), ClusterOptions(worker_cpus=64))
    with pytest.raises(UsageError, match="--workers 0 is out of range"):
        ClusterOptions(workers=0)
    out = run("ingest", toy_file, "--dataset", "d", "--workers", "3")
    assert (out.code, "--workers goes with --engine ray" in out.err) == (2, True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refused(**_: Any) -> None:
        raise ConnectionError("nobody listens\nat all")

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(ClusterError, match=r"'1.2.3.4:6379' cannot be reached: nobody listens\. Expected"):
        with connected(ClusterOptions(address="1.2.3.4:6379")):
            pass


def test_a_node_with_another_version_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "__version__", "9.9")
    with Crew(ray, Echo, (), ClusterOptions(workers=1)) as crew:
        with pytest.raises(ClusterError, match=rf"has repmatch {__version__}, this machine 9\.9"):
            list(crew.run(iter([(("square", 1), 1)])))
