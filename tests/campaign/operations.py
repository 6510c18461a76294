"""What the commands write, as operations on a store, each with what it means for the state: the oracle."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from store_worker import make_batch, make_dataset, make_row, make_space, values_of

from campaign.state import State
from repmatch import store as stores
from repmatch.curator.export import write_export
from repmatch.datamodels import Adapter, BadRow, Coreset, Row

SPACE = make_space(dims=(16, 8))


@dataclass(frozen=True)
class Step:
    """One write: `do` on the store is to turn a state into what `then` turns it into, or leave it.

    Attributes:
        kind: which command's write it is.
        target: name of the dataset, subset, coreset or adapter.
        rows: (id, text) of an append.
        ids: instances of a subset, coreset, deletion or of scores.
        seed: numbers to write.
    """

    kind: str
    target: str
    dataset: str = ""
    rows: tuple[tuple[str, str], ...] = ()
    ids: tuple[str, ...] = ()
    seed: int = 0

    def do(self, store: stores.Store, exports: Path) -> None:
        """Write."""
        _DO[self.kind](self, store, exports)

    def then(self, state: State) -> State:
        """What is committed afterwards."""
        after = state.copy()
        _THEN[self.kind](self, after)
        after.rows = {name: rows for name, rows in after.rows.items() if rows}
        return after

    def made(self) -> list[Row]:
        return [make_row(key, text) for key, text in self.rows]


def _ingest(step: Step, store: stores.Store, _: Path) -> None:
    """Like `repmatch ingest`: staged, compared, appended window by window, under a run."""
    with store.writing(), store.stage(step.target) as stage:
        stage.add(step.made())
        stage.resolve(SPACE.id)
        with store.run("ingest", {"dataset": step.target}):
            store.save_space(SPACE)
            store.save_dataset(make_dataset(SPACE, step.target))
            stage.touch()
            for rows in stage.todo():
                store.append(step.target, SPACE.id, "float32", make_batch(rows, SPACE))


def _ingested(step: Step, state: State) -> None:
    rows = state.rows.setdefault(step.target, {})
    for row in step.made():
        old = rows.get(row.id)
        if old is not None and old[0] != row.json:
            for (dataset, _), scores in state.scores.items():
                if dataset == step.target:
                    scores.pop(row.id, None)
        rows[row.id] = (row.json, values_of(row, SPACE).tobytes())
    _tidy(state)


def _tidy(state: State) -> None:
    state.scores = {key: values for key, values in state.scores.items() if values}
    state.subsets = {name: value for name, value in state.subsets.items() if value[1]}


def _coreset(step: Step) -> Coreset:
    k = len(step.ids)
    gains = np.random.default_rng(step.seed).random(k)
    return Coreset(
        *(step.target, step.dataset, "top", {"k": k}, step.ids, gains, step.ids),
        *(np.arange(k), np.ones(k, np.float32)),
    )


def _adapter(step: Step) -> Adapter:
    rng = np.random.default_rng(step.seed)
    a = {m.name: rng.random((1, m.d_in)).astype("f4") for m in SPACE.matrices}
    b = {m.name: rng.random((m.d_out, 1)).astype("f4") for m in SPACE.matrices}
    return Adapter(step.target, SPACE.id, step.dataset, "m", {"lr": 0.1}, {"losses": [1.0]}, a, b)


def _adapted(step: Step, state: State) -> None:
    adapter = _adapter(step)
    parts = [part for name in sorted(adapter.b) for part in (adapter.a[name], adapter.b[name])]
    state.adapters[step.target] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def _numbers(step: Step) -> np.ndarray:
    return np.random.default_rng(step.seed).random(len(step.ids))


def _score(step: Step, store: stores.Store, _: Path) -> None:
    n = len(step.ids)
    store.save_scores(step.dataset, step.target, step.ids, _numbers(step), np.ones((n, 2), "f4"))


def _scored(step: Step, state: State) -> None:
    state.scores[step.dataset, step.target] = dict(zip(step.ids, _numbers(step).tolist(), strict=True))


def _without(state: State, dataset: str, ids: Sequence[str]) -> None:
    going = set(ids)
    for key in ids:
        del state.rows[dataset][key]
    state.coresets = {
        name: value for name, value in state.coresets.items() if value[0] != dataset or not going & set(value[1])
    }
    for name, (owner, members) in list(state.subsets.items()):
        if owner == dataset:
            state.subsets[name] = (owner, tuple(key for key in members if key not in going))
    for (owner, _), values in state.scores.items():
        if owner == dataset:
            for key in ids:
                values.pop(key, None)
    _tidy(state)


def _dropped(step: Step, state: State) -> None:
    _without(state, step.target, list(state.rows[step.target]))
    del state.rows[step.target]
    state.quarantine.pop(step.target, None)
    state.coresets = {name: value for name, value in state.coresets.items() if value[0] != step.target}


def _exported(step: Step, state: State) -> None:
    rows = state.rows[step.dataset]
    lines = [rows[key][0] for key in (step.ids or rows)]
    state.exports[f"{step.target}.jsonl"] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _set_aside(step: Step, store: stores.Store, _: Path) -> None:
    store.quarantine(step.dataset, [BadRow("other.jsonl", step.seed, None, f"reason {step.seed}")])


def _was_set_aside(step: Step, state: State) -> None:
    state.quarantine[step.dataset] = (*state.quarantine.get(step.dataset, ()), f"reason {step.seed}")


def _nothing(_: Step, __: State) -> None:
    return


_DO: dict[str, Callable[[Step, stores.Store, Path], object]] = {
    "ingest": _ingest,
    "subset": lambda step, store, _: store.save_subset(step.target, step.dataset, step.ids),
    "select": lambda step, store, _: store.save_coreset(_coreset(step), replace=True),
    "adapter": lambda step, store, _: store.save_adapter(_adapter(step)),
    "score": _score,
    "delete": lambda step, store, _: store.delete(step.target, ids=step.ids, coresets=True),
    "drop": lambda step, store, _: store.delete_dataset(step.target, coresets=True),
    "compact": lambda _, store, __: store.compact(),
    "repair": lambda _, store, __: store.repair(),
    "quarantine": _set_aside,
    "export": lambda step, store, exports: write_export(
        store, step.target if step.ids else step.dataset, exports / f"{step.target}.jsonl"
    ),
}
_THEN: dict[str, Callable[[Step, State], None]] = {
    "ingest": _ingested,
    "subset": lambda step, state: state.subsets.__setitem__(step.target, (step.dataset, step.ids)),
    "select": lambda step, state: state.coresets.__setitem__(step.target, (step.dataset, step.ids)),
    "adapter": _adapted,
    "score": _scored,
    "delete": lambda step, state: _without(state, step.target, step.ids),
    "drop": _dropped,
    "compact": _nothing,
    "repair": _nothing,
    "quarantine": _was_set_aside,
    "export": _exported,
}
KINDS = tuple(_DO)


class Author:
    """Writes scripts of steps that make sense one after the other.

    Args:
        rng: what decides.
        prefix: start of every name.
        batch: rows of an ingest, at most.
    """

    def __init__(self, rng: random.Random, prefix: str = "d", batch: int = 12) -> None:
        self.rng, self.prefix, self.batch = rng, prefix, batch
        self.state = State()
        self._number = 0

    def script(self, count: int, kinds: Sequence[str] = KINDS) -> list[Step]:
        """Return steps; the first one ingests."""
        out = [self._step("ingest")]
        while len(out) < count:
            step = self._step(self.rng.choice(kinds))
            out.append(step)
        return out

    def _step(self, kind: str) -> Step:
        rng = self.rng
        self._number += 1
        rows = self.state.rows
        filled = [name for name in rows if rows[name]]
        needs_adapter = kind == "score" and not self._adapters()
        if kind != "ingest" and (not filled or needs_adapter):
            kind = "adapter" if needs_adapter and filled else "ingest"
        seed = self._number * 1000 + rng.randrange(1000)
        if kind == "ingest":
            name = self.prefix + rng.choice("xy")
            step = Step(kind, name, rows=self._new_rows(name))
        else:
            dataset = rng.choice(filled)
            ids = tuple(rng.sample(list(rows[dataset]), rng.randint(1, len(rows[dataset]))))
            names = {
                **{"subset": f"{dataset}-s{rng.randrange(2)}", "select": f"{dataset}-c{rng.randrange(2)}"},
                **{"adapter": f"{dataset}-a{self._number}", "delete": dataset, "drop": dataset},
                **{"score": rng.choice(self._adapters() or [""]), "export": f"{dataset}-e{self._number}"},
            }
            target = names.get(kind, f"{dataset}-{kind}")
            if kind == "export":
                mine = [name for name, value in self.state.coresets.items() if value[0] == dataset]
                target = rng.choice(mine) if mine else target
                ids = self.state.coresets[target][1] if mine else ()
            if kind == "delete":
                ids = ids[: max(1, len(rows[dataset]) // 3)]
            step = Step(kind, target, dataset, ids=ids, seed=seed)
        self.state = step.then(self.state)
        return step

    def _adapters(self) -> list[str]:
        return sorted(self.state.adapters)

    def _new_rows(self, dataset: str) -> tuple[tuple[str, str], ...]:
        known = list(self.state.rows.get(dataset, {}))
        again = self.rng.sample(known, min(len(known), self.rng.randint(0, 2)))
        fresh = [f"{dataset}-{self._number}-{i}" for i in range(self.rng.randint(1, self.batch))]
        return tuple((key, f"text {self._number} {self.rng.random()}") for key in [*again, *fresh])


def states(script: Sequence[Step], start: State | None = None) -> list[State]:
    """Return what is committed before the first step and after each."""
    out = [start or State()]
    for step in script:
        out.append(step.then(out[-1]))
    return out


def dump(script: Sequence[Step]) -> str:
    """Return a script as text, to be read again by `load`."""
    return json.dumps([{name: getattr(step, name) for name in step.__dataclass_fields__} for step in script])


def load(text: str) -> list[Step]:
    """Return the script that `dump` wrote."""
    parsed = json.loads(text)
    return [Step(**{**entry, "rows": tuple(map(tuple, entry["rows"])), "ids": tuple(entry["ids"])}) for entry in parsed]
