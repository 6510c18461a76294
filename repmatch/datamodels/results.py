"""What is made from factors and kept: subset adapters and coresets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Adapter:
    """A subset adapter: LoRA factors learned from a subset.

    Attributes:
        id: digest of space, members and training recipe.
        space_id: the space it was trained in.
        subset: how the user named the subset.
        members: digest over the ids and task hashes it was trained on, in order.
        recipe: optimiser, learning rate, epochs, batch size, seed.
        record: steps, losses, accuracy, seconds: what happened.
        a: matrix name -> (r, d_in) float32.
        b: matrix name -> (d_out, r) float32.
        full: parameter name -> float32, what was trained in full beside the factors: the head of a warm start.
    """

    id: str
    space_id: str
    subset: str
    members: str
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    a: Mapping[str, NDArray[np.float32]]
    b: Mapping[str, NDArray[np.float32]]
    full: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Coreset:
    """An ordered selection from a dataset.

    Attributes:
        name: its name in the store.
        dataset: the dataset's name.
        strategy: how it was chosen.
        arguments: everything that repeats it: k, balance or stratify field, seed, algorithm, versions.
        ids: picked ids in pick order, k of them.
        gains: (k,) float64, what each pick added to the objective.
        all_ids: ids of the whole dataset, n of them.
        representative: (n,) int64, for each of `all_ids` the position in `ids` of its pick; -1: none.
        similarity: (n,) float32, score of each of `all_ids` with its representative.
    """

    name: str
    dataset: str
    strategy: str
    arguments: Mapping[str, Any]
    ids: tuple[str, ...]
    gains: NDArray[np.float64]
    all_ids: tuple[str, ...]
    representative: NDArray[np.int64]
    similarity: NDArray[np.float32]
