"""What a user can ask of a selection, in the user's words: names, columns, values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, get_args

from repmatch.datamodels import digest
from repmatch.errors import UsageError

Ids = str | Sequence[str]
KernelName = Literal["repmatch", "embeddings", "joined"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)
LONGEST = 100  # characters of a name that is made up


@dataclass(frozen=True)
class SelectOptions:
    """How a coreset is chosen. Everything has a default; rules hold together.

    A set of instances is named by a coreset, a subset, a dataset or `DATASET[SQL]`, or listed by ids.

    Attributes:
        k: picks, or a share of the dataset as "5%"; None: as many as the other rules allow.
        strategy: its name, see `repmatch.selectors.strategies`.
        algorithm: how it finds its picks; "auto" chooses by size and memory.
        balance: column of which every value gets the same number of picks.
        stratify: column whose proportions in the dataset are kept.
        quota_field: column that `at_least` and `at_most` speak of.
        at_least: value of that column -> fewest picks.
        at_most: value of that column -> most picks.
        include: instances that are picked first.
        exclude: instances that are never picked.
        given: instances, of this or another dataset, that are there already: what they represent counts, and the picks
            add to it.
        represent: the instances that the picks should stand for; None: the dataset itself.
        budget: what all picks may cost together.
        cost: "tokens", or a column of numbers.
        min_gain: stop before a pick that gains less.
        coverage: stop once this share (0 to 1) of what all instances together reach is reached.
        apart: no two picks are more similar than this.
        matrices: patterns such as "*.value" of the adapted matrices that count; empty: all.
        features: columns that "feature-coverage" reads; empty: the words of the fields that the task reads.
        signed: by the cosine of ΔW, which tells opposite instances apart.
        kernel: "repmatch"; "embeddings" of the base model; or "joined", both together, each with the same weight on
            average. Embeddings are made when they are first asked for, and kept in the store.
        ensemble: datasets that hold the same ids from other starts or models; likeness is the mean over all of them.
        mix: strategy -> weight, for the strategy "mixture".
        parameters: numbers of the strategy's own, such as graph cut's "trade".
        seed: for strategies that draw.
        name: of the coreset; None: made from the arguments.
        replace: whether a coreset of that name may be replaced.
    """

    k: int | str | None = None
    strategy: str = "facility-location"
    algorithm: str = "auto"
    balance: str | None = None
    stratify: str | None = None
    quota_field: str | None = None
    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    include: Ids = ()
    exclude: Ids = ()
    given: Ids = ()
    represent: str | None = None
    budget: float | None = None
    cost: str = "tokens"
    min_gain: float | None = None
    coverage: float | None = None
    apart: float | None = None
    matrices: Sequence[str] = ()
    features: Sequence[str] = ()
    signed: bool = False
    kernel: KernelName = "repmatch"
    ensemble: Sequence[str] = ()
    mix: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    name: str | None = None
    replace: bool = False

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, as plain JSON values."""
        out = {}
        for f in fields(self):
            value, usual = getattr(self, f.name), getattr(SelectOptions(), f.name)
            if value != usual and not (hasattr(value, "__len__") and not len(value)):
                out[f.name] = _plain(value)
        return out

    def words(self) -> list[str]:
        """Return the command line's options that say the same; lists of ids can't be said there."""
        out: list[str] = []
        for name, value in self.changed().items():
            option = {"k": "-k", "parameters": "--param"}.get(name, f"--{name.replace('_', '-')}")
            if name in ("name", "replace", "quota_field"):
                continue
            if name in ("at_least", "at_most"):
                values = [f"{self.quota_field}={key}:{number}" for key, number in value.items()]
            elif isinstance(value, dict):
                values = [f"{key}={number:g}" for key, number in value.items()]
            elif name in ("matrices", "features", "ensemble"):
                values = value
            else:
                values = [f"<{len(value)} ids>" if isinstance(value, list) else str(value)]
            out += [option] if value is True else [word for each in values for word in (option, each)]
        return out

    def default_name(self, source: str) -> str:
        """Return the name of a coreset that was given none.

        Args:
            source: what is selected from.

        Returns:
            A name that says source, strategy, size and rules; shortened ones end in a digest.
        """
        size = "all" if self.k is None else str(self.k).replace(" ", "").replace("%", "pct")
        parts = [source, self.strategy, size]
        for name, value in self.changed().items():
            if name == "seed":
                parts.append(f"seed{value}")
            elif name not in ("k", "strategy", "name", "replace", "quota_field"):
                parts.append(name.replace("_", "-") + ("" if value is True else f"-{_short(value)}"))
        whole = "-".join(parts)
        name = re.sub(r"[^\w.-]+", "_", whole).strip("_-.")
        # Characters that a name can't have must not make two selections one.
        same = len(name) <= LONGEST and not re.search(r"[^\w.%\[\]<>=' +-]", whole)
        return name if same else f"{name[: LONGEST - 9]}-{digest(whole)[:8]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}{number:g}" for key, number in value.items())
    if isinstance(value, list):
        return "_".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class SelectArguments(TypedDict, total=False):
    """The fields of `SelectOptions` as keyword arguments."""

    strategy: str
    algorithm: str
    balance: str | None
    stratify: str | None
    quota_field: str | None
    at_least: Mapping[str, int]
    at_most: Mapping[str, int]
    include: Ids
    exclude: Ids
    given: Ids
    represent: str | None
    budget: float | None
    cost: str
    min_gain: float | None
    coverage: float | None
    apart: float | None
    matrices: Sequence[str]
    features: Sequence[str]
    signed: bool
    kernel: KernelName
    ensemble: Sequence[str]
    mix: Mapping[str, float]
    parameters: Mapping[str, float]
    seed: int
    name: str | None
    replace: bool


def picks_of(k: int | str, n: int) -> int:
    """Turn a size as the user gives it into a number of picks.

    Args:
        k: a number, or a percentage such as "5%".
        n: instances in the dataset.

    Returns:
        Picks; a percentage is rounded to the nearest whole number, and is at least one.

    Raises:
        UsageError: it is neither, or out of range.
    """
    text = str(k).strip()
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text)
    if match is None:
        raise UsageError(f"-k {text!r} is no size; expected a number of picks such as 100, or a share such as 5%.")
    if match[1]:
        picks = int(match[1])
    else:
        share = float(match[2])
        if not 0 < share <= 100:
            raise UsageError(f"-k {text} is out of range; expected a share above 0% and up to 100%.")
        picks = max(1, round(n * share / 100))
    if not 1 <= picks <= n:
        raise UsageError(f"-k {text} is out of range; the dataset has {n} instances.")
    return picks
