"""The demo: the main job on real text that every Python brings along, the docstrings of its standard library."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from repmatch.curator.curator import Curator
from repmatch.curator.destination import check_outside
from repmatch.curator.docstrings import gather, split, write_jsonl
from repmatch.curator.settings import Settings
from repmatch.datamodels import Row
from repmatch.errors import StoreError
from repmatch.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from repmatch.output import Output
    from repmatch.store import Store

DATASET = "docstrings"
PICKS = 80
_MAX_LENGTH = 64
_AREA_EPOCHS = 4  # an area is small: one epoch of it would be five steps
_SEEDS = 2
_QUESTION = "Wait until the other thread has released the lock."


def run(folder: Path, output: Output, *, device: str = "auto") -> None:
    """Run the demo.

    Args:
        folder: for its store and files; made where it is missing.
        output: where to write.
        device: where to compute.

    Raises:
        StoreError: the folder holds something else.
        UsageError: it lies in a store.
    """
    began = time.monotonic()
    check_outside(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "docstrings.jsonl").exists():
        raise StoreError(f"{folder} is not empty and was not made by the demo; name another folder with --dir.")
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split(gather(), 0.2, 0)
    areas = Counter(str(row["label"]) for row in train)
    output.line(f"[1/7] {len(train) + len(test)} docstrings of Python's standard library in {len(areas)} areas")
    output.table(["area", "instances"], areas.most_common())
    write_jsonl(folder / "docstrings.jsonl", train)
    write_jsonl(folder / "held-out.jsonl", test)
    with open_store(folder / "store") as store:
        from repmatch.curator.training import Recipe

        settings = Settings(max_length=_MAX_LENGTH, device=device)
        curator = Curator(store, settings=settings, recipe=Recipe(epochs=1), progress=output.progress)
        _ingest(curator, folder, output)
        _score(curator, output)
        _compare(curator, ("text", "internet"), output)
        _select(curator, folder, output)
        _nearest(curator, output)
        _export(curator, folder, output)
    output.line("")
    output.line(f"done in {time.monotonic() - began:.0f} s. On your own file, with columns text and label:")
    output.line("  repmatch ingest YOURS.jsonl --dataset yours")
    output.line("  repmatch select yours -k 5% --stratify label --name core")
    output.line("  repmatch export core -o core.jsonl")
    output.line("or look around in what the demo made, in a browser (needs the extra 'report') or here:")
    output.line(f"  repmatch --store {folder / 'store'} report -o {folder / 'report.html'}")
    output.line(f"  repmatch --store {folder / 'store'} info")


def _step(output: Output, number: int, title: str, command: str) -> None:
    output.line("")
    output.line(f"[{number}/7] {title}")
    output.line(f"$ {command}")


def _short(text: str, width: int = 64) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _texts(store: Store, ids: Sequence[str]) -> dict[str, Row]:
    return {row.id: row for row in store.tasks(DATASET, ids=list(ids))}


def _ingest(curator: Curator, folder: Path, output: Output) -> None:
    _step(
        output,
        2,
        "instance factors: one LoRA step a docstring",
        f"repmatch ingest docstrings.jsonl --dataset {DATASET}",
    )
    report = curator.ingest(folder / "docstrings.jsonl", DATASET)
    output.close()
    rate = (
        f", {report.computed / report.seconds:.0f} a second" if report.computed else " (all there from an earlier run)"
    )
    output.line(f"{report.rows} rows: {report.new} new, {report.unchanged} unchanged; {report.computed} factors{rate}")


def _score(curator: Curator, output: Output) -> None:
    _step(output, 3, "which instances point where the whole dataset points", f"repmatch score {DATASET} --epochs 1")
    scores = curator.score(DATASET)
    output.close()
    ends = [*range(3), *range(len(scores.ids) - 2, len(scores.ids))]
    texts = _texts(curator.store, [scores.ids[i] for i in ends])
    rows = [(i + 1, float(scores.scores[i]), scores.ids[i], _short(texts[scores.ids[i]].text, 48)) for i in ends]
    output.table(["rank", "score", "id", "text"], rows)
    output.line(f"mean {float(scores.scores.mean()):.4f}; unrelated directions would score {scores.chance:.4f}")


def _compare(curator: Curator, areas: Sequence[str], output: Output) -> None:
    from repmatch.curator.training import Recipe

    names = [f"{DATASET}[label = '{area}']" for area in areas]
    quoted = " ".join(f'"{name}"' for name in names)
    _step(output, 4, "do two areas teach the same?", f"repmatch compare {quoted} --epochs {_AREA_EPOCHS}")
    longer = Curator(
        curator.store, settings=curator.settings, recipe=Recipe(epochs=_AREA_EPOCHS), progress=curator.progress
    )
    found = longer.compare(*names)
    output.close()
    output.line(f"{areas[0]} against {areas[1]}: {found.scores[0, 1]:.4f}; unrelated directions: {found.chance:.4f}")


def _select(curator: Curator, folder: Path, output: Output) -> None:
    from repmatch.curator.evaluate.evaluation import EvaluateOptions, evaluate

    _step(
        output,
        5,
        f"a coreset of {PICKS}, and does it train a better model than {PICKS} random ones?",
        f"repmatch select {DATASET} -k {PICKS} --stratify label --name core",
    )
    core = curator.select(DATASET, PICKS, stratify="label", name="core", replace=True)
    chance = curator.select(DATASET, PICKS, strategy="random", stratify="label", name="by-chance", replace=True)
    certainty = core.selection.certainty
    output.line(f"facility location: objective {core.selection.value:.2f}, random {_value(chance):.2f}")
    if certainty is not None:
        output.line(f"certified: at least {certainty:.0%} of the best possible {PICKS}")
    rival = "random+stratify=label"
    asked = EvaluateOptions((rival,), ("core",), (PICKS,), _SEEDS, baselines=())
    found = evaluate(curator, DATASET, [str(folder / "held-out.jsonl")], asked)
    output.close()
    rows = [(line.candidate, line.accuracy.mean, *line.accuracies) for line in found.lines]
    output.table(["trained on", "accuracy", *(f"seed {seed}" for seed in range(_SEEDS))], rows)
    output.line(
        f"{found.test_rows} held-out docstrings, {len(curator.store.dataset(DATASET).labels)} areas, "
        f"{found.lines[0].steps} steps each. {_SEEDS} seeds are an anecdote: expect a few points of noise, and see "
        "repmatch evaluate."
    )


def _value(selected: object) -> float:
    from repmatch.curator.selection import Selected

    assert isinstance(selected, Selected)
    return float(selected.coreset.similarity.sum())


def _nearest(curator: Curator, output: Output) -> None:
    label = "concurrency" if "concurrency" in curator.store.dataset(DATASET).labels else None
    command = f'repmatch nearest {DATASET} --text "{_QUESTION}"' + (f" --label {label}" if label else "") + " -k 3"
    _step(output, 6, "what teaches the same as a new text?", command)
    found = curator.nearest(DATASET, text=_QUESTION, label=label, k=3)
    texts = _texts(curator.store, found.ids)
    rows = [(float(s), i, _short(texts[i].text)) for i, s in zip(found.ids, found.scores, strict=True)]
    output.table(["score", "id", "text"], rows)


def _export(curator: Curator, folder: Path, output: Output) -> None:
    path = folder / "core.jsonl"
    _step(output, 7, "the coreset as a file", f"repmatch export core -o {path}")
    manifest = curator.export("core", path)
    with path.open(encoding="utf-8") as lines:
        output.line(_short(next(lines).rstrip("\n"), 110))
    output.line(f"{manifest['file']['rows']} rows in {path}; how they came about in {path}.manifest.json")
