"""The same search elsewhere: FAISS flat indexes and DuckDB's own functions, on the vectors that our store holds.

Neither can compute the RepMatch score (a mean of squared cosines over matrices), so all answer the signed question:
the mean cosine over matrices, which for equal d_out is the inner product of the concatenated unit vectors, and for
sign codes a function of the Hamming distance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repmatch import store as stores

QUERIES = 20

# Documented defaults, for a BERT-base with query and value adapted; see README.md for where they come from.
BYTES = {
    "LESS, 8,192 float16": 8192 * 2,
    "TRAK, proj_dim 2,048 float16, gradients and features": 2048 * 2 * 2,
    "Bergson, no projection (its default), 24 gradients of 768 × 768 float32": 24 * 768 * 768 * 4,
    "Bergson, projection_dim 16: 24 modules of 16 × 16 float32": 24 * 256 * 4,
}

FAISS = """
import json, sys, time, numpy as np, faiss
kind, path, queries, threads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
faiss.omp_set_num_threads(threads)
data = np.load(path, mmap_mode='r')
began = time.perf_counter()
index = faiss.IndexBinaryFlat(data.shape[1] * 8) if kind == 'binary' else faiss.IndexFlatIP(data.shape[1])
for lo in range(0, len(data), 20000):
    index.add(np.ascontiguousarray(data[lo:lo + 20000]))
built = time.perf_counter() - began
asked = np.ascontiguousarray(data[queries])
index.search(asked[:1], 11)
times = []
for row in range(len(asked)):
    began = time.perf_counter(); d, i = index.search(asked[row:row + 1], 11); times.append(time.perf_counter() - began)
many = np.ascontiguousarray(data[:1000]); began = time.perf_counter(); index.search(many, 11)
at_once = time.perf_counter() - began
d, i = index.search(asked, 11)
peak = [int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
print(json.dumps({'build': built, 'one': sorted(times)[len(times) // 2], 'many': at_once, 'peak': peak,
                  'ids': i.tolist(), 'distances': d.tolist()}))
"""

DUCKDB = """
import json, sys, time, numpy as np, duckdb, pyarrow as pa
kind, path, queries, database = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
data = np.load(path, mmap_mode='r')
conn = duckdb.connect(database)
conn.execute("SET enable_progress_bar = false; SET threads = " + sys.argv[5])
n, width = data.shape
conn.execute(f"CREATE TABLE v (i INTEGER, v {'BLOB' if kind == 'binary' else f'FLOAT[{width}]'})")
began = time.perf_counter()
for lo in range(0, n, 5000):
    part = np.ascontiguousarray(data[lo:lo + 5000])
    if kind == 'binary':
        column = pa.array([row.tobytes() for row in part], pa.binary())
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), width)
    arriving = pa.table({'i': np.arange(lo, lo + len(part), dtype=np.int32), 'v': column})
    conn.execute('INSERT INTO v SELECT * FROM arriving')
if kind == 'binary':
    conn.execute('CREATE TABLE b AS SELECT i, v::BIT AS v FROM v; DROP TABLE v; ALTER TABLE b RENAME TO v')
conn.execute('CHECKPOINT')
built = time.perf_counter() - began
score = 'bit_count(xor(v, (SELECT v FROM v WHERE i = ?)))' if kind == 'binary' else (
    f'-array_inner_product(v, (SELECT v FROM v WHERE i = ?))')
times, ids, distances = [], [], []
for q in queries:
    began = time.perf_counter()
    rows = conn.execute(f'SELECT i, {score} AS s FROM v ORDER BY s, i LIMIT 11', [q]).fetchall()
    times.append(time.perf_counter() - began)
    ids.append([r[0] for r in rows]); distances.append([r[1] for r in rows])
peak = [int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
print(json.dumps({'build': built, 'one': sorted(times)[len(times) // 2], 'peak': peak, 'ids': ids,
                  'distances': distances}))
"""

OURS = """
import json, sys, time
from repmatch import store as stores
store = stores.open(sys.argv[1], mode='r')
names = [f'id-{q:07d}' for q in json.loads(sys.argv[2])]
search = store.search('d')
search.nearest_to(names[:1], 10, signed=True)
times = []
for name in names:
    began = time.perf_counter(); search.nearest_to([name], 10, signed=True); times.append(time.perf_counter() - began)
began = time.perf_counter(); search.nearest_to([f'id-{i:07d}' for i in range(1000)], 10, signed=True)
at_once = time.perf_counter() - began
hits = search.nearest_to(names, 10, signed=True)
peak = [int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
print(json.dumps({'one': sorted(times)[len(times) // 2], 'many': at_once, 'peak': peak,
                  'ids': [[int(i[3:]) for i in h.ids] for h in hits], 'scores': [h.scores.tolist() for h in hits]}))
"""


def compare(
    folder: Path,
    peers: str | None,
    count: int,
    floats: int,
    shape: tuple[int, int],
    batches: Callable[..., Any],
    build: Callable[..., Any],
) -> dict[str, Any]:
    """Search sign codes and float32 vectors in every program.

    Args:
        folder: where data and databases are made; what is made here is removed.
        peers: a Python that has faiss, or None.
        count: sign codes.
        floats: float32 vectors.
        shape: matrices and d_out.
        batches: makes factors.
        build: makes stores.

    Returns:
        Seconds, bytes and recall.
    """
    out: dict[str, Any] = {}
    for kind, n in (("binary", count), ("float32", floats)):
        home = folder / f"peers-{kind}"
        home.mkdir(parents=True, exist_ok=True)
        store, vectors = home / "store", home / "vectors.npy"
        if kind == "binary" and (folder / "million").exists():
            store = folder / "million"
        else:
            build(store, n, shape, "sign" if kind == "binary" else "float32", 16384 if kind == "binary" else 4096)
        _vectors(store, vectors, n, kind)
        queries = json.dumps([(i * 7919) % n for i in range(1, QUERIES + 1)])
        ours = _run(sys.executable, OURS, str(store), queries)
        with stores.open(store, mode="r") as opened:
            ours["bytes"] = opened.info()["bytes"]["segments"]
        rows = {"repmatch": ours}
        if peers:
            rows["FAISS flat"] = _run(peers, FAISS, kind, str(vectors), queries, "2")
            rows["FAISS flat"]["bytes"] = vectors.stat().st_size
        database = home / "peer.duckdb"
        database.unlink(missing_ok=True)
        rows["DuckDB"] = _run(sys.executable, DUCKDB, kind, str(vectors), queries, str(database), "2")
        rows["DuckDB"]["bytes"] = database.stat().st_size
        truth = _truth(vectors, json.loads(queries), kind)
        for name, row in rows.items():
            label = f"{n:,} {kind}: {name}"
            out[f"{label}: one query, seconds"] = row["one"]
            if "many" in row:
                out[f"{label}: 1,000 at once, seconds"] = row["many"]
            out[f"{label}: peak bytes"] = row["peak"]
            out[f"{label}: bytes of vectors on disk or in the index"] = row["bytes"]
            out[f"{label}: recall at 10"] = _recall(truth, row["ids"], json.loads(queries))
        for path in (vectors, database):
            path.unlink(missing_ok=True)
    return out


def _run(python: str, code: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _vectors(store: Path, path: Path, n: int, kind: str) -> None:
    """Write what the store holds as one array: packed bits, or float32."""
    out: Any = None
    lo = 0
    with stores.open(store, mode="r") as opened:
        for part in opened.iter_factors("d", 16384):
            array = part.bits if kind == "binary" else part.flat
            if array is None:
                raise RuntimeError("the store holds another encoding")
            data = np.ascontiguousarray(array).view(np.uint8) if kind == "binary" else np.asarray(array, np.float32)
            if out is None:
                out = np.lib.format.open_memmap(path, "w+", data.dtype, (n, data.shape[1]))
            out[lo : lo + len(data)] = data
            lo += len(data)
    out.flush()


def _truth(path: Path, queries: list[int], kind: str) -> list[list[float]]:
    """Return the exact similarity of every vector with each query, without any of the programs."""
    data = np.load(path, mmap_mode="r")
    out = []
    for q in queries:
        parts = []
        for lo in range(0, len(data), 20000):
            block = data[lo : lo + 20000]
            if kind == "binary":
                parts.append(-np.bitwise_count(block ^ data[q]).sum(axis=1, dtype=np.int64).astype(np.float64))
            else:
                parts.append(block.astype(np.float64) @ data[q].astype(np.float64))
        out.append(np.concatenate(parts))
    return out  # type: ignore[return-value]


def _recall(truth: list[Any], found: list[list[int]], queries: list[int]) -> float:
    """Share of the found that are at least as near as the tenth nearest: ties count as found."""
    good = 0
    for scores, ids, q in zip(truth, found, queries, strict=True):
        rest = np.delete(scores, q)
        bar = np.partition(rest, len(rest) - 10)[len(rest) - 10]
        kept = [i for i in ids if i != q][:10]
        good += sum(scores[i] >= bar - 1e-6 for i in kept)
    return good / (10 * len(queries))


if __name__ == "__main__":
    print(time.strftime("%F"), __doc__)
