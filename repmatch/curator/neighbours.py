"""The nearest instances to a stored one or to a new text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.settings import Settings
from repmatch.curator.tabular import Tabular
from repmatch.datamodels import Factors, Row
from repmatch.errors import InputError, UnknownNameError, UsageError
from repmatch.similarity import chance, top_k
from repmatch.store.encoding import RowFormat

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store


@dataclass(frozen=True, repr=False)
class Neighbours(Tabular):
    """The nearest instances, best first, ties by id.

    Attributes:
        dataset: the dataset's name.
        ids: the user's ids.
        scores: (k,) float32; RepMatch in [0, 1], or the signed cosine in [-1, 1].
        signed: which of the two.
        chance: expectation for unrelated random directions (signed: 0).
    """

    dataset: str
    ids: tuple[str, ...]
    scores: NDArray[np.float32]
    signed: bool
    chance: float

    def to_polars(self) -> pl.DataFrame:
        """Return the neighbours as a frame: rank, id, score."""
        import polars as pl

        return pl.DataFrame({"rank": range(1, len(self.ids) + 1), "id": self.ids, "score": self.scores})


def nearest_to_id(store: Store, dataset: str, instance: str, *, k: int = 10, signed: bool = False) -> Neighbours:
    """Find the nearest instances to a stored one, from stored factors alone.

    Args:
        store: the store.
        dataset: the dataset's name.
        instance: the user's id.
        k: how many; the instance itself is left out.
        signed: by the cosine of the two ΔW, which sees labels, in place of the RepMatch score.

    Returns:
        The neighbours.

    Raises:
        UnknownNameError: there is no such instance, or it has no factor yet.
    """
    _check_k(k)
    query = store.factors(dataset, ids=[instance])
    if query.norms.max(initial=0.0) == 0.0:
        raise InputError(
            f"the gradient of {instance!r} is zero in every matrix: a model learns nothing from it; nothing is near."
        )
    return _search(store, dataset, query, k=k, signed=signed, skip=instance)


def nearest_to_text(
    store: Store, dataset: str, row: Row, settings: Settings, *, k: int = 10, signed: bool = False
) -> Neighbours:
    """Find the nearest instances to a text that is not in the store.

    Args:
        store: the store.
        dataset: the dataset's name.
        row: text, maybe a second text, and a label; an empty label: each of the dataset's labels is tried, and an
            instance counts with the best.
        settings: where to find the model, and the device.
        k: how many.
        signed: by the cosine of the two ΔW in place of the RepMatch score.

    Returns:
        The neighbours.

    Raises:
        UnknownNameError: the dataset has no such label.
        InputError: the text is empty.
    """
    _check_k(k)
    if not row.text.strip():
        raise InputError("the text is empty; expected some words after --text.")
    known = store.dataset(dataset)
    if row.label and row.label not in known.labels:
        raise UnknownNameError.of("label", row.label, known.labels, f"labels are those of the dataset {dataset!r}")
    if row.text_pair is not None and known.fields.text_pair_field is None:
        raise UsageError(f"the instances of {dataset!r} are single texts; leave --text-pair out.")
    queries = _factors_of_text(store, dataset, row, (row.label,) if row.label else known.labels, settings)
    found = [_search(store, dataset, query, k=k, signed=signed, skip=None) for query in queries]
    best: dict[str, float] = {}
    for neighbours in found:
        for name, score in zip(neighbours.ids, neighbours.scores.tolist(), strict=True):
            best[name] = max(score, best.get(name, score))
    order = sorted(best, key=lambda name: (-best[name], name))[:k]
    scores = np.asarray([best[name] for name in order], dtype=np.float32)
    return Neighbours(dataset, tuple(order), scores, signed, found[0].chance)


def _check_k(k: int) -> None:
    if k < 1:
        raise UsageError(f"-k {k} is out of range; expected 1 or more.")


def _factors_of_text(
    store: Store, dataset: str, row: Row, labels: tuple[str, ...], settings: Settings
) -> list[Factors]:
    from repmatch.curator.ingest import factors_of
    from repmatch.curator.workbench import Workbench

    known = store.dataset(dataset)
    if known.space_id is None:
        raise UnknownNameError(f"the dataset {dataset!r} has no factors yet; ingest it first.")
    space = store.space(known.space_id)
    bench = Workbench.of_space(space, settings)
    engine, task = bench.engine(len(known.labels)), bench.task(known.labels)
    rows = [replace(row, label=label) for label in labels]
    batch, bad = factors_of(engine, task, rows, task.encode(rows), batch_tokens=bench.batch_tokens)
    if bad:
        raise InputError(f"this text has no factor: {bad[0].reason}.")
    # The query is kept as the dataset's factors are, so that a stored text and the same text typed in score alike.
    form = RowFormat(space.layout, known.encoding)
    queries = []
    for i in range(len(rows)):
        parts = form.decode(form.encode(batch)[i : i + 1])
        queries.append(
            Factors(
                ids=("",),
                layout=space.layout,
                encoding=known.encoding,
                flat=parts.flat,
                bits=parts.bits,
                norms=parts.norms,
                cores=parts.cores,
                space_id=space.id,
            )
        )
    return queries


def _search(store: Store, dataset: str, query: Factors, *, k: int, signed: bool, skip: str | None) -> Neighbours:
    ids: list[str] = []
    scores: list[float] = []
    for factors in store.iter_factors(dataset):
        at = [factors.ids.index(skip)] if skip is not None and skip in factors.ids else []
        places, values = top_k(query, factors, k, signed=signed, exclude=at)
        ids += [factors.ids[i] for i in places]
        scores += values.tolist()
    order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))[:k]
    return Neighbours(
        dataset=dataset,
        ids=tuple(ids[i] for i in order),
        scores=np.asarray([scores[i] for i in order], dtype=np.float32),
        signed=signed,
        chance=0.0 if signed else chance(query.layout),
    )
