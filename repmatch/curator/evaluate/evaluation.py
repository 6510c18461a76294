"""Retraining curves: does a way to choose rows train a better model than chance, on the user's own data?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.curator.evaluate.candidates import ALWAYS, MOST_EMBEDDED, Candidate, Pool, parse
from repmatch.curator.evaluate.leaks import NEAR, Leak, find_leaks
from repmatch.curator.evaluate.maker import Maker
from repmatch.curator.evaluate.results import Evaluation, Trial, summarise
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.curator.selection import picks_of
from repmatch.datamodels import BadRow, Row
from repmatch.errors import InputError, SelectionError, UsageError

if TYPE_CHECKING:
    from repmatch.curator.curator import Curator
    from repmatch.curator.evaluate.retraining import RetrainRecipe
    from repmatch.curator.workbench import Workbench

Progress = Callable[[str, int, "int | None"], None]
SIZES: tuple[int | str, ...] = (50, 100, 200)
SEEDS = 5


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated.

    Attributes:
        candidates: strategies and baselines, see `repmatch.curator.evaluate.candidates.parse`; see `baselines` for
            what is compared beside them.
        coresets: names of stored coresets.
        sizes: numbers of rows, or shares such as "5%".
        seeds: trainings of each selection; seed s of one is paired with seed s of another.
        recipe: how selections are trained on; None: `RetrainRecipe()`.
        together: trainings side by side; None: 1 on a CPU, 8 on a GPU.
        near: Jaccard similarity from which on a test row counts as standing in the training data.
        baselines: what is compared whatever else is asked for; without "random" no difference to it is told.
    """

    candidates: tuple[str, ...] = ("facility-location",)
    coresets: tuple[str, ...] = ()
    sizes: tuple[int | str, ...] = SIZES
    seeds: int = SEEDS
    recipe: RetrainRecipe | None = None
    together: int | None = None
    near: float = NEAR
    baselines: tuple[str, ...] = ALWAYS

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.seeds < 1:
            raise UsageError(
                f"--seeds {self.seeds} is out of range; expected 1 or more, 5 for an interval worth reading."
            )
        if self.together is not None and self.together < 1:
            raise UsageError(f"together={self.together} is out of range; expected 1 or more.")
        if not self.sizes:
            raise UsageError("no sizes were given; expected one or more, such as 50,100,200.")


@dataclass(frozen=True)
class Held:
    """The held-out rows that are tested on.

    Attributes:
        rows: those that stand nowhere in the training data.
        bad: rows that could not be read.
        leaks: rows left out because they stand in the training data.
        input_hash: digest of the files.
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    leaks: tuple[Leak, ...]
    input_hash: str


def evaluate(curator: Curator, dataset: str, test: Sequence[str], options: EvaluateOptions | None = None) -> Evaluation:
    """Train on every selection, test on held-out rows, and keep every run in the store.

    A training that the store has already, of the same rows, recipe, seed and test, is not repeated: an evaluation that
    was interrupted goes on where it was.

    Args:
        curator: the curator; its settings say where to compute.
        dataset: the dataset that is chosen from.
        test: files of held-out rows with the dataset's columns and labels.
        options: what to compare.

    Returns:
        The curves.

    Raises:
        InputError: no test row can be used.
        SelectionError: a size or rule cannot be met.
    """
    options = options or EvaluateOptions()
    known = curator.store.dataset(dataset)
    candidates = _candidates(options)
    held = read_test(curator, dataset, test, options.near)
    pool, bench = _pool(curator, dataset)
    notes = _notes(held, candidates, pool, options)
    if len(pool.ids) > MOST_EMBEDDED and "embeddings" not in options.candidates:
        candidates = [candidate for candidate in candidates if candidate.text != "embeddings"]
    from repmatch.curator.evaluate.retraining import RetrainRecipe

    recipe = options.recipe or RetrainRecipe()
    maker = Maker(curator, bench, pool, held, recipe, known.labels, options.together or _together(bench.device))
    arguments: dict[str, Any] = {
        "dataset": dataset,
        "test": list(test),
        "test_hash": held.input_hash,
        "recipe": recipe.as_json(),
    }
    arguments |= {"candidates": [c.text for c in candidates], "seeds": options.seeds, "sizes": list(options.sizes)}
    with curator.store.run("evaluate", arguments) as run:
        trials = maker.run(list(_trials(pool, candidates, options)))
        lines = summarise(trials, [c.text for c in candidates])
        run.detail.update(lines=[line.as_json() for line in lines], test_rows=len(held.rows))
    return Evaluation(dataset, tuple(lines), len(held.rows), held.leaks, held.bad, tuple(notes), maker.reused)


def recipe_of(*, steps: int, layers: int | None) -> RetrainRecipe:
    """Return the default recipe with other steps and layers; torch is loaded only here."""
    from repmatch.curator.evaluate.retraining import RetrainRecipe

    return RetrainRecipe(steps=steps, layers=layers)


def _candidates(options: EvaluateOptions) -> list[Candidate]:
    found = [parse(text) for text in options.candidates]
    found += [Candidate(name, name, coreset=True) for name in options.coresets]
    found += [parse(name) for name in options.baselines]
    return list({candidate.text: candidate for candidate in found}.values())


def read_test(curator: Curator, dataset: str, sources: Sequence[str], near: float) -> Held:
    """Read held-out rows, and set aside those that stand in the training data.

    Args:
        curator: the curator.
        dataset: the dataset whose columns and labels they have.
        sources: files.
        near: see `EvaluateOptions`.

    Returns:
        The rows.

    Raises:
        InputError: no row can be used.
    """
    known = curator.store.dataset(dataset)
    reader = open_rows([str(source) for source in sources], FieldChoice(), resolved=known.fields)
    good: list[Row] = []
    bad: list[BadRow] = []
    for chunk in reader:
        for row in chunk:
            if isinstance(row, BadRow):
                bad.append(row)
            elif row.label not in known.labels:
                reason = f"the label {row.label!r} is none of the dataset's: {', '.join(map(repr, known.labels[:10]))}"
                bad.append(BadRow(row.source, row.line, row.id, reason))
            else:
                good.append(row)
    if not good:
        first = f"; the first: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""
        raise InputError(f"none of the rows of {', '.join(map(str, sources))} can be tested on{first}")
    leaks = find_leaks(curator.store.tasks(dataset), good, near)
    gone = {leak.test_id for leak in leaks}
    rows = tuple(row for row in good if row.id not in gone)
    if not rows:
        raise InputError(
            f"every row of {', '.join(map(str, sources))} stands in {dataset!r} too, such as {leaks[0].test_id!r} as "
            f"{leaks[0].train_id!r}; test on rows that were held out."
        )
    return Held(rows, tuple(bad), tuple(leaks), reader.input_hash)


def _pool(curator: Curator, dataset: str) -> tuple[Pool, Workbench]:
    from repmatch.curator.embeddings import embedder
    from repmatch.curator.workbench import Workbench

    store = curator.store
    space = curator.trainer.space_of(dataset)
    if space.task != "sequence-classification":
        raise UsageError(
            f"the dataset {dataset!r} was ingested for the task {space.task!r}; retraining curves are for "
            "sequence-classification."
        )
    bench = Workbench.of_space(space, curator.settings)
    frame = store.sql(
        "SELECT id, label, loss, tokens FROM instances WHERE dataset = ? AND loss IS NOT NULL ORDER BY position",
        [dataset],
    )
    ids = tuple(frame["id"].to_list())
    make = embedder(curator, dataset)
    losses, tokens = frame["loss"].to_numpy().astype(np.float64), frame["tokens"].to_numpy().astype(np.int64)
    return Pool(curator, dataset, ids, tuple(frame["label"].to_list()), losses, tokens, lambda: make(ids)), bench


def _together(device: str) -> int:
    return 1 if device == "cpu" else 8


def _notes(held: Held, candidates: Sequence[Candidate], pool: Pool, options: EvaluateOptions) -> list[str]:
    notes = []
    if held.leaks:
        exact = sum(leak.exact for leak in held.leaks)
        notes.append(
            f"{len(held.leaks)} test rows stand in {pool.dataset} too ({exact} to the letter, the others nearly) and "
            f"were left out: {held.leaks[0].test_id!r} as {held.leaks[0].train_id!r}"
            + (", ..." if len(held.leaks) > 1 else "")
        )
    if held.bad:
        first = held.bad[0]
        notes.append(f"{len(held.bad)} test rows could not be used: {first.source}:{first.line}: {first.reason}")
    if len(pool.ids) > MOST_EMBEDDED and "embeddings" not in options.candidates:
        notes.append(f"the embeddings baseline was left out: {len(pool.ids)} rows are more than {MOST_EMBEDDED}")
    left = [str(size) for size in options.sizes if size not in _fitting(options, len(pool.ids))]
    if left:
        notes.append(f"the dataset has {len(pool.ids)} rows; left out: sizes {', '.join(left)}")
    if options.seeds < 3:
        notes.append(f"{options.seeds} seeds say next to nothing about the spread; --seeds 5 gives intervals")
    return notes


def _fitting(options: EvaluateOptions, n: int) -> list[int | str]:
    """Return the sizes that the dataset has rows for; all of them, to be refused, where it has rows for none."""
    found = [size for size in options.sizes if not str(size).strip().isdecimal() or int(size) <= n]
    return found or list(options.sizes)


def _trials(pool: Pool, candidates: Sequence[Candidate], options: EvaluateOptions) -> Iterator[Trial]:
    """Yield every training that the curves need, selections made."""
    n = len(pool.ids)
    sizes = sorted({picks_of(size, n) for size in _fitting(options, n)})
    own = [c for c in candidates if c.coreset]
    extra = sorted({len(pool.choose(c, 0, 0)) for c in own} - set(sizes))
    for candidate in candidates:
        asked = [0] if candidate.coreset or not candidate.sized else sizes
        if candidate.text == "random":
            asked = [k for k in sorted({*sizes, *extra}) if k < n]
        for k in asked:
            fixed: tuple[str, ...] = ()
            for seed in range(options.seeds):
                if candidate.drawn or not fixed:
                    fixed = pool.choose(candidate, k, seed)
                if not fixed:
                    raise SelectionError(f"{candidate.text} chose no rows; leave it out.")
                yield Trial(candidate.text, len(fixed), seed, fixed)
