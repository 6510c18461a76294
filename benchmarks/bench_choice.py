"""Does choosing pay? Retraining curves on several datasets, from several starts; see README.md beside this.

    python benchmarks/bench_choice.py --sets sst2 trec --stage core --stores choice
    python benchmarks/bench_choice.py --stage core wide --stores choice --json benchmarks/results/choice.jsonl

Every training is kept in the stores, so that a run that was stopped goes on, and a larger one builds on it. Prints
tables in Markdown; --tables FILE... makes them of lines that --json wrote, without any training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import repmatch
from repmatch.curator.evaluate.evaluation import EvaluateOptions, evaluate
from repmatch.curator.evaluate.results import Line
from repmatch.curator.evaluate.retraining import RetrainRecipe
from repmatch.curator.evaluate.statistics import Interval, interval

# Training file and test file of each set, as DATA_HELP says how to get them; without a test file the rows are split.
SETS = {
    "sst2": ("sst2.train", "sst2.test"),
    "sst5": ("sst5.train", "sst5.test"),
    "trec": ("trec.train", "trec.test"),
    "snli": ("snli.train", "snli.test"),
    "cola": ("cola.train", "cola.dev"),
    "hans-like": ("hans_regen.train", None),
}
# Options of ingest for each start.
STARTS: dict[str, dict[str, Any]] = {
    "cold": {},
    "warm": {"warm_start": "640"},
    "warm-2": {"warm_start": "640", "seed": 1},
    "warm-3": {"warm_start": "640", "seed": 2},
    "warm 160": {"warm_start": "160"},
    "warm gradients": {"warm_start": "640", "optimizer": "sgd"},
}
FL = "facility-location"
SEVERAL = ("warm-2", "warm-3")  # beside "warm", for ensembles
ALL_SIZES, ONE_SIZE = (50, 100, 200, 500), (100,)


@dataclass(frozen=True)
class Part:
    """Candidates that are compared in the same sizes, from one start; "" for those that need no factors."""

    start: str
    candidates: tuple[str, ...]
    sizes: tuple[int, ...]


STAGES = {
    "core": (
        Part("", ("random", "full", "random+balance=label", "embeddings", "embeddings+balance=label"), ALL_SIZES),
        Part("cold", (FL, f"{FL}+stratify=label", "top", "top+balance=label"), ALL_SIZES),
        Part("cold", ("joined", "joined+stratify=label"), ALL_SIZES),
        Part("warm", (FL, f"{FL}+balance=label", f"{FL}+stratify=label"), ALL_SIZES),
        Part("warm", ("joined", "joined+stratify=label"), ALL_SIZES),
    ),
    "contenders": (
        Part("", ("random", "full", "embeddings"), ALL_SIZES),
        Part("cold", (FL, "joined", "joined+stratify=label"), ALL_SIZES),
        Part("warm", (FL, f"{FL}+stratify=label", "joined+stratify=label"), ALL_SIZES),
    ),
    "finalists": (
        Part("", ("random", "full", "embeddings"), ALL_SIZES),
        Part("cold", ("herding", "herding+kernel=joined", FL, "joined"), ALL_SIZES),
        Part("warm", ("herding+signed",), ALL_SIZES),
    ),
    "ensembles": (
        Part("", ("random",), ALL_SIZES),
        Part("warm", (FL, f"{FL}+ensemble={','.join(SEVERAL)}"), ALL_SIZES),
        Part("warm", (f"{FL}+stratify=label", f"{FL}+stratify=label+ensemble={','.join(SEVERAL)}"), ALL_SIZES),
        Part("warm", ("herding+signed", f"herding+signed+ensemble={','.join(SEVERAL)}"), (50, 100)),
    ),
    "wide": (
        Part("", ("random", "embeddings-k-means", "longest", "loss-high", "loss-middle", "loss-low"), ONE_SIZE),
        Part("cold", ("herding", "herding+signed", "k-center", "k-center+signed", f"{FL}+signed"), ONE_SIZE),
        Part("cold", (f"{FL}+represent=dev-cold",), ONE_SIZE),
        Part("warm", ("top", "herding", "herding+signed", "k-center", "k-center+signed", f"{FL}+signed"), ONE_SIZE),
        Part("warm", (f"{FL}+matrices=*.value", f"{FL}+represent=dev-warm"), ONE_SIZE),
        Part("warm 160", (FL,), ONE_SIZE),
        Part("warm gradients", (FL,), ONE_SIZE),
    ),
}
DATA_HELP = """\
Set REPMATCH_DATA to a folder of JSON lines files NAME.jsonl with "id", "text", "text_pair", "label" (text). With the
datasets library, for example:

  python -c "
  from datasets import load_dataset
  for split in ('train', 'test'):
      d = load_dataset('CogComp/trec', split=split)
      names = d.features['coarse_label']
      d = d.map(lambda r, i: {'id': f'{split}-{i}', 'label': names.int2str(r['coarse_label'])}, with_indices=True)
      d.select_columns(['id', 'text', 'label']).to_json(f'trec.{split}.jsonl')
  "

stanfordnlp/sst2, SetFit/sst5, stanfordnlp/snli, nyu-mll/glue (cola) and cornell-movie-review-data/rotten_tomatoes
(mr.all) the same way. hans_regen.train holds pairs of the templates of github.com/tommccoy1/hans, made with another
seed, with the columns heuristic and subcase; jhu-cogsci/hans has the published ones."""


def rows_of(path: Path, count: int, seed: int) -> list[str]:
    """Return some lines of a file at random, in the file's order."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    chosen = random.Random(seed).sample(range(len(lines)), min(count, len(lines)))
    return [lines[i] for i in sorted(chosen)]


def write(path: Path, lines: Sequence[str]) -> Path:
    """Write lines."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def progress(stage: str, done: int, total: int | None) -> None:
    """Say how far it is, now and then."""
    if total and (done == total or done % max(1, total // 20) == 0):
        print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)


def files_of(name: str, options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return the rows that are chosen from and those that are tested on."""
    data = Path(os.environ["REPMATCH_DATA"])
    train, test = (None if part is None else data / f"{part}.jsonl" for part in SETS[name])
    for path in (train, test):
        if path is not None and not path.is_file():
            sys.exit(f"{path} is no file.\n\n{DATA_HELP}")
    assert train is not None
    if test is not None:
        chosen, held = rows_of(train, options.rows, 0), rows_of(test, options.test_rows, 1)
    else:
        both = rows_of(train, options.rows + options.test_rows, 0)
        held = random.Random(1).sample(both, min(options.test_rows, len(both) // 2))
        chosen = [line for line in both if line not in set(held)]
    return write(folder / "rows.jsonl", chosen), write(folder / "held-out.jsonl", held)


def write_dev(folder: Path, held: Sequence[str], chosen: Sequence[str], name: str) -> Path:
    """Write 100 rows that are neither chosen from nor tested on, of every label at least one, for a small target."""
    train, taken = Path(os.environ["REPMATCH_DATA"]) / f"{SETS[name][0]}.jsonl", {*held, *chosen}
    free = [line for line in rows_of(train, 10**9, 2) if line not in taken]
    random.Random(3).shuffle(free)
    first = {json.loads(line)["label"]: line for line in reversed(free)}
    rest = [line for line in free if line not in set(first.values())]
    return write(folder / "dev.jsonl", [*first.values(), *rest[: 100 - len(first)]])


def curves(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Line]]:
    """Yield (start, line) of one dataset."""
    folder = Path(options.stores) / name
    folder.mkdir(parents=True, exist_ok=True)
    chosen, held = files_of(name, options, folder)
    recipe = RetrainRecipe(layers=options.layers, steps=options.steps)
    for part in (part for stage in options.stage for part in STAGES[stage]):
        start = part.start or "cold"
        settings = repmatch.Settings(max_length=options.max_length, **STARTS[start])
        dataset = f"{name}-{start.replace(' ', '-')}"
        with repmatch.open(folder / "store") as store:
            repmatch.Curator(store, settings=settings, progress=progress).ingest(chosen, dataset)
            if any("represent=" in candidate for candidate in part.candidates):
                small = replace(settings, warm_start=dataset if settings.warm_start else None)
                dev = write_dev(folder, rows_of(held, 10**9, 0), rows_of(chosen, 10**9, 0), name)
                repmatch.Curator(store, settings=small).ingest(dev, f"dev-{start}")
            if any("ensemble=" in candidate for candidate in part.candidates):
                for other in SEVERAL:
                    more = repmatch.Settings(max_length=options.max_length, **STARTS[other])
                    repmatch.Curator(store, settings=more, progress=progress).ingest(chosen, other)
            asked = EvaluateOptions(
                candidates=part.candidates,
                sizes=options.sizes or part.sizes,
                seeds=options.seeds,
                recipe=recipe,
                baselines=("random",),
            )
            found = evaluate(repmatch.Curator(store, progress=progress), dataset, [str(held)], asked)
        for note in found.notes:
            print(f"{dataset}: {note}", file=sys.stderr)
        for line in found.lines:
            if line.candidate != "random" or part.candidates[0] == "random":
                yield part.start, line


def cell(line: Line) -> str:
    """Return accuracy and difference to random in percent, bold where the interval excludes zero."""
    other = line.against_random
    if other is None or other.low is None or other.high is None:
        return f"{100 * line.accuracy.mean:.1f}"
    shown = f"{100 * other.mean:+.1f} ({100 * other.low:+.1f} to {100 * other.high:+.1f})"
    return f"{100 * line.accuracy.mean:.1f}, " + (f"**{shown}**" if other.excludes_zero else shown)


def table(name: str, found: Sequence[tuple[str, Line]]) -> list[str]:
    """Return one dataset's table in Markdown."""
    sizes = sorted({line.size for _, line in found if line.candidate != "full"})
    out = [
        f"### {name}",
        "",
        "| rows by | start | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for key in dict.fromkeys((line.candidate, start) for start, line in found):
        lines = {line.size: line for start, line in found if (line.candidate, start) == key}
        if key[0] == "full":
            (line,) = lines.values()
            out.append(f"| full, {line.size} rows | | {100 * line.accuracy.mean:.1f}" + " |" * len(sizes))
            continue
        out.append(f"| {key[0]} | {key[1]} | " + " | ".join(cell(lines[s]) if s in lines else "" for s in sizes) + " |")
    return out


def overall(everything: dict[str, list[tuple[str, Line]]]) -> list[str]:
    """Return the mean difference to random over cells, sets and sizes, and how often it is clear either way."""
    out = [
        "### All sets",
        "",
        "| rows by | start | mean difference (95 % interval over cells) | clearly better | clearly worse | of |",
        "|---" * 6 + "|",
    ]
    groups: dict[tuple[str, str], list[Line]] = {}
    for found in everything.values():
        for start, line in found:
            if line.against_random is not None:
                groups.setdefault((line.candidate, start), []).append(line)
    means = {
        key: interval([one.against_random.mean for one in lines if one.against_random]) for key, lines in groups.items()
    }
    for key in sorted(groups, key=lambda k: -means[k].mean):
        differences = [line.against_random for line in groups[key] if line.against_random is not None]
        better = sum(d.excludes_zero and d.mean > 0 for d in differences)
        worse = sum(d.excludes_zero and d.mean < 0 for d in differences)
        mean = means[key]
        shown = f"{100 * mean.mean:+.1f}"
        if mean.low is not None and mean.high is not None:
            shown += f" ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})"
        out.append(f"| {key[0]} | {key[1]} | {shown} | {better} | {worse} | {len(differences)} |")
    return out


def told(files: Sequence[Path]) -> dict[str, list[tuple[str, Line]]]:
    """Return the lines that earlier runs wrote, set by set; a line that was written twice counts once."""
    found: dict[str, dict[tuple[str, str, int], Line]] = {}
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            held = json.loads(text)
            count = len(held["accuracies"])
            against = None if held["against_random"] is None else Interval(**held["against_random"], count=count)
            own = Interval(held["accuracy"], held["low"], held["high"], count)
            names = ("imbalance", "tokens", "steps")
            accuracies = tuple(held["accuracies"])
            line = Line(held["candidate"], held["size"], accuracies, own, against, *(held[name] for name in names))
            found.setdefault(held["set"], {})[line.candidate, held["start"], line.size] = line
    return {name: [(key[1], line) for key, line in lines.items()] for name, lines in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--stage", nargs="+", choices=[*STAGES], default=["core"], help="which candidates")
    parser.add_argument("--rows", type=int, default=2000, help="rows to choose from (default 2000)")
    parser.add_argument("--test-rows", type=int, default=500, help="held-out rows (default 500)")
    parser.add_argument("--sizes", type=int, nargs="+", help="in place of the stage's own")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2, help="last layers that are adapted in retraining (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="of every retraining (default 60)")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--stores", default="choice", help="folder, kept between runs (default choice)")
    parser.add_argument("--tables", nargs="+", type=Path, metavar="FILE", help="of lines that --json wrote")
    parser.add_argument("--json", type=Path, dest="json_file", help="write the lines to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not options.tables and not os.environ.get("REPMATCH_DATA"):
        sys.exit(DATA_HELP)
    everything = (
        told(options.tables) if options.tables else {name: list(curves(name, options)) for name in options.sets}
    )
    for name, found in everything.items():
        print("\n".join(table(name, found)), end="\n\n")
    print("\n".join(overall(everything)))
    if options.json_file:
        records = [
            {"set": name, "start": start, **line.as_json()}
            for name, found in everything.items()
            for start, line in found
        ]
        options.json_file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
