"""Ingest on nodes in network namespaces of their own: a node whose cable is pulled is only silent, not dead."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_rows, write_rows

import repmatch
from repmatch.curator import windows
from repmatch.curator.cluster.connection import ClusterOptions

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'repmatch[ray]'")
pytestmark = pytest.mark.slow

NET = "10.213.77"
HEAD = f"{NET}.1"
PORT = 6377
NAME = f"rpm{os.getpid() % 10000}"
# How soon a node that is silent counts as dead; Ray waits up to a minute by default.
QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[list[str]]:
    """A bridge and two namespaces on it; yields the cables."""
    cables = [f"{NAME}v{i}" for i in (2, 3)]
    try:
        if not shutil.which("ip"):
            pytest.skip("there is no command ip, so there are no network namespaces")
        ip("link", "add", NAME, "type", "bridge")
        ip("addr", "add", f"{HEAD}/24", "dev", NAME)
        ip("link", "set", NAME, "up")
        for i, cable in zip((2, 3), cables, strict=True):
            space = f"{NAME}n{i}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", NAME, "up")
            ip("-n", space, "addr", "add", f"{NET}.{i}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove_network(cables)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield cables
    _remove_network(cables)


def _remove_network(cables: list[str]) -> None:
    for words in (*(("netns", "del", f"{NAME}n{i}") for i in (2, 3)), *(("link", "del", c) for c in (*cables, NAME))):
        subprocess.run(["ip", *words], check=False, capture_output=True)


def node(*words: str, space: str | None = None) -> subprocess.Popen[bytes]:
    """Start a node that ends with its process."""
    inside = [] if space is None else ["ip", "netns", "exec", space]
    ray_command = Path(sys.executable).with_name("ray")
    env = {**os.environ, **QUICK, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    command = [*inside, str(ray_command), "start", "--block", *words]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(count: int, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while sum(n["Alive"] for n in ray.nodes()) < count:
        assert time.monotonic() < end, ray.nodes()
        time.sleep(0.5)


@pytest.fixture
def cluster(network: list[str]) -> Iterator[list[str]]:
    """A head in this namespace and a node in each of the others; yields the cables."""
    nodes = [node("--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")]
    try:
        for attempt in range(30):
            time.sleep(2)
            try:
                ray.init(address=f"{HEAD}:{PORT}", log_to_driver=False, logging_level="ERROR")
                break
            except ConnectionError:
                assert attempt < 29
        for i in (2, 3):  # one after the other: they share this machine's session folder
            more = (f"--address={HEAD}:{PORT}", f"--node-ip-address={NET}.{i}", "--num-cpus=1")
            nodes.append(node(*more, space=f"{NAME}n{i}"))
            wait_for(i)
        yield network
    finally:
        ray.shutdown()
        for process in reversed(nodes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stored(path: Path) -> list[Any]:
    with repmatch.open(path, mode="r") as store:
        assert store.verify() == []
        factors = store.factors("toy")
        assert factors.flat is not None
        return [store.ids("toy"), factors.flat.tobytes(), list(store.rows("toy"))]


@pytest.mark.timeout(400)
def test_a_node_whose_cable_is_pulled_leaves_no_trace(
    tmp_path: Path, tiny_model: Path, cluster: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_WINDOW_ROWS", (5, 5))
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(150))
    told: list[str] = []
    cables = list(cluster)

    def progress(stage: str, done: int, total: int | None) -> None:
        busy = ray.nodes() if stage == "factors" and cables else []
        if done >= 50 and sum(n["Alive"] for n in busy) == 3:
            ip("link", "set", cables.pop(), "down")
            cables.clear()

    with repmatch.open(tmp_path / "there") as store:
        curator = repmatch.Curator(store, str(tiny_model), progress=progress)
        report = curator.ingest(rows, "toy", cluster=ClusterOptions(notice=told.append, workers=2))
    assert not cables
    assert report.computed == 150
    with repmatch.open(tmp_path / "here") as store:
        repmatch.Curator(store, str(tiny_model)).ingest(rows, "toy")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    addresses = {name.partition("/")[0] for name in report.detail["cluster"]["nodes"]}
    assert f"{NET}.2" in addresses
    assert addresses <= {f"{NET}.2", f"{NET}.3"}  # the other may not have come to deliver anything
    assert report.detail["cluster"]["died"] >= 1
    assert any("computed again" in line for line in told)
