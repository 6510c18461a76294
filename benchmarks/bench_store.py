"""The adapter store at a million instances, and the same search in FAISS and DuckDB.

    python benchmarks/bench_store.py --json store.json

Parts (--only): build, search, peers, large, bytes. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import store_peers
from machine import describe, run, say, watching
from store_data import batches, build

from repmatch import store as stores
from repmatch.datamodels import Encoding
from repmatch.store.encoding import RowFormat

ROOT = Path(__file__).resolve().parent.parent
SMALL = (12, 384)
BASE = (24, 768)


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def timed(function: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of some calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "catalog.duckdb":
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def part_build(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Append a million sign codes."""
    shutil.rmtree(store, ignore_errors=True)
    with watching() as watch:
        seconds = build(store, options.count, SMALL, "sign", options.commit)
    with stores.open(store, mode="r") as opened:
        info = opened.info()
    packed = options.count * RowFormat(opened_layout(SMALL), "sign").value_bytes
    return {
        "instances": options.count,
        "a commit": options.commit,
        "append, instances a second": options.count / sum(seconds),
        "append, median commit, instances a second": options.commit / statistics.median(seconds),
        "packed codes, bytes": packed,
        "segment rows with norms, bytes": info["encodings"][0]["bytes"],
        "segments, share of packed codes": info["bytes"]["segments"] / packed,
        "catalog, bytes": info["bytes"]["catalog"],
        "journals, bytes": info["bytes"]["journals"],
        "other processes, cores": watch.others,
    }


def opened_layout(shape: tuple[int, int]) -> Any:
    """Return the layout of generated factors."""
    from store_data import space_of

    return space_of(*shape).layout


def part_search(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time the command from a cold process, then searches in one process."""
    command = [sys.executable, "-m", "repmatch", "--store", str(store), "nearest", "d", "id-0000017", "--json"]
    run(command)  # compiles and caches the loops once per installation
    cold = [run(command) for _ in range(options.repeats)]
    forget(store)
    from_disk = run(command)
    worker = [sys.executable, str(ROOT / "benchmarks" / "bench_store.py"), "--store", str(store), "--worker"]
    one = json.loads(run([*worker, "one", "--repeats", str(options.repeats)]).stdout)
    many = json.loads(run([*worker, "many"]).stdout)
    return {
        "cold `nearest` command, seconds": statistics.median(ran.seconds for ran in cold),
        "cold `nearest` command, processor seconds": statistics.median(ran.cpu for ran in cold),
        "same, files not in the page cache, seconds": from_disk.seconds,
        "cold `nearest` command, peak bytes": max(ran.peak_bytes for ran in cold),
        "other processes, cores": max(ran.others for ran in cold),
        **one,
        **many,
        "1,000 at once against one by one": one["warm top-10, seconds"] * 1000 / many["1,000 queries at once, seconds"],
    }


def worker_one(store: Path, repeats: int) -> dict[str, Any]:
    """Search with one query at a time."""
    with stores.open(store, mode="r") as opened:
        began = time.perf_counter()
        search = opened.search("d")
        ready = time.perf_counter() - began
        names = [f"id-{i * 997 % len(search):07d}" for i in range(1, 4 * repeats)]
        search.nearest_to(names[:1], 10)
        coming = iter(names[1:])
        found = timed(lambda: search.nearest_to([next(coming)], 10), 3 * repeats)
        with watching() as watch:
            filtered = timed(lambda: opened.search("d", where="label = 'positive'").nearest_to(names[:1], 10), 2)
    return {
        "opening a search, seconds": ready,
        "warm top-10, seconds": found,
        "opening with --where and top-10, seconds": filtered,
        "one query, peak bytes": peak(),
        "other processes while filtering, cores": watch.others,
    }


def worker_many(store: Path) -> dict[str, Any]:
    """Search with a thousand queries at once."""
    with stores.open(store, mode="r") as opened:
        search = opened.search("d")
        names = [f"id-{i * 997 % len(search):07d}" for i in range(1000)]
        search.nearest_to(names[:3], 10)
        seconds = timed(lambda: search.nearest_to(names, 10), 1)
    return {"1,000 queries at once, seconds": seconds, "1,000 queries, peak bytes": peak()}


def part_large(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """BERT-base size: append, scan to torch, top-10."""
    out: dict[str, Any] = {"instances": options.large}
    encodings: tuple[Encoding, ...] = ("float16", "sign")
    for encoding in encodings:
        store = folder / f"large-{encoding}"
        shutil.rmtree(store, ignore_errors=True)
        seconds = build(store, options.large, BASE, encoding, 4096)
        out[f"{encoding}: append, instances a second"] = options.large / sum(seconds)
        out[f"{encoding}: append, MB of rows a second"] = (
            options.large * RowFormat(opened_layout(BASE), encoding).row_bytes / sum(seconds) / 1e6
        )
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_store.py"), "--store", str(store), "--worker"]
        ran = json.loads(run([*command, "large"]).stdout)
        out |= {f"{encoding}: {name}": value for name, value in ran.items()}
        shutil.rmtree(store)
    return out


def worker_large(store: Path) -> dict[str, Any]:
    """Scan a store into torch tensors, and search it."""
    import torch

    with stores.open(store, mode="r") as opened:
        search = opened.search("d")
        search.nearest_to(["id-0000017"], 10)
        top = timed(lambda: search.nearest_to(["id-0000018"], 10), 3)
        began, total, size = time.perf_counter(), 0.0, 0
        for part in opened.iter_factors("d", 8192):
            array = part.flat if part.flat is not None else part.bits
            if array is None:
                continue
            tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
            total += float(tensor[:, ::4096].float().sum())
            size += tensor.numel()
        seconds = time.perf_counter() - began
    return {
        "top-10, seconds": top,
        "scan to torch, seconds": seconds,
        "scan to torch, MB a second": size / seconds / 1e6,
        "peak bytes": peak(),
    }


def part_peers(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Search the same data, signed, in our store, FAISS flat and DuckDB."""
    return store_peers.compare(folder, options.peers, options.count, options.floats, SMALL, batches, build)


def part_bytes(_: Path, __: argparse.Namespace) -> dict[str, Any]:
    """Bytes an instance of BERT-base, query and value of twelve layers."""
    ours = {
        f"repmatch {encoding}": RowFormat(opened_layout(BASE), encoding).row_bytes
        for encoding in ("sign", "float16", "float32")
    }
    return ours | store_peers.BYTES


def render(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(describe())
    for part, values in results.items():
        print(f"\n{part}")
        for name, value in values.items():
            if isinstance(value, float):
                text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value < 0.1 else f"{value:,.2f}"
            else:
                text = f"{value:,}" if isinstance(value, int) else str(value)
            print(f"  {name:<76}{text:>16}")


def alone(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "part.json"
        command = [sys.executable, __file__, "--only", name, "--dir", str(folder), "--json", str(found)]
        for option in ("count", "commit", "large", "floats", "repeats", "peers"):
            if getattr(options, option) is not None:
                command += [f"--{option}", str(getattr(options, option))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(found.read_text()))


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["build", "search", "peers", "large", "bytes"])
    parser.add_argument("--count", type=int, default=1_000_000, help="instances of 12 × 384 sign codes")
    parser.add_argument("--commit", type=int, default=32768, help="instances a commit")
    parser.add_argument("--large", type=int, default=100_000, help="instances of 24 × 768")
    parser.add_argument("--floats", type=int, default=100_000, help="instances of the float32 comparison")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where the stores are built; kept. Default: a temporary folder")
    parser.add_argument("--peers", default=None, help="a Python that has faiss; without it FAISS is left out")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker = {"one": lambda s: worker_one(s, options.repeats), "many": worker_many, "large": worker_large}
        print(json.dumps(worker[options.worker](options.store)))
        return
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    folder = options.dir or Path(tempfile.mkdtemp(prefix="repmatch-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in options.only:
            if len(options.only) > 1:  # a process each: what one part has used must not count in the next one's peak
                results |= alone(name, folder, options)
            else:
                say(f"{name} …")
                place = folder if name in ("peers", "large", "bytes") else folder / "million"
                results[name] = globals()[f"part_{name}"](place, options)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    finally:
        if options.dir is None:
            shutil.rmtree(folder)
    render(results)


if __name__ == "__main__":
    main()
