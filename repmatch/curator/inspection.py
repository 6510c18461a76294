"""One instance explained: its row, scores by layer, what is near, what is opposed, the picks that stand for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.curator.neighbours import Neighbours, nearest_to_ids
from repmatch.curator.report.gather import short_names
from repmatch.errors import InputError, RepMatchError
from repmatch.similarity import chance, score_instance
from repmatch.store.records import stored_object

if TYPE_CHECKING:
    from repmatch.datamodels import Factors, Row
    from repmatch.store import Store


@dataclass(frozen=True)
class StandIn:
    """How a coreset represents an instance.

    Attributes:
        coreset: the coreset's name.
        pick: id of the pick that stands for it; its own where it was picked, None where nothing does.
        similarity: score with that pick.
        rank: its own place among the picks, from 1; None where it was left out.
        gain: what it added where it was picked.
        represents: instances it stands for where it was picked, itself included.
    """

    coreset: str
    pick: str | None
    similarity: float | None
    rank: int | None = None
    gain: float | None = None
    represents: int | None = None


@dataclass(frozen=True)
class Inspection:
    """One instance explained.

    Attributes:
        dataset: its dataset.
        row: the row with the fields that the task reads.
        place: its number in the dataset, from 1, and how many there are.
        facts: loss at the shared start, tokens, whether it was cut.
        matrices: short names of the adapted matrices.
        gradient: norm of ∂L/∂B in each of them.
        scores: subset -> (score, score in each matrix) of every adapter that the instance was scored against.
        nearest: by the RepMatch score; None where its factor is zero.
        signed: by the cosine, which sees labels; None likewise.
        opposed: (id, cosine) of those that pull against it most, strongest first.
        stand_ins: one a coreset of its dataset.
        adapters: subsets in the store that were trained on it.
        runs: (number, command, started, status) of what was done to its dataset.
        chance: expectation for unrelated random directions.
    """

    dataset: str
    row: Row
    place: tuple[int, int]
    facts: dict[str, Any]
    matrices: tuple[str, ...]
    gradient: tuple[float, ...]
    scores: dict[str, tuple[float, tuple[float, ...]]]
    nearest: Neighbours | None
    signed: Neighbours | None
    opposed: tuple[tuple[str, float], ...]
    stand_ins: tuple[StandIn, ...]
    adapters: tuple[str, ...]
    runs: tuple[tuple[int, str, str, str], ...]
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""

        def near(found: Neighbours | None) -> list[dict[str, Any]]:
            if found is None:
                return []
            return [{"id": i, "score": float(s)} for i, s in zip(found.ids, found.scores, strict=True)]

        return {
            "dataset": self.dataset,
            "id": self.row.id,
            "row": json.loads(self.row.json),
            "place": list(self.place),
            "label": self.row.label,
            **self.facts,
            "chance": self.chance,
            "gradient": dict(zip(self.matrices, self.gradient, strict=True)),
            "scores": {name: {"score": score, "layers": list(layers)} for name, (score, layers) in self.scores.items()},
            "nearest": near(self.nearest),
            "signed": near(self.signed),
            "opposed": [{"id": i, "score": s} for i, s in self.opposed],
            "stand_ins": [vars(stand_in) for stand_in in self.stand_ins],
            "adapters": list(self.adapters),
            "runs": [dict(zip(("run", "command", "started", "status"), run, strict=True)) for run in self.runs],
        }


def inspect(store: Store, dataset: str, instance: str, *, k: int = 5) -> Inspection:
    """Explain one instance from what the store holds; nothing is trained.

    Args:
        store: the store.
        dataset: the dataset's name.
        instance: the user's id.
        k: how many near and opposed ones.

    Returns:
        The explanation.

    Raises:
        UnknownNameError: there is no such dataset or instance, or it has no factor yet.
    """
    row = next(iter(store.tasks(dataset, ids=[instance])))
    factors = store.factors(dataset, ids=[instance])
    alive = bool(factors.norms.max(initial=0.0) > 0.0)
    ids = store.ids(dataset)
    asked = "SELECT loss, tokens, truncated FROM instances WHERE dataset = ? AND id = ?"
    found = store.sql(asked, [dataset, instance]).row(0, named=True)
    return Inspection(
        dataset=dataset,
        row=row,
        place=(ids.index(instance) + 1, len(ids)),
        facts={"loss": found["loss"], "tokens": found["tokens"], "truncated": found["truncated"]},
        matrices=tuple(short_names(factors.layout.names)),
        gradient=tuple(float(v) for v in factors.norms[0]),
        scores=_scores(store, dataset, instance),
        nearest=nearest_to_ids(store, dataset, [instance], k=k)[0] if alive else None,
        signed=_signed(store, dataset, instance, k) if alive else None,
        opposed=_opposed(store, dataset, factors, k) if alive else (),
        stand_ins=_stand_ins(store, dataset, instance),
        adapters=_adapters(store, dataset, instance),
        runs=_runs(store, dataset),
        chance=chance(factors.layout),
    )


def _signed(store: Store, dataset: str, instance: str, k: int) -> Neighbours | None:
    try:
        return nearest_to_ids(store, dataset, [instance], k=k, signed=True)[0]
    except InputError:
        return None


def _opposed(store: Store, dataset: str, query: Factors, k: int) -> tuple[tuple[str, float], ...]:
    found: list[tuple[float, str]] = []
    for factors in store.iter_factors(dataset):
        cosines = score_instance(factors, query, signed=True).mean(axis=1)
        worst = np.argsort(cosines, kind="stable")[:k]
        found += [(float(cosines[i]), factors.ids[i]) for i in worst if cosines[i] < 0]
    return tuple((name, cosine) for cosine, name in sorted(found)[:k])


def _scores(store: Store, dataset: str, instance: str) -> dict[str, tuple[float, tuple[float, ...]]]:
    rows = store.sql(
        "SELECT a.subset, s.score, s.per_matrix FROM scores s JOIN adapters a ON a.id = s.adapter "
        "WHERE s.dataset = ? AND s.id = ? ORDER BY a.created, a.subset",
        [dataset, instance],
    )
    return {subset: (float(score), tuple(float(v) for v in layers)) for subset, score, layers in rows.iter_rows()}


def _stand_ins(store: Store, dataset: str, instance: str) -> tuple[StandIn, ...]:
    found = []
    for row in store.coresets().to_dicts():
        if row["dataset"] != dataset:
            continue
        coreset = store.coreset(row["name"])
        if instance not in coreset.all_ids:
            continue
        at = coreset.all_ids.index(instance)
        place, similarity = int(coreset.representative[at]), float(coreset.similarity[at])
        pick = coreset.ids[place] if place >= 0 else None
        if instance in coreset.ids:
            own = coreset.ids.index(instance)
            weight = int((coreset.representative == own).sum())
            found.append(StandIn(coreset.name, pick, similarity, own + 1, float(coreset.gains[own]), weight))
        else:
            found.append(StandIn(coreset.name, pick, similarity if pick is not None else None))
    return tuple(found)


def _adapters(store: Store, dataset: str, instance: str) -> tuple[str, ...]:
    """Name the subsets with a trained adapter that hold the instance now."""
    found: dict[str, None] = {}
    for row in store.adapters().to_dicts():
        if row["space_id"] == "imported":
            continue
        try:
            subset = store.resolve(row["subset"])
            if subset.dataset == dataset and instance in store.members(subset).ids:
                found[row["subset"]] = None
        except RepMatchError:
            continue  # its subset is gone or was narrowed by hand
    return tuple(found)


def _runs(store: Store, dataset: str) -> tuple[tuple[int, str, str, str], ...]:
    found = []
    asked = "SELECT run, command, arguments, started, status FROM runs ORDER BY run"
    for row in store.arrow(asked, plain=True).to_pylist():  # times as text, whatever they are
        if stored_object(row["arguments"], "the record of a run").get("dataset") == dataset:
            found.append((int(row["run"]), str(row["command"]), str(row["started"])[:19], str(row["status"])))
    return tuple(found)
