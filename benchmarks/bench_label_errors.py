"""How well label errors are found: flip a tenth of a file's labels and look for them.

    python benchmarks/bench_label_errors.py rows.jsonl --rows 2000

AUROC: the chance that a flipped instance is more suspect than another; 0.5 is guessing. Precision: the share of flipped
ones among as many suspects as were flipped; 0.1 is guessing.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import repmatch
from repmatch.blocks import take
from repmatch.similarity import score_instance


def report(name: str, suspicion: Any, wrong: Any) -> None:
    ranks = np.argsort(np.argsort(suspicion, kind="stable"))
    count = int(wrong.sum())
    area = (ranks[wrong].sum() - count * (count - 1) / 2) / (count * (len(wrong) - count))
    precision = wrong[np.argsort(-suspicion, kind="stable")[:count]].mean()
    print(f"{name}: AUROC {area:.3f}, precision {precision:.3f}")


def main(path: Path, rows: int, seed: int) -> None:
    data = [json.loads(line) for line in path.read_text().splitlines()[:rows]]
    labels, draw = sorted({row["label"] for row in data}), random.Random(seed)
    flipped = set(draw.sample(range(len(data)), len(data) // 10))
    for i in flipped:
        data[i]["label"] = draw.choice([label for label in labels if label != data[i]["label"]])
    wrong = np.array([i in flipped for i in range(len(data))])
    with tempfile.TemporaryDirectory() as folder, repmatch.open(Path(folder) / "store") as store:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
        repmatch.Curator(store, settings=repmatch.Settings(max_length=64)).ingest(file, "rows")
        factors, given = store.factors("rows"), np.array(store.column("rows", "label"))
        loss = store.sql("SELECT loss FROM instances ORDER BY position")["loss"].to_numpy()
    signed, others = np.zeros(len(factors)), np.zeros(len(factors))
    for i in range(len(factors)):
        one = take(factors, [i])
        score = score_instance(factors, one).mean(axis=1)
        cosine = score_instance(factors, one, signed=True).mean(axis=1)
        near = np.argsort(-score)[1:51]
        signed[i] = -(score[near] * np.sign(cosine[near])).sum()
        others[i] = (given[near] != given[i]).mean()
    print(f"{len(data)} rows of {path.name}, {len(labels)} labels, {len(flipped)} flipped")
    report("signed agreement of the 50 nearest", signed, wrong)
    report("other labels among the 50 nearest", others, wrong)
    report("loss at the shared start", loss, wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.path, given.rows, given.seed)
