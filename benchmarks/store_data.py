"""Generated factors for the store's measurements, and one writer for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repmatch import store as stores
from repmatch.datamodels import Dataset, Encoding, FactorBatch, Fields, Matrix, Row, Space

WORDS = "the film is a slow and moving story of two people who never say what they mean until it is too late"


def space_of(matrices: int, d: int) -> Space:
    """Return a space of so many matrices of d_out d, rank 1."""
    adapted = tuple(Matrix(f"layer.{i}", d, d) for i in range(matrices))
    step = {"name": "adamw", "steps": 1}
    return Space("generated", "0" * 64, "0" * 64, "sequence-classification", "x", 64, 1, 4.0, 0, adapted, step)


def rows_of(lo: int, hi: int) -> tuple[Row, ...]:
    """Return rows of about 60 characters of text, as a user's would be."""
    out, words = [], WORDS.split()
    for i in range(lo, hi):
        text = " ".join(words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(12)) + f" {i}"
        label = ("negative", "positive")[i % 2]
        raw = json.dumps({"id": f"id-{i:07d}", "text": text, "label": label})
        out.append(Row(f"id-{i:07d}", raw, text, None, label, f"{i:032x}", f"{i + 1:032x}", "generated.jsonl", i + 1))
    return tuple(out)


def batches(count: int, matrices: int, d: int, size: int, *, signs: bool) -> Iterator[FactorBatch]:
    """Yield factors in batches: random unit vectors, or random signs over √d; the same for the same arguments."""
    for lo in range(0, count, size):
        rng = np.random.default_rng([count, matrices, d, lo])
        n, width = min(size, count - lo), matrices * d
        if signs:
            bits = np.unpackbits(rng.integers(0, 256, (n, -(-width // 8)), dtype=np.uint8), axis=1, count=width)
            values = np.where(bits, np.float32(-1 / np.sqrt(d)), np.float32(1 / np.sqrt(d)))
        else:
            values = rng.standard_normal((n, width), dtype=np.float32)
            blocks = values.reshape(n, matrices, d)
            blocks /= np.linalg.norm(blocks, axis=2, keepdims=True)
        yield FactorBatch(
            rows=rows_of(lo, lo + n),
            values=values,
            cores=None,
            norms=rng.uniform(0.1, 2.0, (n, matrices)).astype(np.float32),
            losses=rng.uniform(0.1, 2.0, n).astype(np.float32),
            tokens=rng.integers(5, 60, n, dtype=np.int32),
            truncated=np.zeros(n, np.bool_),
        )


def build(path: Path, count: int, shape: tuple[int, int], encoding: Encoding, size: int) -> list[float]:
    """Write a store of generated factors.

    Args:
        path: the store's folder.
        count: instances.
        shape: matrices and d_out.
        encoding: how they are kept.
        size: instances a commit.

    Returns:
        Seconds of each `append`; making the factors is not in them.
    """
    space, seconds = space_of(*shape), []
    store = stores.open(path)
    with store.writing():
        store.save_space(space)
        fields, columns = Fields("id", "text", None, "label"), {"id": "string", "text": "string", "label": "string"}
        store.save_dataset(Dataset("d", fields, ("negative", "positive"), columns, space.id, encoding))
        for batch in batches(count, *shape, size, signs=encoding == "sign"):
            began = time.perf_counter()
            store.append("d", space.id, encoding, batch)
            seconds.append(time.perf_counter() - began)
    store.close()
    return seconds
