"""How well label errors are found: flip a tenth of a file's labels and look for them; see README.md beside this file.

    python benchmarks/bench_label_errors.py rows.jsonl --rows 2000
    python benchmarks/bench_label_errors.py rows.jsonl --rows 2000 --starts 4

Average precision: the mean, over the flipped instances, of the share of flipped ones among those ranked no lower; 0.1
is guessing.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import repmatch
from repmatch.curator.embeddings import embedder
from repmatch.curator.suspects import suspects


def average_precision(suspect: NDArray[np.floating[Any]], wrong: NDArray[np.bool_]) -> float:
    """Return the average precision of a ranking."""
    hits = wrong[np.argsort(-suspect, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def flip(rows: list[dict[str, Any]], share: float, seed: int) -> NDArray[np.bool_]:
    """Give a share of the rows another label, and say which."""
    labels, draw = sorted({row["label"] for row in rows}), random.Random(seed)
    chosen = set(draw.sample(range(len(rows)), round(share * len(rows))))
    for i in sorted(chosen):
        rows[i]["label"] = draw.choice([label for label in labels if label != rows[i]["label"]])
    return np.array([i in chosen for i in range(len(rows))])


def by_probability(rows: NDArray[np.float32], labels: NDArray[np.str_], seed: int) -> dict[str, NDArray[np.float64]]:
    """Return label quality from a cross-validated logistic regression on embeddings, by cleanlab where it is there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    codes = np.unique(labels, return_inverse=True)[1]
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=2000, C=10.0)
    chances = cross_val_predict(model, rows, codes, cv=folds, method="predict_proba")
    found = {"self-confidence of a regression on embeddings": -chances[np.arange(len(codes)), codes]}
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return found
    for method in ("self_confidence", "normalized_margin"):
        found[f"cleanlab, {method}, the same probabilities"] = -get_label_quality_scores(codes, chances, method=method)
    return found


def ways_of(store: repmatch.Store, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return how suspect every instance is, by the mean over datasets that hold the same rows from other starts."""
    found = suspects(store, names[0], k=len(store.ids(names[0])), ensemble=names[1:])
    place = {name: at for at, name in enumerate(found.ids)}
    order = [place[name] for name in store.factors(names[0]).ids]
    return {
        "suspects": found.suspicion[order],
        "loss at the start": found.losses[order],
        "opposition of the neighbours": -found.agreement[order].astype(np.float64),
    }


def main(arguments: list[str] | None = None) -> None:
    """Flip labels, look for them in several ways, and print the average precision of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help='JSON lines with "text" and "label", whose labels are to be trusted')
    parser.add_argument("--rows", type=int, default=2000, help="drawn at random (default 2000)")
    parser.add_argument("--share", type=float, default=0.1, help="of labels that are flipped (default 0.1)")
    parser.add_argument("--warm", default="2000", help="rows of the warm start, or none (default 2000)")
    parser.add_argument("--starts", type=int, default=1, help="starts of other seeds, averaged (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = random.Random(options.seed).sample(rows, min(options.rows, len(rows)))
    wrong = flip(rows, options.share, options.seed)
    with tempfile.TemporaryDirectory() as folder, repmatch.open(Path(folder) / "store") as store:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        names = [f"rows-{number}" for number in range(options.starts)]
        for number, name in enumerate(names):
            settings = repmatch.Settings(max_length=64, warm_start=options.warm, seed=number)
            repmatch.Curator(store, settings=settings).ingest(file, name)
        ids = store.factors(names[0]).ids
        place = {str(row["id"]): (bool(bad), row["label"]) for row, bad in zip(rows, wrong, strict=True)}
        wrong = np.array([place[name][0] for name in ids])
        labels = np.array([place[name][1] for name in ids])
        single = [ways_of(store, [name]) for name in names]
        together = ways_of(store, names)
        embedded = embedder(repmatch.Curator(store), names[0])(ids)
    others = by_probability(embedded, labels, options.seed)
    start = f"warm start {options.warm}, starts {options.starts}"
    print(f"{options.file.name}: {len(wrong)} rows, {wrong.sum()} labels flipped, {start}")
    for name, suspect in (together | others).items():
        each = [average_precision(ways[name], wrong) for ways in single if name in ways]
        alone = f"; single starts {', '.join(f'{one:.3f}' for one in each)}" if len(each) > 1 else ""
        print(f"  {name:<48} average precision {average_precision(suspect, wrong):.3f}{alone}")


if __name__ == "__main__":
    main()
