"""Make a small store by the code of some commit, and write down what it holds; README.md says how it is run.

    PYTHONPATH=OLD:OLD/tests python tests/data/make_store.py OUT.tar.xz

Nothing here but what every version of the store has had from the first on: it runs under the code of any commit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def contents(store: Any) -> dict[str, Any]:
    """Return all that a store holds as plain values; the oracle of the tests is the same function.

    Args:
        store: an open store.

    Returns:
        Rows as they came, SHA-256 of factors, their scales and adapters, scores, subsets, coresets, quarantine, runs.
    """
    out: dict[str, Any] = {"rows": {}, "factors": {}, "adapters": {}, "scores": {}, "coresets": {}, "subsets": {}}
    for name in sorted(store.datasets()["name"].to_list()):
        out["rows"][name] = [list(pair) for pair in store.rows(name)]
        found = store.factors(name)
        arrays = [found.flat if found.flat is not None else found.bits, found.norms]
        out["factors"][name] = {"ids": list(found.ids), "sha256": [_sum(array) for array in arrays]}
        for adapter in store.adapters()["id"].to_list():
            frame = store.scores(name, adapter)
            if frame.height:
                out["scores"][f"{name} {adapter}"] = [[key, score] for key, score, _ in frame.rows()]
    for key in store.adapters()["id"].to_list():
        adapter = store.adapter(key)
        parts = {f"{side}/{name}": _sum(array) for side in "ab" for name, array in getattr(adapter, side).items()}
        out["adapters"][key] = {"subset": adapter.subset, "recipe": dict(adapter.recipe), "sha256": parts}
    for name in store.coresets()["name"].to_list():
        c = store.coreset(name)
        numbers = [c.gains.tolist(), c.representative.tolist(), c.similarity.tolist()]
        out["coresets"][name] = [c.dataset, c.strategy, list(c.ids), list(c.all_ids), *numbers]
    for name in store.subsets()["name"].to_list():
        out["subsets"][name] = [store.resolve(name).dataset, list(store.members(store.resolve(name)).ids)]
    out["quarantine"] = store.sql("SELECT dataset, line, reason FROM quarantine ORDER BY line").rows()
    out["runs"] = store.sql("SELECT command, status FROM runs ORDER BY run").rows()
    return dict(json.loads(json.dumps(out)))


def _sum(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def make(folder: Path) -> dict[str, Any]:
    """Make a store by ingesting, changing, scoring, selecting; return its contents."""
    from tiny_models import checkpoint, sentences

    import repmatch
    from repmatch.datamodels import BadRow

    model = checkpoint(folder / "bert")
    rows = [
        {"id": f"r{i}", "text": text, "label": ("no", "yes")[i % 2], "n": i} for i, text in enumerate(sentences(24))
    ]
    file = folder / "rows.jsonl"

    def write(records: list[dict[str, Any]]) -> Path:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    with repmatch.open(folder / "store") as store:
        store.segment_bytes = 4096 + 2000  # several segments, all but the last one sealed
        curator = repmatch.Curator(store, str(model))
        curator.ingest(write(rows), "floats")
        store.quarantine("floats", [BadRow("rows.jsonl", 25, "bad", "no text")])
        changed = [{**rows[3], "text": "the film was very dull"}, {"id": "new", "text": "it is loud", "label": "yes"}]
        curator.ingest(write(changed), "floats")
        curator.ingest(write(rows[:10]), "signs", encoding="sign")
        curator.subset("evens", "floats", where="n % 2 = 0")
        curator.score("floats")
        curator.score("floats", against="evens")
        curator.select("floats", 5, name="core")
        curator.select("floats", 4, strategy="top", balance="label", name="top")
        return contents(store)


def main() -> None:
    """Make the store and pack it with what it holds."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "contents.json").write_text(json.dumps(make(folder), indent=1))
        with tarfile.open(target, "w:xz", preset=9) as tar:
            for part in ("contents.json", "store"):
                tar.add(folder / part, part, filter=_nobody)


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return None if entry.name.endswith("store.lock") else entry


if __name__ == "__main__":
    main()
