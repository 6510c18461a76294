"""From names and columns in a store to the positions and arrays that strategies work on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import choose_matrices, take
from repmatch.curator.ensemble import plain_name, with_others
from repmatch.curator.id_order import in_id_order
from repmatch.curator.select_features import features_of
from repmatch.curator.select_options import KERNELS, Ids, SelectOptions, picks_of
from repmatch.datamodels import Factors
from repmatch.errors import InputError, SelectionError, SelectionUsageError, UnknownChoiceError, UsageError
from repmatch.selectors import Constraints, FactorKernel, Features, JoinedKernel, Problem, SignedKernel, strategy

if TYPE_CHECKING:
    from repmatch.store import Store

ScoresOf: TypeAlias = Callable[[str], dict[str, float]]
Embed: TypeAlias = Callable[[str, Sequence[str]], NDArray[np.floating[Any]]]
NEEDS_NO_SIZE = ("budget", "min_gain", "coverage", "apart")
RECTANGULAR = ("facility-location", "saturated-coverage", "k-medoids")  # work on what others represent
IN_ROW_ORDER = ("thin",)  # what comes first as ingested is looked at first; elsewhere the lowest id
UNSORTED = "ties go to the row that was ingested first: the factors are too many to be sorted by id in memory"


@dataclass(frozen=True)
class Posed:
    """A problem and what is needed to tell its solution in the user's words.

    Attributes:
        dataset: the dataset that is selected from.
        problem: for the strategy.
        ids: the ids selected from, the first candidates, in their natural order; instances of other datasets follow
            them.
        places: (n,) int64, where each of them lies in the dataset's order.
        own: the similarities of the dataset with itself, for the picks' representatives.
        elsewhere: whether the picks stand for something other than the dataset itself.
        notes: what the user should know.
    """

    dataset: str
    problem: Problem
    ids: tuple[str, ...]
    places: NDArray[np.int64]
    own: FactorKernel
    elsewhere: bool
    notes: tuple[str, ...] = ()


def pose(store: Store, source: str, options: SelectOptions, scores_of: ScoresOf, embed: Embed) -> Posed:
    """Turn what the user asks into a problem.

    Args:
        store: the store.
        source: the dataset's name, or a part of one: DATASET[SQL], a subset, a coreset.
        options: what is asked.
        scores_of: gives id -> score of a dataset against its own adapter, for strategies that need it.
        embed: gives (n, d) unit rows for a dataset and n ids of it, for kernels that need them.

    Returns:
        The problem.

    Raises:
        UsageError: options that exclude each other, or a size that is none.
        UnknownNameError: no such dataset, subset, coreset or column, or (UnknownChoiceError) no such kernel.
        InputError: a cost that is no number.
        SelectionError: something the strategy can't use.
    """
    entry = strategy(options.strategy)
    subset = store.resolve(source)
    dataset, part = subset.dataset, subset.ids is not None or subset.where is not None
    stored = store.factors(dataset, ids=store.members(subset).ids if part else None)
    n = len(stored)
    if not n:
        raise UsageError(f"{source} has no instances to select from.")
    if options.k is None and not any(getattr(options, name) is not None for name in NEEDS_NO_SIZE):
        raise UsageError("say how many to pick with -k, or what ends the selection: a budget, a gain or a coverage.")
    kernel = _kernel_of(options)
    if options.ensemble and "kernel" not in entry.needs:
        raise UsageError(
            f"--ensemble goes with strategies that compare instances, and {options.strategy} compares none."
        )
    sets = _Sets(store, dataset, options, embed)
    chosen, places, notes = sets.ready(dataset, stored)
    rules = _constraints(store, dataset, options, chosen.ids)
    scores = None
    if "scores" in entry.needs or "top" in options.mix:
        by_id = scores_of(dataset)
        scores = np.array([by_id[i] for i in chosen.ids])
    target = None if options.represent is None else sets.named(options.represent, "represent")
    candidates, rules = _with_given(sets, dataset, chosen, rules)
    foreign = len(candidates) - n
    if foreign and target is None:
        target = chosen
    features = _features(sets, dataset, candidates.ids, n)
    if target is not None and options.strategy == "herding":
        raise SelectionUsageError(
            "herding represents the whole dataset: use facility-location with --represent or --given"
        )
    if target is not None and "kernel" in entry.needs and options.strategy not in RECTANGULAR:
        raise SelectionError(
            f"{options.strategy} compares the dataset with itself: use {', '.join(RECTANGULAR)} to represent other sets"
        )
    whole = kernel(candidates, represented=target)
    problem = Problem(
        n=len(candidates),
        k=_size(options, n, rules),
        kernel=whole,
        scores=None if scores is None else np.concatenate((scores, np.zeros(foreign))),
        constraints=rules,
        seed=options.seed,
        algorithm=options.algorithm,
        parameters=options.parameters,
        mix=options.mix,
        features=features,
    )
    entry.check(problem)
    return Posed(dataset, problem, chosen.ids, places, whole.like(chosen, None), target is not None, notes)


def _kernel_of(options: SelectOptions) -> Callable[..., FactorKernel]:
    if options.kernel not in KERNELS:
        raise UnknownChoiceError.of("kernel", options.kernel, KERNELS)
    if options.kernel == "repmatch":
        return SignedKernel if options.signed else FactorKernel
    if options.signed:
        raise UsageError(f"--signed goes with --kernel repmatch, not with {options.kernel}.")
    if options.kernel == "joined":
        return JoinedKernel
    if options.matrices:
        raise UsageError("--matrices choose among factors, and --kernel embeddings reads none.")
    return partial(JoinedKernel, weights=(0.0, 1.0))


def _features(sets: _Sets, dataset: str, ids: Sequence[str], n: int) -> Features | None:
    """Return what feature coverage reads of the candidates, of which those after the n-th are of what is given."""
    options = sets.options
    alone = "features" in strategy(options.strategy).needs
    if not alone and "feature-coverage" not in options.mix:
        if options.features:
            raise UsageError("--features goes with the strategy feature-coverage, alone or in a mixture.")
        return None
    if options.represent is not None and alone:
        raise SelectionUsageError(f"{options.strategy} can't represent another set: use {', '.join(RECTANGULAR)}")
    named = [(dataset, ids[:n])]
    if len(ids) > n:
        named.append((sets.store.resolve(str(options.given)).dataset, ids[n:]))
    return features_of(sets.store, named, options.features)


def _size(options: SelectOptions, n: int, rules: Constraints) -> int:
    if options.k is not None:
        return picks_of(options.k, n)
    closed = {*np.asarray(rules.exclude, np.int64).tolist(), *np.asarray(rules.given, np.int64).tolist()}
    return n - len([position for position in closed if position < n])


def _matrices(factors: Factors, patterns: Sequence[str]) -> Factors:
    if not patterns:
        return factors
    names = [plain_name(name) for name in factors.matrices]
    kept = [i for i, name in enumerate(names) if any(fnmatchcase(name, p) for p in patterns)]
    unused = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if unused:
        known = ", ".join(dict.fromkeys(names))
        raise UsageError(f"no matrix matches {unused[0]!r}; expected patterns such as '*.value' over: {known}.")
    return choose_matrices(factors, kept)


def _ids(store: Store, dataset: str, what: Ids, option: str) -> list[str]:
    """Return the ids that an option means, which must be of the dataset."""
    if not isinstance(what, str):
        return list(what)
    subset = store.resolve(what)
    if subset.dataset != dataset:
        raise UsageError(f"--{option} {what} is of the dataset {subset.dataset!r}; expected instances of {dataset!r}.")
    return list(store.members(subset).ids)


def _places(ids: Sequence[str], known: dict[str, int], option: str) -> list[int]:
    missing = [i for i in ids if i not in known]
    if missing:
        raise UsageError(f"--{option} names {missing[0]!r}, which has no factors in the dataset.")
    return [known[i] for i in dict.fromkeys(ids)]


@dataclass(frozen=True)
class _Sets:
    """Sets of instances, with all that the kernel reads of them."""

    store: Store
    dataset: str
    options: SelectOptions
    embed: Embed

    def ready(self, dataset: str, stored: Factors) -> tuple[Factors, NDArray[np.int64], tuple[str, ...]]:
        """Return factors in order of ids, where each lay before, and a note where they are too many to be sorted."""
        whole = with_others(self.store, dataset, stored, self.options.ensemble)
        chosen, places = _matrices(whole, self.options.matrices), np.arange(len(stored))
        notes: tuple[str, ...] = ()
        if self.options.strategy not in IN_ROW_ORDER:
            chosen, places, done = in_id_order(chosen)
            notes = () if done else (UNSORTED,)
        if self.options.kernel != "repmatch":
            chosen = replace(chosen, embeddings=self.embed(dataset, chosen.ids))
        return chosen, places, notes

    def named(self, name: str, option: str) -> Factors:
        subset = self.store.resolve(name)
        ids = self.store.members(subset).ids
        if not ids:
            raise UsageError(f"--{option} {name} has no instances.")
        if self.options.ensemble and subset.dataset != self.dataset:
            raise UsageError(
                f"--{option} {name} is of the dataset {subset.dataset!r}, and --ensemble knows other starts of "
                f"{self.dataset!r} alone; name a part of that one, such as "
                f"'{self.dataset}[SQL]', or leave --ensemble out."
            )
        return self.ready(subset.dataset, self.store.factors(subset.dataset, ids=ids))[0]


def _with_given(sets: _Sets, dataset: str, factors: Factors, rules: Constraints) -> tuple[Factors, Constraints]:
    """Add what is given to the rules; instances of another dataset become candidates that can't be picked."""
    store, options = sets.store, sets.options
    known = {name: i for i, name in enumerate(factors.ids)}
    if not options.given:
        return factors, rules
    if not isinstance(options.given, str) or store.resolve(options.given).dataset == dataset:
        places = _places(_ids(store, dataset, options.given, "given"), known, "given")
        return factors, replace(rules, given=places)
    others = sets.named(options.given, "given")
    n, total = len(factors), len(factors) + len(others)
    pad = len(others)
    rules = replace(
        rules,
        given=range(n, total),
        balance=_padded(rules.balance, pad),
        stratify=_padded(rules.stratify, pad),
        groups=_padded(rules.groups, pad),
        costs=None if rules.costs is None else np.concatenate((np.asarray(rules.costs, np.float64), np.ones(pad))),
    )
    return _joined(factors, others), rules


def _padded(labels: Sequence[object] | NDArray[np.generic] | None, count: int) -> list[object] | None:
    # What is given is never picked, so that it may have any label.
    return None if labels is None else [*list(labels), *[labels[0]] * count]


def _joined(a: Factors, b: Factors) -> Factors:
    from repmatch.blocks import same_space

    same_space(a, b)
    if (a.bits is None) != (b.bits is None):
        raise UsageError("the given set keeps factors in another encoding; ingest both with the same --encoding.")

    def both(x: NDArray[Any] | None, y: NDArray[Any] | None) -> Any:
        return None if x is None or y is None else np.concatenate((x, y))

    joined = take(a, slice(0, len(a)))
    return replace(
        joined,
        ids=(*a.ids, *b.ids),
        flat=both(a.flat, b.flat),
        bits=both(a.bits, b.bits),
        norms=both(a.norms, b.norms),
        cores=both(a.cores, b.cores),
        embeddings=both(a.embeddings, b.embeddings),
    )


def _constraints(store: Store, dataset: str, options: SelectOptions, ids: tuple[str, ...]) -> Constraints:
    if options.balance is not None and options.stratify is not None:
        raise UsageError("--balance and --stratify are two answers to one question; give one of them.")
    known = {name: i for i, name in enumerate(ids)}
    groups, low, high = _quotas(store, dataset, options, ids)
    return Constraints(
        balance=None if options.balance is None else _column(store, dataset, options.balance, ids),
        stratify=None if options.stratify is None else _column(store, dataset, options.stratify, ids),
        groups=groups,
        at_least=low,
        at_most=high,
        include=_places(_ids(store, dataset, options.include, "include"), known, "include"),
        exclude=_places(_ids(store, dataset, options.exclude, "exclude"), known, "exclude"),
        costs=None if options.budget is None else _costs(store, dataset, options.cost, ids),
        budget=options.budget,
        min_gain=options.min_gain,
        coverage=options.coverage,
        apart=options.apart,
    )


def _quotas(
    store: Store, dataset: str, options: SelectOptions, ids: tuple[str, ...]
) -> tuple[list[str] | None, dict[Hashable, int], dict[Hashable, int]]:
    if not options.at_least and not options.at_most:
        return None, {}, {}
    if options.quota_field is None:
        raise UsageError("at_least and at_most count values of a column: name it with quota_field.")
    values = _column(store, dataset, options.quota_field, ids)
    there = set(values)
    for value in (*options.at_least, *options.at_most):
        if str(value) not in there:
            shown = ", ".join(sorted(there)[:10])
            raise UsageError(f"no instance has {options.quota_field} {value!r}; its values: {shown}.")
    low: dict[Hashable, int] = {str(v): int(c) for v, c in options.at_least.items()}
    high: dict[Hashable, int] = {str(v): int(c) for v, c in options.at_most.items()}
    return values, low, high


def _column(store: Store, dataset: str, name: str, ids: tuple[str, ...]) -> list[str]:
    column = dict(zip(store.ids(dataset), store.column(dataset, name), strict=True))
    return ["(none)" if column[i] is None else str(column[i]) for i in ids]


def _costs(store: Store, dataset: str, name: str, ids: tuple[str, ...]) -> NDArray[np.float64]:
    """Return what each instance costs: the tokens that the model read of it, or a column of numbers."""
    if name == "tokens":
        found = store.sql("SELECT id, tokens FROM instances WHERE dataset = ?", [dataset])
        tokens = dict(zip(found["id"].to_list(), found["tokens"].to_list(), strict=True))
        return np.array([float(tokens[i] or 0) for i in ids])
    out = np.empty(len(ids))
    for place, value in enumerate(_column(store, dataset, name, ids)):
        try:
            out[place] = float(value)
        except ValueError:
            out[place] = np.nan
        if not (np.isfinite(out[place]) and out[place] > 0):
            raise InputError(
                f"the column {name!r} can't be a cost: it is {value!r} at {ids[place]!r}; expected a number above 0 in "
                "every row. Leave such rows out with --exclude, or count tokens with --cost tokens."
            )
    return out
