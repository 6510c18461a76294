"""What is evaluated: strategies, stored coresets, and the baselines that every choice has to beat."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.select_options import KernelName
from repmatch.errors import SelectionError, UnknownChoiceError, UsageError
from repmatch.selectors import Constraints, JoinedKernel, facility_location, random, strategies, top

if TYPE_CHECKING:
    from repmatch.curator.curator import Curator

BASELINES = {
    "random": "a draw by chance, another one for every seed",
    "full": "every row",
    "longest": "the rows with most tokens",
    "embeddings": "facility location on mean-pooled embeddings of the same model",
    "embeddings-k-means": "of every k-means cluster of these embeddings the row nearest to its centre",
    "joined": "facility location on the RepMatch kernel and that of the embeddings together (--kernel joined)",
    "loss-high": "the rows with the highest loss at the start",
    "loss-low": "the rows with the lowest loss at the start",
    "loss-middle": "the rows whose loss is nearest to the median",
}
ALWAYS = ("random", "full", "longest", "embeddings")
MOST_EMBEDDED = 30_000  # rows whose n × n similarities are held, 3.6 GB
_RULE = re.compile(r"(balance|stratify|kernel|matrices|represent|ensemble)=(.+)")
_NO_RULES = {"full": "the full dataset takes", "embeddings-k-means": "picks of clusters take"}
_ONLY_STRATEGIES = "signed, kernel=NAME, matrices=PATTERN, represent=NAME and ensemble=NAME"
GRAMMAR = (
    "NAME, or NAME+RULE+... with balance=FIELD, stratify=FIELD, signed, kernel=NAME, matrices=PATTERN, represent=NAME, "
    "ensemble=NAME,NAME,..."
)


@dataclass(frozen=True)
class Candidate:
    """A way to choose rows, as the user names it: a name, and maybe a rule: "facility-location+balance=label".

    Attributes:
        text: as the user wrote it.
        name: a strategy, a baseline or a coreset.
        coreset: whether it is a stored coreset.
        balance: column of which every value gets the same number of picks.
        stratify: column whose proportions are kept.
        signed: by the cosine of ΔW.
        kernel: what is alike, as `SelectOptions` names it; None: the usual.
        matrices: pattern of the matrices that count.
        represent: the set that the picks should stand for.
        ensemble: datasets with the same ids from other starts, separated by commas.
    """

    text: str
    name: str
    coreset: bool = False
    balance: str | None = None
    stratify: str | None = None
    signed: bool = False
    kernel: KernelName | None = None
    matrices: str | None = None
    represent: str | None = None
    ensemble: str | None = None

    @property
    def drawn(self) -> bool:
        """Whether another seed chooses other rows."""
        return self.name == "random" and not self.coreset

    @property
    def sized(self) -> bool:
        """Whether it can be chosen in any size."""
        return self.name != "full"


def parse(text: str) -> Candidate:
    """Read a candidate.

    Args:
        text: "NAME", or "NAME+RULE+..." with the rules balance=FIELD, stratify=FIELD, signed, kernel=NAME,
            matrices=PATTERN, represent=NAME and ensemble=NAME,...; the last five go with strategies only.

    Returns:
        The candidate.

    Raises:
        UnknownChoiceError: no strategy or baseline has that name.
        UsageError: a rule is none, or goes with no choice.
    """
    name, *rules = (part.strip() for part in text.strip().split("+"))
    known = {*strategies(), *BASELINES}
    if name not in known:
        raise UnknownChoiceError.of("strategy or baseline", name, known, "stored coresets are named with --coreset")
    if name in _NO_RULES and rules:
        raise UsageError(f"{text!r}: {_NO_RULES[name]} no rule; leave +{rules[0]} out.")
    given: dict[str, Any] = {}
    for rule in rules:
        match = _RULE.fullmatch(rule)
        if match is None and rule != "signed":
            raise UsageError(f"{text!r}: {rule!r} is no rule; expected {GRAMMAR}.")
        given |= {"signed": True} if match is None else {match[1]: match[2].strip()}
    if name in BASELINES and given.keys() - {"balance", "stratify"}:
        raise UsageError(f"{text!r}: {name} is a baseline; {_ONLY_STRATEGIES} go with strategies of select.")
    return Candidate(text.strip(), name, **given)


@dataclass
class Pool:
    """The dataset that candidates choose from, with what baselines need to know of it.

    Attributes:
        curator: the curator.
        dataset: its name.
        ids: instances with a factor, n of them, in the dataset's order.
        labels: n labels.
        losses: (n,) float64, loss at the shared start.
        tokens: (n,) int64.
        embed: makes (n, d) float32 unit rows when they are needed.
    """

    curator: Curator
    dataset: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    embed: Callable[[], NDArray[np.float32]]

    def choose(self, candidate: Candidate, k: int, seed: int) -> tuple[str, ...]:
        """Choose k rows.

        Args:
            candidate: how.
            k: how many, 1 to n; the full dataset and coresets have a size of their own.
            seed: for what is drawn by chance.

        Returns:
            Ids, best first where there is an order.

        Raises:
            SelectionError: the rows cannot be chosen.
        """
        if candidate.coreset:
            return self._coreset(candidate.name)
        if candidate.name == "full":
            return self.ids
        if candidate.name not in BASELINES:
            return self._selected(candidate, k)
        rules = self._rules(candidate)
        if candidate.name == "embeddings-k-means":
            picks = nearest_to_centres(self._embedded, k)
        elif candidate.name == "joined":
            picks = facility_location(self._joined_kernel, k, constraints=rules).indices
        elif candidate.name == "random":
            picks = random(len(self.ids), k, seed, constraints=rules).indices
        elif candidate.name == "embeddings":
            picks = facility_location(self._embedding_kernel, k, constraints=rules).indices
        else:
            picks = top(self._values(candidate.name), k, constraints=rules).indices
        return tuple(self.ids[i] for i in picks)

    def _values(self, name: str) -> NDArray[np.float64]:
        if name == "longest":
            return self.tokens.astype(np.float64)
        if name == "loss-middle":
            return -np.abs(self.losses - np.median(self.losses))
        return self.losses if name == "loss-high" else -self.losses

    def _coreset(self, name: str) -> tuple[str, ...]:
        store = self.curator.store
        subset = store.resolve(name)
        if subset.dataset != self.dataset:
            raise SelectionError(f"the coreset {name!r} is of the dataset {subset.dataset!r}, not of {self.dataset!r}.")
        return store.members(subset).ids

    def _selected(self, candidate: Candidate, k: int) -> tuple[str, ...]:
        found = self.curator.select(
            self.dataset,
            k,
            strategy=candidate.name,
            balance=candidate.balance,
            stratify=candidate.stratify,
            signed=candidate.signed,
            kernel=candidate.kernel or "repmatch",
            matrices=() if candidate.matrices is None else (candidate.matrices,),
            represent=candidate.represent,
            ensemble=() if candidate.ensemble is None else [name.strip() for name in candidate.ensemble.split(",")],
        )
        return found.ids

    def _rules(self, candidate: Candidate) -> Constraints:
        column = candidate.balance or candidate.stratify
        if column is None:
            return Constraints()
        store = self.curator.store
        held = dict(zip(store.ids(self.dataset), store.column(self.dataset, column), strict=True))
        values = ["(none)" if held[i] is None else str(held[i]) for i in self.ids]
        return Constraints(balance=values) if candidate.balance else Constraints(stratify=values)

    @cached_property
    def _embedded(self) -> NDArray[np.float32]:
        if len(self.ids) > MOST_EMBEDDED:
            raise SelectionError(
                f"the embeddings baseline holds a similarity for every pair, and {len(self.ids)} rows are more than "
                f"{MOST_EMBEDDED}; leave it out, or evaluate a smaller dataset."
            )
        return self.embed()

    @cached_property
    def _embedding_kernel(self) -> NDArray[np.float32]:
        kernel: NDArray[np.float32] = np.maximum(self._embedded @ self._embedded.T, 0.0)
        return kernel

    @cached_property
    def _joined_kernel(self) -> JoinedKernel:
        factors = self.curator.store.factors(self.dataset, ids=self.ids)
        return JoinedKernel(replace(factors, embeddings=self._embedded))


def nearest_to_centres(rows: NDArray[np.float32], k: int, seed: int = 0) -> NDArray[np.int64]:
    """Cluster rows by k-means and return the row nearest to each centre.

    Args:
        rows: (n, d).
        k: clusters, 1 to n.
        seed: of the start (k-means++).

    Returns:
        k positions, those of the largest clusters first.
    """
    cluster: Any = __import__("scipy.cluster.vq", fromlist=["kmeans2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of empty clusters, which are seen to below
        _, found = cluster.kmeans2(rows.astype(np.float64), k, minit="++", seed=seed, iter=50)
    picks: list[int] = []
    for label in np.argsort(-np.bincount(found, minlength=k), kind="stable"):
        members = np.flatnonzero(found == label)
        if len(members):
            picks.append(int(members[_squared(rows[members], rows[members].mean(axis=0)).argmin()]))
    nearest = np.min([_squared(rows, rows[pick]) for pick in picks], axis=0)
    while len(picks) < k:  # an empty cluster gives its pick to the farthest row
        nearest[picks] = -1.0
        picks.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _squared(rows, rows[picks[-1]]))
    return np.array(picks, np.int64)


def _squared(rows: NDArray[np.float32], point: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = ((rows - point) ** 2).sum(axis=1)
    return found


def imbalance(labels: Sequence[str], whole: Sequence[str]) -> float:
    """Return how far a selection's labels are from the dataset's: half the summed differences of shares.

    Args:
        labels: of the selection.
        whole: of the dataset.

    Returns:
        Total variation distance, 0 (the same shares) to 1 (no label in common).
    """
    names = sorted({*labels, *whole})
    here = np.array([sum(label == name for label in labels) for name in names]) / max(1, len(labels))
    there = np.array([sum(label == name for label in whole) for name in names]) / max(1, len(whole))
    return float(0.5 * np.abs(here - there).sum())
