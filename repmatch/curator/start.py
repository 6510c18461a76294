"""The shared start: every random number that adapters of one space have in common.

Each array is drawn from its own generator, keyed by (seed, name), so that a matrix's A or a label's row of the head is
the same whatever else the model or the dataset holds: datasets with different label counts, and stores built at
different times, share the start. numpy's Philox stream is the same on every platform and does not touch torch's or
numpy's global state.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, name: str) -> np.random.Generator:
    """Build the random generator that belongs to a name.

    Args:
        seed: the space's seed.
        name: what is drawn ("lora_A:bert.encoder.layer.0.attention.self.query", "head:classifier.weight:3", ...).

    Returns:
        A Philox generator keyed by the BLAKE2b digest of both.
    """
    key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def draw_a(seed: int, matrix: str, rank: int, d_in: int) -> NDArray[np.float32]:
    """Draw the LoRA factor A of one matrix.

    Uniform in ±1/sqrt(d_in), which is Kaiming-uniform with a = sqrt(5): the distribution peft uses.

    Args:
        seed: the space's seed.
        matrix: the adapted matrix' name.
        rank: rows of A.
        d_in: columns of A.

    Returns:
        (rank, d_in) float32. The rows of a smaller rank are the first rows of a larger one.
    """
    bound = 1.0 / math.sqrt(d_in)
    rows = [generator(seed, f"lora_A:{matrix}:{row}").uniform(-bound, bound, d_in) for row in range(rank)]
    return np.asarray(rows, dtype=np.float32)


def draw_head_rows(seed: int, name: str, shape: tuple[int, int], std: float) -> NDArray[np.float32]:
    """Draw the classifying layer row by row, a row a label.

    Args:
        seed: the space's seed.
        name: the parameter's name.
        shape: (labels, d_in).
        std: standard deviation of the normal distribution.

    Returns:
        `shape` float32; row i depends on i only, not on how many labels there are.
    """
    rows = [generator(seed, f"head:{name}:{row}").normal(0.0, std, shape[1]) for row in range(shape[0])]
    return np.asarray(rows, dtype=np.float32).reshape(shape)


def draw_parameter(seed: int, name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    """Draw any other parameter that a checkpoint lacks.

    Args:
        seed: the space's seed.
        name: the parameter's name; biases are zero, 1-D weights (normalisation layers) are one.
        shape: its shape.
        std: standard deviation of the normal distribution.

    Returns:
        `shape` float32.
    """
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    return generator(seed, f"parameter:{name}").normal(0.0, std, shape).astype(np.float32)
