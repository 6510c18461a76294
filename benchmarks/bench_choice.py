"""Does choosing pay? Retraining curves on several datasets, from a cold and a warm start; see README.md beside this.

    python benchmarks/bench_choice.py --sets sst2 trec --rows 2000 --seeds 5 --store choice-store

Every training is kept in the store, so that a run that was stopped goes on, and a larger one builds on it. Prints
tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import repmatch
from repmatch.curator.evaluate.evaluation import EvaluateOptions, evaluate
from repmatch.curator.evaluate.results import Line
from repmatch.curator.evaluate.statistics import interval

# Training file and test file of each set, as DATA_HELP says how to get them.
SETS = {
    "sst2": ("sst2.train", "sst2.test"),
    "sst5": ("sst5.train", "sst5.test"),
    "trec": ("trec.train", "trec.test"),
    "snli": ("snli.train", "snli.test"),
    "cola": ("cola.train", "cola.dev"),
}
BASELINES = ("random+balance=label", "embeddings+balance=label", "loss-high", "loss-low", "loss-middle")
CHOICES = (
    *("facility-location", "facility-location+balance=label", "facility-location+stratify=label"),
    *("herding", "k-center", "top", "top+balance=label"),
)
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

stanfordnlp/sst2, SetFit/sst5, stanfordnlp/snli and nyu-mll/glue (cola) the same way."""


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


def curves(name: str, options: argparse.Namespace, data: Path) -> Iterator[tuple[str, Line]]:
    """Yield (start, line) of one dataset."""
    train, test = (data / f"{part}.jsonl" for part in SETS[name])
    for path in (train, test):
        if not path.is_file():
            sys.exit(f"{path} is no file.\n\n{DATA_HELP}")
    store_path = Path(options.store)
    store_path.parent.mkdir(parents=True, exist_ok=True)
    chosen = write(store_path.with_name(f"{name}.rows.jsonl"), rows_of(train, options.rows, 0))
    held = write(store_path.with_name(f"{name}.held-out.jsonl"), rows_of(test, options.test_rows, 1))
    for start in options.starts:
        warm = None if start == "cold" else options.warm
        settings = repmatch.Settings(max_length=options.max_length, warm_start=warm)
        with repmatch.open(store_path) as store:
            curator = repmatch.Curator(store, settings=settings, progress=progress)
            dataset = f"{name}-{start}"
            curator.ingest(chosen, dataset)
            again = repmatch.Curator(store, progress=progress)
            candidates = options.candidates or (*CHOICES, *(BASELINES if start == options.starts[0] else ()))
            asked = EvaluateOptions(candidates=tuple(candidates), sizes=tuple(options.sizes), seeds=options.seeds)
            found = evaluate(again, dataset, [str(held)], asked)
        for note in found.notes:
            print(f"{dataset}: {note}", file=sys.stderr)
        common = {"random", "full", "longest", "embeddings", *BASELINES[:2]}
        for line in found.lines:
            if line.candidate in common:
                if start == options.starts[0]:
                    yield "", line
            else:
                yield start, line


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
    """Return the mean difference to random over sets and sizes, and how often it is clear either way."""
    out = [
        "### All sets",
        "",
        "| rows by | start | mean difference | clearly better | clearly worse | of |",
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
        shown = f"{100 * means[key].mean:+.1f}"
        out.append(f"| {key[0]} | {key[1]} | {shown} | {better} | {worse} | {len(differences)} |")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--rows", type=int, default=2000, help="rows to choose from (default 2000)")
    parser.add_argument("--test-rows", type=int, default=1000, help="held-out rows (default 1000)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200, 500])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--warm", default="160", help="rows of the warm start (default 160)")
    parser.add_argument("--candidates", nargs="+", help="in place of the list in this file")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--store", default="choice/store", help="kept between runs (default choice/store)")
    parser.add_argument("--json", type=Path, dest="json_file", help="write the lines to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not os.environ.get("REPMATCH_DATA"):
        sys.exit(DATA_HELP)
    everything = {name: list(curves(name, options, Path(os.environ["REPMATCH_DATA"]))) for name in options.sets}
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
