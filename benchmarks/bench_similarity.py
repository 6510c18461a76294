"""Which datasets are alike, and do instances of one heuristic lie together? See README.md beside this file.

    python benchmarks/bench_similarity.py --rows 1000 --seeds 3 --store similarity-store

The first table: RepMatch between datasets, each trained once for every order of its rows, from one shared cold start;
the diagonal is the same rows in another order. The second: instances of HANS-like pairs by heuristic and subcase,
beside mean-pooled embeddings of the same model. Adapters and factors are kept in the store.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_choice import DATA_HELP, progress, rows_of, write

import repmatch
from repmatch.curator.embeddings import embedder
from repmatch.curator.study.fields import FieldStudy, study_field
from repmatch.curator.study.seeds import SeedStudy, study_seeds
from repmatch.curator.training import Recipe

SETS = {
    "sst2": "sst2.train",
    "sst5": "sst5.train",
    "mr": "mr.all",
    "snli": "snli.train",
    "trec": "trec.train",
    "cola": "cola.train",
    "hans-like": "hans_regen.train",
}


def matrix(found: SeedStudy) -> list[str]:
    """Return the datasets' similarities in Markdown."""
    out = ["| | " + " | ".join(found.names) + " |", "|---" * (len(found.names) + 1) + "|"]
    for name, mean, spread in zip(found.names, found.mean, found.spread, strict=True):
        cells = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
        out.append(f"| {name} | {cells} |")
    return out


def fields(found: Sequence[FieldStudy]) -> list[str]:
    """Return what lies together, in Markdown."""
    out = [
        "| column | within | between | nearest ten | by embeddings | by chance |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        other = "" if one.nearest_embeddings is None else f"{one.nearest_embeddings:.3f}"
        cells = (f"{one.within:.4f}", f"{one.between:.4f}", f"{one.nearest:.3f}", other, f"{one.nearest_chance:.3f}")
        out.append(f"| {one.field} | " + " | ".join(cells) + " |")
    return out


def heuristics(store: repmatch.Store, file: Path, options: argparse.Namespace) -> dict[str, object]:
    """Print what lies together among HANS-like pairs from a cold start, from warm ones, and by the mean of these."""
    warm = [f"warm-{seed}" for seed in range(options.starts)]
    for seed, name in enumerate(warm):
        settings = repmatch.Settings(max_length=64, warm_start=options.warm, seed=seed)
        repmatch.Curator(store, settings=settings, progress=progress).ingest(file, name)
    told: dict[str, object] = {}
    parts = [("cold", "hans-like", ())] + [(f"warm, seed {seed}", name, ()) for seed, name in enumerate(warm)]
    for start, dataset, others in [*parts, (f"mean of {len(warm)} warm", warm[0], tuple(warm[1:]))]:
        embed = embedder(repmatch.Curator(store), dataset)
        found = [study_field(store, dataset, field, embed, ensemble=others) for field in ("heuristic", "subcase")]
        print(f"HANS-like, {start}", "\n".join(fields(found)), sep="\n\n", end="\n\n")
        told[start] = [one.as_json() for one in found]
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--rows", type=int, default=1000, help="of each dataset, drawn at random (default 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the rows (default 3)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warm", default="640", help="rows of the warm start for the second table (default 640)")
    parser.add_argument("--starts", type=int, default=4, help="warm starts that are averaged (default 4)")
    parser.add_argument("--second", action="store_true", help="the second table alone")
    parser.add_argument("--store", default="similarity/store", help="kept between runs (default similarity/store)")
    parser.add_argument("--json", type=Path, dest="json_file", help="write both tables to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    data = os.environ.get("REPMATCH_DATA")
    if not data:
        sys.exit(DATA_HELP)
    path = Path(options.store)
    path.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, object] = {}
    with repmatch.open(path) as store:
        settings = repmatch.Settings(max_length=64)
        curator = repmatch.Curator(store, settings=settings, recipe=Recipe(epochs=options.epochs), progress=progress)
        for name in options.sets:
            rows = rows_of(Path(data) / f"{SETS[name]}.jsonl", options.rows, 0)
            curator.ingest(write(path.with_name(f"{name}.jsonl"), rows), name)
        if not options.second:
            alike = study_seeds(curator.trainer, options.sets, seeds=options.seeds)
            print("\n".join(matrix(alike)), *alike.verdict(), sep="\n\n", end="\n\n")
            told["datasets"] = alike.as_json()
        if "hans-like" in options.sets:
            told |= heuristics(store, path.with_name("hans-like.jsonl"), options)
    if options.json_file:
        options.json_file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
