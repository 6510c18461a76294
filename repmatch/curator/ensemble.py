"""Ensembles: the same instances from several starts, or several models, compared by all of them together.

One start's head and adapters are one draw of chance. The kernel averages over matrices, so that matrices of several
spaces set side by side give the mean of the spaces' kernels: what several starts agree on stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.best import Best
from repmatch.blocks import take
from repmatch.datamodels import Factors, Layout, Matrix, digest
from repmatch.errors import UnknownNameError, UsageError
from repmatch.ranking import TIE
from repmatch.similarity import against, mean_scores
from repmatch.store.search import Hits

if TYPE_CHECKING:
    from repmatch.store import Store
    from repmatch.store.search import Scorer


def with_others(store: Store, dataset: str, factors: Factors, others: Sequence[str]) -> Factors:
    """Add the factors that other datasets hold of the same ids.

    Args:
        store: the store.
        dataset: the dataset that `factors` are of.
        factors: n instances.
        others: names of datasets that hold every one of these ids: the same rows, ingested from other starts.

    Returns:
        Factors of all together, see `side_by_side`; `factors` themselves where there are no others.

    Raises:
        UnknownNameError: no such dataset.
        UsageError: a dataset is named twice or lacks an id, or their factors cannot be put together.
    """
    if not others:
        return factors
    parts, names = [factors], [dataset, *others]
    for place, name in enumerate(others):
        if name in names[: place + 1]:
            raise UsageError(f"the ensemble holds {name!r} twice; name each dataset once.")
        store.dataset(name)
        try:
            parts.append(store.factors(name, ids=factors.ids))
        except UnknownNameError as error:
            raise UsageError(
                f"the dataset {name!r} cannot join an ensemble with {dataset!r}: {error} Expected the same rows in "
                "both: ingest the same file from another start."
            ) from error
    return side_by_side(parts, names)


def nearest_by_all(
    store: Store,
    dataset: str,
    queries: Factors,
    others: Sequence[str],
    *,
    k: int,
    signed: bool = False,
    where: str | None = None,
    scorer: Scorer = mean_scores,
) -> list[Hits]:
    """Find the nearest instances by the mean over an ensemble, in one pass and bounded memory.

    Args:
        store: the store.
        dataset: the dataset that is searched.
        queries: instances of it, from `with_others`; each is left out of its own hits.
        others: the ensemble's other datasets.
        k: how many each, 1 or more.
        signed: by the cosine of the two ΔW in place of the RepMatch score.
        where: an SQL condition that the found instances meet.
        scorer: computes scores of all pairs.

    Returns:
        Exact hits for each query, in order; equal scores in order of their ids.
    """
    wanted = None if where is None else set(store.members(store.resolve(f"{dataset}[{where}]")).ids)
    names: list[str] = []

    def exactly(query: int, places: NDArray[np.int64]) -> list[tuple[float, str]]:
        """Return (negative score, id) of some places, best first."""
        found = [names[place] for place in places.tolist()]
        rows = with_others(store, dataset, store.factors(dataset, ids=found), others)
        scores = against(take(queries, [query]), rows, signed=signed, exact=True).mean(axis=1)
        return sorted(zip((-scores).tolist(), found, strict=True))

    def settle(query: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        kept = {name for _, name in exactly(query, places)[: best.k]}
        return np.array([place for place in places.tolist() if names[place] in kept], np.int64)

    # One more than asked for: an instance finds itself first.
    best = Best(len(queries), k + 1, TIE, np.full(len(queries), -1, np.int64), settle)
    for part in store.iter_factors(dataset):
        chosen = part if wanted is None else take(part, [i for i, name in enumerate(part.ids) if name in wanted])
        if len(chosen):
            scores = scorer(queries, with_others(store, dataset, chosen, others), signed=signed)
            best.add(scores, len(names))
            names += chosen.ids
    out = []
    for query, own in enumerate(queries.ids):
        ranked = exactly(query, best.candidates(query)[0]) if names else []
        hits = [(name, -score) for score, name in ranked if name != own][:k]
        out.append(Hits(tuple(name for name, _ in hits), np.array([score for _, score in hits], np.float32)))
    return out


def plain_name(matrix: str) -> str:
    """Return a matrix's name without the part of an ensemble that it is of.

    Args:
        matrix: its name in `side_by_side`, or outside of ensembles.
    """
    return matrix.partition("@")[0]


def side_by_side(parts: Sequence[Factors], names: Sequence[str]) -> Factors:
    """Put the matrices of several spaces side by side, for the same instances.

    Every matrix counts the same, so that scores, kernels and signed cosines are means over the parts where these have
    the same number of matrices.

    Args:
        parts: two or more, with the same ids in the same order.
        names: what each is called.

    Returns:
        (n, all widths) factors; a matrix is named MATRIX@NAME. They are of a space of their own.

    Raises:
        UsageError: rank or encoding differ.
    """
    first = parts[0]
    for part, name in zip(parts, names, strict=True):
        for what, mine, other in (
            ("rank", part.layout.rank, first.layout.rank),
            ("encoding", part.encoding, first.encoding),
        ):
            if mine != other:
                raise UsageError(
                    f"{name!r} has the {what} {mine}, {names[0]!r} {other}; an ensemble needs one {what}. Ingest them "
                    f"with the same --{what}."
                )
    matrices = [
        Matrix(f"{matrix.name}@{name}", matrix.d_out, matrix.d_in)
        for part, name in zip(parts, names, strict=True)
        for matrix in part.layout.matrices
    ]

    def joined(field: str) -> NDArray[Any] | None:
        held = [getattr(part, field) for part in parts]
        return None if held[0] is None else np.concatenate(held, axis=1)

    norms = joined("norms")
    assert norms is not None
    return replace(
        first,
        layout=Layout(tuple(matrices), first.layout.rank),
        flat=joined("flat"),
        bits=joined("bits"),
        norms=norms,
        cores=joined("cores"),
        space_id=digest([part.space_id for part in parts]),
    )
