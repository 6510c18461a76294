"""What a report shows of trained adapters: their scores with each other, their losses, and retrainings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.datamodels import Adapter, Space
from repmatch.errors import RepMatchError
from repmatch.similarity import matrix_scores, orthonormal
from repmatch.store.records import stored_object

if TYPE_CHECKING:
    from repmatch.store import Store

_MOST_ADAPTERS = 16
_MOST_STEPS = 300


def adapter_scores(store: Store, space: Space, names: Sequence[str], matrices: list[str]) -> dict[str, Any] | None:
    """Return the RepMatch scores between the subset adapters that the store holds.

    Args:
        store: the store.
        space: their space.
        names: datasets that they are of.
        matrices: short names of the matrices.

    Returns:
        Names and scores per matrix, None with fewer than two adapters.
    """
    from repmatch.curator.report.gather import by_layer

    adapters = current_adapters(store, space, names)[-_MOST_ADAPTERS:]
    if len(adapters) < 2:
        return None
    frames = [[orthonormal(a.b[m.name], a.a[m.name]) for m in space.matrices] for a in adapters]
    scores = np.empty((len(space.matrices), len(adapters), len(adapters)))
    for i, one in enumerate(frames):
        for j, two in enumerate(frames):
            scores[:, i, j] = matrix_scores(one, two)
    return {
        "names": [_shown(a) for a in adapters],
        "sizes": [int(a.record.get("instances", 0)) for a in adapters],
        "layers": by_layer(scores, matrices),
    }


def current_adapters(store: Store, space: Space, names: Sequence[str]) -> list[Adapter]:
    """Return the adapters whose rows are still what they were trained on, the newest of each subset and recipe.

    Args:
        store: the store.
        space: their space.
        names: datasets that they are of.

    Returns:
        The adapters in the order in which they were trained.
    """
    found: dict[tuple[str, str], Adapter] = {}
    for row in store.adapters().to_dicts():
        if row["space_id"] != space.id:
            continue
        try:
            subset = store.resolve(row["subset"])
            if subset.dataset in names and store.members(subset).digest == row["members"]:
                adapter = store.adapter(row["id"])
                if adapter is not None and set(adapter.b) >= {m.name for m in space.matrices}:
                    found[row["subset"], row["recipe"]] = adapter
        except RepMatchError:
            continue  # a subset that was renamed or narrowed by hand: nothing to show of it
    return list(found.values())


def _shown(adapter: Adapter) -> str:
    epochs = adapter.recipe.get("epochs")
    return adapter.subset if epochs in (None, 3) else f"{adapter.subset} ({epochs} epoch{'s' if epochs != 1 else ''})"


def loss_curves(store: Store, space: Space, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the training losses of the subset adapters.

    Args:
        store: the store.
        space: their space.
        names: datasets that they are of.

    Returns:
        Name, steps and losses of each, thinned to a few hundred steps by means.
    """
    curves = []
    for adapter in current_adapters(store, space, names)[-_MOST_ADAPTERS:]:
        losses = np.asarray(adapter.record.get("losses", ()), np.float64)
        if len(losses) < 2:
            continue
        width = -(-len(losses) // _MOST_STEPS)
        edges = np.arange(0, len(losses), width)
        means = np.add.reduceat(losses, edges) / np.diff(np.append(edges, len(losses)))
        curves.append({"name": _shown(adapter), "steps": (edges + 1).tolist(), "losses": means.round(5).tolist()})
    return curves


def retrainings(store: Store, names: Collection[str]) -> list[dict[str, Any]]:
    """Return the curves of the last evaluation of each dataset: how models trained on selections did on held-out rows.

    Args:
        store: the store.
        names: datasets that they are of.

    Returns:
        A candidate each: how its rows were chosen, dataset, test rows, and by size mean accuracy, the ends of its 95 %
        interval (None for one seed) and the seeds' accuracies.
    """
    last = {}
    for row in store.runs().to_dicts():
        if row["command"] == "evaluate" and row["status"] == "ok":
            what = "the record of an evaluation"
            arguments, detail = stored_object(row["arguments"], what), stored_object(row["detail"], what)
            last[str(arguments.get("dataset"))] = detail
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for dataset, detail in last.items():
        if dataset not in names:
            continue
        for line in detail["lines"]:
            fresh = {"selection": line["candidate"], "dataset": dataset, "test_rows": detail["test_rows"], "curve": []}
            kept = {name: line[name] for name in ("size", "accuracy", "low", "high", "accuracies")}
            found.setdefault((dataset, line["candidate"]), fresh)["curve"].append(kept)
    return list(found.values())
