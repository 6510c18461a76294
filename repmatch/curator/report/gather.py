"""What the report shows, as plain JSON values, read from a store; nothing is trained and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.curator.export import command_of, versions
from repmatch.curator.report.adapters import adapter_scores, loss_curves, retrainings
from repmatch.curator.report.kernel import SEARCHED, Layout, Tell, group_similarities, nearest, plane
from repmatch.curator.report.points import Points, choose_points, describe, groups_of
from repmatch.datamodels import Coreset, Space
from repmatch.errors import StoreError, UsageError
from repmatch.similarity import chance
from repmatch.store.records import stored_object

if TYPE_CHECKING:
    from repmatch.store import Store

MOST_POINTS = 20_000
_SHOWN_NEIGHBOURS = 6
_GROUPED = 3000  # instances that group similarities are measured on
_SHOWN_PICKS = 30
_MOST_SCORES = 20_000


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        datasets: their names; empty: all of the store that have factors.
        points: instances on the map at most; more are sampled.
        layout: "auto", "tsne" or "pca".
        seed: of the sample and the layout.
        title: of the page; None: made from the datasets.
    """

    datasets: tuple[str, ...] = ()
    points: int = MOST_POINTS
    layout: Layout = "auto"
    seed: int = 0
    title: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.points < 2:
            raise UsageError(f"--points {self.points} is too small; expected 2 or more.")


def gather(store: Store, options: ReportOptions, tell: Tell | None = None) -> dict[str, Any]:
    """Gather everything that a report shows.

    Args:
        store: the store.
        options: what to show.
        tell: progress.

    Returns:
        Plain JSON values; one section a space, for scores of different spaces cannot be compared.

    Raises:
        StoreError: there is no dataset with factors, or one that is asked for has none.
        UnknownNameError: a dataset does not exist.
    """
    counts = dict(store.datasets().select("name", "factors").iter_rows())
    names = options.datasets or tuple(name for name, factors in counts.items() if factors)
    by_space: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        space_id = store.dataset(name).space_id
        if space_id is None or not counts[name]:
            raise StoreError(
                f"the dataset {name!r} has no factors yet, so there is nothing to draw; compute them, or wait for the "
                f"ingest that is under way: repmatch ingest FILE --dataset {name}"
            )
        by_space.setdefault(space_id, []).append(name)
    if not by_space:
        raise StoreError("there is no dataset with factors to report on; run: repmatch ingest FILE --dataset NAME")
    sections = [_section(store, store.space(i), own, options, tell) for i, own in by_space.items()]
    return {
        "title": options.title or "repmatch: " + ", ".join(dict.fromkeys(names)),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sections": sections,
        "runs": _runs(store),
        "retrainings": retrainings(store, set(names)),
    }


def _section(store: Store, space: Space, names: list[str], options: ReportOptions, tell: Tell | None) -> dict[str, Any]:
    known = store.coresets()
    coresets = [store.coreset(row["name"]) for row in known.to_dicts() if row["dataset"] in names]
    must = {name: {pick for c in coresets if c.dataset == name for pick in c.ids} for name in names}
    points = choose_points(store, names, options.points, options.seed, must)
    described = describe(store, points, names, coresets)
    labels = [row_label for name in names for row_label in _labels(store, name, points)]
    places, scores = nearest(points.factors, SEARCHED, tell)
    xy, layout = plane(points.factors, places, scores, layout=options.layout, seed=options.seed, tell=tell)
    described |= {
        "x": _rounded(xy[:, 0]),
        "y": _rounded(xy[:, 1]),
        "near": places[:, :_SHOWN_NEIGHBOURS].tolist(),
        "near_scores": np.round(scores[:, :_SHOWN_NEIGHBOURS].astype(np.float64), 4).tolist(),
        "layout": layout,
        "total": points.total,
    }
    level = chance(space.layout)
    matrices = short_names(space.layout.names)
    return {
        "space": {"id": space.id, "model": space.model, **_plain(space)},
        "chance": level,
        "matrices": matrices,
        "datasets": [_dataset(store, name) for name in names],
        "groups": _groups(points, labels, matrices, options.seed),
        "adapters": adapter_scores(store, space, names, matrices),
        "profile": _profile(store, names),
        "scores": [s for s in (_score_values(store, name) for name in names) if s],
        "map": described,
        "coresets": [_coreset(store, c, described) for c in coresets],
        "losses": loss_curves(store, space, names),
    }


def _labels(store: Store, name: str, points: Points) -> list[str]:
    ids = [row_id for row_id, dataset in zip(points.ids, points.datasets, strict=True) if dataset == name]
    members = store.members(store.resolve(name))
    known = dict(zip(members.ids, members.labels, strict=True))
    return [known[row_id] for row_id in ids]


def _plain(space: Space) -> dict[str, Any]:
    return {name: value for name, value in space.identity.items() if name != "matrices"}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]


def _dataset(store: Store, name: str) -> dict[str, Any]:
    from collections import Counter

    dataset, members = store.dataset(name), store.members(store.resolve(name))
    return {
        "name": name,
        "rows": len(members.ids),
        "labels": Counter(members.labels).most_common(),
        "encoding": dataset.encoding,
        "digest": members.row_digest,
    }


def _groups(points: Points, labels: Sequence[str], matrices: list[str], seed: int) -> dict[str, Any]:
    """Mean scores between instances of datasets and labels, on an even sample of the groups."""
    names, groups = groups_of(points, labels)
    shuffled = np.random.default_rng([seed, 1]).permutation(len(groups))
    share = max(2, _GROUPED // max(1, len(names)))
    parts = [shuffled[groups[shuffled] == g][:share] for g in range(len(names))]
    at = np.sort(np.concatenate(parts))
    layers = group_similarities(take(points.factors, at), groups[at], len(names))
    counts = [int((groups == g).sum()) for g in range(len(names))]
    return {"names": names, "sizes": counts, "sampled": len(at), "layers": by_layer(layers, matrices)}


def by_layer(layers: NDArray[np.float64], matrices: list[str]) -> list[dict[str, Any]]:
    """Return a stack of matrices of scores as JSON values, their mean first.

    Args:
        layers: (m, s, s) float64, NaN where there is none.
        matrices: m short names.

    Returns:
        `{"name", "values"}` each, null for NaN.
    """
    with np.errstate(invalid="ignore"):
        stack = [("mean of all matrices", layers.mean(axis=0)), *zip(matrices, layers, strict=True)]
    return [
        {"name": name, "values": [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in values]}
        for name, values in stack
    ]


def _profile(store: Store, names: Sequence[str]) -> list[dict[str, Any]]:
    """Mean score of a dataset's instances against an adapter, per matrix: where they agree with the whole."""
    found = []
    adapters = store.adapters().to_dicts()
    for name in names:
        for row in [r for r in adapters if r["space_id"] != "imported"][::-1]:
            scores = store.scores(name, row["id"])
            if scores.height:
                values = np.asarray(scores["per_matrix"].to_list(), np.float64).mean(axis=0)
                found.append({"dataset": name, "against": row["subset"], "values": values.round(5).tolist()})
            if sum(f["dataset"] == name for f in found) == 4:
                break
    return found


def _score_values(store: Store, name: str) -> dict[str, Any] | None:
    scores = store.latest_scores(name)
    if not scores.height:
        return None
    members = store.members(store.resolve(name))
    known = dict(zip(members.ids, members.labels, strict=True))
    rows = scores.select("id", "score").rows()
    if len(rows) > _MOST_SCORES:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:_MOST_SCORES]]
    return {
        "dataset": name,
        "against": scores["against"][0],
        "labels": [known[row_id] for row_id, _ in rows],
        "values": [round(score, 5) for _, score in rows],
    }


def _coreset(store: Store, coreset: Coreset, described: dict[str, Any]) -> dict[str, Any]:
    stands = coreset.representative[coreset.representative >= 0]
    weights = np.bincount(stands, minlength=len(coreset.ids))
    first = {row.id: row for row in store.tasks(coreset.dataset, ids=list(coreset.ids[:_SHOWN_PICKS]))}
    at = {key: i for i, key in enumerate(zip(described["datasets"], described["ids"], strict=True))}
    picks = []
    for rank, pick in enumerate(coreset.ids[:_SHOWN_PICKS]):
        row = first[pick]
        text = row.text if len(row.text) <= 240 else row.text[:239] + "…"
        shown = {"rank": rank + 1, "id": pick, "label": row.label, "text": text, "represents": int(weights[rank])}
        picks.append(
            shown | {"gain": round(float(coreset.gains[rank]), 5), "point": at.get((coreset.dataset, pick), -1)}
        )
    return {
        "name": coreset.name,
        "dataset": coreset.dataset,
        "strategy": coreset.strategy,
        "size": len(coreset.ids),
        "of": len(coreset.all_ids),
        "mean_similarity": round(float(coreset.similarity.mean()), 5) if len(coreset.similarity) else None,
        "command": command_of(coreset),
        "gains": [round(float(g), 5) for g in coreset.gains[:2000]],
        "picks": picks,
    }


def _runs(store: Store) -> list[dict[str, Any]]:
    found = []
    for row in store.runs().tail(50).to_dicts()[::-1]:
        arguments = stored_object(row["arguments"], "the record of a run")
        arguments.pop("folder", None)  # where it ran: a report is for others to read, too
        seconds = None if row["ended"] is None else round((row["ended"] - row["started"]).total_seconds(), 1)
        kept = {"run": row["run"], "command": row["command"], "started": str(row["started"])[:19], "seconds": seconds}
        found.append(kept | {"status": row["status"], "arguments": arguments})
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """Shorten matrix names to the parts in which they differ.

    Args:
        names: dotted names.

    Returns:
        As many, still different: `0 query` for `bert.encoder.layer.0.attention.self.query`.
    """
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(p) for p in parts}) > 1:
        return list(names)
    kept = [i for i in range(len(parts[0])) if len({p[i] for p in parts}) > 1]
    return [" ".join(p[i] for i in kept) for p in parts]
