"""The nearest instances to a stored one or to a new text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.conversations import conversation, messages_in
from repmatch.curator.ensemble import nearest_by_all, with_others
from repmatch.curator.records import RowProblem, to_json
from repmatch.curator.settings import Settings
from repmatch.curator.tabular import Tabular
from repmatch.datamodels import Factors, Fields, Row
from repmatch.errors import InputError, UnknownNameError, UsageError
from repmatch.printable import shorten
from repmatch.similarity import chance, mean_scores
from repmatch.store.encoding import RowFormat
from repmatch.store.records import encodable

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store
    from repmatch.store.search import Scorer


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


def nearest_to_ids(
    store: Store,
    dataset: str,
    ids: Sequence[str],
    *,
    k: int = 10,
    signed: bool = False,
    where: str | None = None,
    device: str | None = None,
    ensemble: Sequence[str] = (),
) -> list[Neighbours]:
    """Find the nearest instances to stored ones, from stored factors alone, in one pass for all of them.

    Args:
        store: the store.
        dataset: the dataset's name.
        ids: the user's ids.
        k: how many each; the instance itself is left out.
        signed: by the cosine of the two ΔW, which sees labels, in place of the RepMatch score.
        where: an SQL condition that the found instances meet.
        device: "cuda" or "cuda:N" computes there; anything else on the processor, which needs no torch.
        ensemble: datasets that hold the same ids from other starts: scores are means over all of them.

    Returns:
        The neighbours of each, in order.

    Raises:
        UnknownNameError: there is no such instance, or it has no factor yet.
        InputError: the factor of one is zero.
        UsageError: a dataset of the ensemble lacks an id or cannot be put beside the others.
    """
    _check_k(k)
    scorer = _scorer(device)
    search = store.search(dataset, where=where, scorer=scorer)
    queries = with_others(store, dataset, search.factors(ids), ensemble)
    still = np.flatnonzero(queries.norms.max(axis=1, initial=0.0) == 0.0)
    if len(still):
        raise InputError(
            f"the gradient of {ids[int(still[0])]!r} is zero in every matrix: a model learns nothing from it; nothing "
            "is near."
        )
    if ensemble:
        hits = nearest_by_all(store, dataset, queries, ensemble, k=k, signed=signed, where=where, scorer=scorer)
    else:
        hits = search.nearest(queries, k, signed=signed, exclude=ids)
    unrelated = 0.0 if signed else chance(queries.layout)
    return [Neighbours(dataset, hit.ids, hit.scores, signed, unrelated) for hit in hits]


def nearest_to_text(
    store: Store,
    dataset: str,
    row: Row,
    settings: Settings,
    *,
    k: int = 10,
    signed: bool = False,
    where: str | None = None,
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
        where: an SQL condition that the found instances meet.

    Returns:
        The neighbours.

    Raises:
        UnknownNameError: the dataset has no such label.
        UsageError: the text is empty or no text, or its parts are not those of the dataset's rows.
    """
    _check_k(k)
    if not row.text.strip():
        raise UsageError("the text is empty; expected some words after --text.")
    for text in (row.text, row.text_pair or ""):
        if not encodable(text):
            raise UsageError(f"the text {shorten(text)!a} holds half of a surrogate pair; expected whole characters.")
    known = store.dataset(dataset)
    if row.label and known.labels and row.label not in known.labels:
        raise UnknownNameError.of("label", row.label, known.labels, f"labels are those of the dataset {dataset!r}")
    form = known.fields.form
    if form == "messages":
        row = _talk(row, known.fields)
    if row.text_pair is not None and known.fields.text_pair_field is None and form != "messages":
        raise UsageError(f"the instances of {dataset!r} are single texts; leave --text-pair out.")
    if row.text_pair is None and form in ("completion", "messages"):
        raise UsageError(f"the instances of {dataset!r} are prompts with answers; give the answer with --text-pair.")
    if not row.label and form == "numbers":
        raise UsageError(f"the instances of {dataset!r} have a number as label; give it with --label.")
    labels = (row.label,) if row.label or not known.labels else known.labels
    queries = _factors_of_text(store, dataset, row, labels, settings)
    search = store.search(dataset, where=where, scorer=_scorer(settings.device))
    best: dict[str, float] = {}
    for hit in search.nearest(queries, k, signed=signed):
        for name, score in zip(hit.ids, hit.scores.tolist(), strict=True):
            best[name] = max(score, best.get(name, score))
    order = sorted(best, key=lambda name: (-best[name], name))[:k]
    scores = np.asarray([best[name] for name in order], dtype=np.float32)
    return Neighbours(dataset, tuple(order), scores, signed, 0.0 if signed else chance(search.layout))


def _talk(row: Row, fields: Fields) -> Row:
    """A typed row with the conversation that its texts hold as JSON text; the row itself where they hold none."""
    asked, told, column = messages_in(row.text), messages_in(row.text_pair), fields.text_pair_field
    if not (isinstance(asked, list) or isinstance(told, list)) or (column is not None and told is None):
        return row
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    if told is None or isinstance(told, str):
        told = [] if told is None else [{"role": "assistant", "content": told}]
    value = {fields.text_field: asked + told} if column is None else {fields.text_field: asked, column: told}
    try:
        talk = conversation(value, fields.text_field, column)
        return replace(row, json=to_json(value), text=talk.prompt, text_pair=talk.answer)
    except RowProblem as problem:
        reason = str(problem).partition(" Fix the row")[0]
        raise UsageError(f"{reason} Such is the conversation of --text and --text-pair.") from None


def _scorer(device: str | None) -> Scorer:
    if device is None or not device.startswith("cuda"):
        return mean_scores
    from repmatch.curator.device_scores import DeviceScores
    from repmatch.curator.workbench import pick_device

    return DeviceScores(pick_device(device))


def _check_k(k: int) -> None:
    if k < 1:
        raise UsageError(f"-k {k} is out of range; expected 1 or more.")


def _factors_of_text(store: Store, dataset: str, row: Row, labels: tuple[str, ...], settings: Settings) -> Factors:
    from repmatch.curator.batches import factors_of
    from repmatch.curator.workbench import Workbench

    known = store.dataset(dataset)
    if known.space_id is None:
        raise UnknownNameError(f"the dataset {dataset!r} has no factors yet; ingest it first.")
    space = store.space(known.space_id)
    bench = Workbench.of_space(space, settings, store)
    task = bench.task(known.labels, known.fields)
    engine = bench.engine(known.labels, task)
    rows = [replace(row, label=label) for label in labels]
    batch, bad = factors_of(engine, task, rows, task.encode(rows), batch_tokens=bench.batch_tokens)
    if bad:
        raise InputError(f"this text has no factor: {bad[0].reason}.")
    # The query is kept as the dataset's factors are, so that a stored text and the same text typed in score alike.
    form = RowFormat(space.layout, known.encoding)
    parts = form.decode(form.encode(batch))
    return Factors(
        ids=("",) * len(rows),
        layout=space.layout,
        encoding=known.encoding,
        flat=parts.flat,
        bits=parts.bits,
        norms=parts.norms,
        cores=parts.cores,
        space_id=space.id,
    )
