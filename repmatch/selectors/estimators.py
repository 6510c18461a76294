"""Strategies with scikit-learn's manners: construct, fit, read `ranking_`. scikit-learn itself is not needed.

`Selector` runs any registered strategy on a kernel. The classes named ...Selection take rows of features and the
arguments that apricot-select's classes of the same names take, so that its users change an import:

    from repmatch.selectors.estimators import FacilityLocationSelection
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.baselines import random
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.estimator import Estimator, Selector
from repmatch.selectors.facility import facility_location
from repmatch.selectors.features import Concave, FeatureCoverage
from repmatch.selectors.greedy import Objective, Search
from repmatch.selectors.kernels import DenseKernel, Kernel, as_kernel
from repmatch.selectors.objectives import (
    Coverage,
    GraphCut,
    Mixture,
    SaturatedCoverage,
    SetFunction,
)
from repmatch.selectors.selection import Selection
from repmatch.selectors.sparse import SparseKernel
from repmatch.selectors.strategies import maximize

__all__ = [
    "BaseGraphSelection",
    "BaseSelection",
    "CustomGraphSelection",
    "CustomSelection",
    "FacilityLocationSelection",
    "FeatureBasedSelection",
    "GraphCutSelection",
    "MaxCoverageSelection",
    "MixtureSelection",
    "SaturatedCoverageSelection",
    "Selector",
    "SumRedundancySelection",
    "similarities",
]

Metric = Literal["precomputed", "euclidean", "cosine", "corr", "correlation"]
Exact = Literal["auto", "lazy", "naive", "two-stage", "approximate-lazy", "modular", "bidirectional", "sieve"]
Optimizer = Exact | Literal["stochastic", "sample", "greedi", "random"]
OPTIMIZERS = (*get_args(Exact), "stochastic", "sample", "greedi", "random")
UNUSED = ("optimizer_kwds", "reservoir", "max_reservoir_size", "n_jobs", "verbose")  # apricot's, without effect here


class BaseSelection(Estimator, ABC):
    """Select rows by maximising an objective.

    Attributes:
        ranking_: (k,) int64 positions in pick order, after `fit`; also `ranking`.
        gains_: (k,) float64, what each pick added; also `gains`.
        selection_: the whole result, with certificate, representatives and weights.
    """

    parameters: tuple[str, ...] = ("n_samples", "initial_subset", "optimizer", "random_state")

    def __init__(
        self,
        n_samples: int = 10,
        *,
        initial_subset: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        optimizer: Optimizer = "auto",
        random_state: int | None = None,
        **unused: Any,
    ) -> None:
        """Keep the parameters.

        Args:
            n_samples: rows to select; with `sample_cost` what they may cost together.
            initial_subset: positions of rows that are there already and are not picked again.
            optimizer: "stochastic" and "sample" look at samples, "greedi" works in parts (facility location), "random"
                draws; the others are exact, for what they save is not needed here.
            random_state: seed, for those four.
            **unused: arguments of apricot's that speak of how it works and change nothing here: optimizer_kwds,
                reservoir, max_reservoir_size, n_jobs, verbose.

        Raises:
            TypeError: another argument.
        """
        for name in unused:
            if name not in UNUSED:
                raise TypeError(f"{type(self).__name__} takes no argument {name!r}")
        self.n_samples, self.initial_subset = n_samples, initial_subset
        self.optimizer, self.random_state = optimizer, random_state

    @abstractmethod
    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""

    def fit(
        self,
        x: Any,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        sample_cost: ArrayLike | None = None,
    ) -> Self:
        """Select.

        Args:
            x: (n, d) rows, or whatever the metric expects.
            y: not used.
            sample_weight: not used, as in apricot.
            sample_cost: (n,) what each row costs, above 0.

        Returns:
            This object.

        Raises:
            SelectionError: rows, sizes or costs that can't be used.
        """
        if self.optimizer not in OPTIMIZERS:
            raise SelectionError(f"there is no optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        given = () if self.initial_subset is None else np.asarray(self.initial_subset)
        rules = Constraints(given=given)
        k: int = self.n_samples
        if sample_cost is not None:
            rules = Constraints(given=given, costs=sample_cost, budget=float(self.n_samples))
            k = int(np.shape(sample_cost)[0]) - len(given)
        return self._keep(self._solve(x, k, rules))

    def _solve(self, x: Any, k: int, rules: Constraints) -> Selection:
        search: Search = "stochastic" if self.optimizer in ("stochastic", "sample") else "auto"
        make, seed = self.objective(x), self.random_state or 0
        if self.optimizer == "random":
            return random(make().n, k, seed, constraints=rules)
        return maximize(make, k, strategy=type(self).__name__, search=search, constraints=rules, seed=seed)

    def fit_transform(
        self,
        x: Any,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        sample_cost: ArrayLike | None = None,
    ) -> Any:
        """Select and return the picked rows; with y a pair of rows and labels."""
        return self.fit(x, y, sample_weight, sample_cost).transform(x, y)


class BaseGraphSelection(BaseSelection):
    """Select rows by an objective on their similarities."""

    parameters: tuple[str, ...] = ("n_samples", "metric", "n_neighbors", "initial_subset", "optimizer", "random_state")
    surveyed = False  # see `DenseKernel`

    def __init__(
        self, n_samples: int = 10, metric: Metric = "euclidean", *, n_neighbors: int | None = None, **more: Any
    ) -> None:
        """Keep the parameters.

        Args:
            n_samples: rows to select; with `sample_cost` what they may cost together.
            metric: "precomputed" similarities; "euclidean": the largest squared distance minus the squared distance;
                "cosine" and "corr": squared.
            n_neighbors: keep only so many similarities of each row.
            **more: of `BaseSelection`.
        """
        super().__init__(n_samples, **more)
        self.metric, self.n_neighbors = metric, n_neighbors

    def kernel(self, x: Any) -> Kernel:
        """Return the similarities of rows."""
        if self.metric == "precomputed":
            out = as_kernel(x, survey=self.surveyed)
        else:
            out = DenseKernel(similarities(x, self.metric), survey=self.surveyed)
        return out if self.n_neighbors is None else SparseKernel.nearest(out, self.n_neighbors)


class FacilityLocationSelection(BaseGraphSelection):
    """Rows that together resemble every row."""

    surveyed = True

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        kernel = self.kernel(x)
        return lambda: Coverage(kernel)

    def _solve(self, x: Any, k: int, rules: Constraints) -> Selection:
        if self.optimizer == "random":
            return super()._solve(x, k, rules)
        names = {"stochastic": "stochastic", "sample": "stochastic", "greedi": "partitioned"}
        algorithm: Any = names.get(self.optimizer, "auto")
        return facility_location(self.kernel(x), k, constraints=rules, algorithm=algorithm, seed=self.random_state or 0)


class GraphCutSelection(BaseGraphSelection):
    """Rows that resemble all and differ from each other."""

    parameters: tuple[str, ...] = (*BaseGraphSelection.parameters, "alpha")

    def __init__(self, n_samples: int = 10, metric: Metric = "euclidean", alpha: float = 1.0, **more: Any) -> None:
        """Keep the parameters; alpha is graph cut's λ, the smaller, the more the picks differ."""
        super().__init__(n_samples, metric, **more)
        self.alpha = alpha

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        kernel = self.kernel(x)
        return lambda: GraphCut(kernel, trade=self.alpha)


class SumRedundancySelection(BaseGraphSelection):
    """Rows that differ from each other: the least sum of similarities among them."""

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        kernel = self.kernel(x)
        return lambda: GraphCut(kernel, trade=0.0)


class SaturatedCoverageSelection(BaseGraphSelection):
    """Rows that together cover every row up to a share of its total similarity."""

    parameters: tuple[str, ...] = (*BaseGraphSelection.parameters, "alpha")

    def __init__(self, n_samples: int = 10, metric: Metric = "euclidean", alpha: float = 0.1, **more: Any) -> None:
        """Keep the parameters; alpha is the share at which a row is satisfied."""
        super().__init__(n_samples, metric, **more)
        self.alpha = alpha

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        kernel = self.kernel(x)
        return lambda: SaturatedCoverage(kernel, saturation=self.alpha)


class FeatureBasedSelection(BaseSelection):
    """Rows in which every feature is present, with falling returns."""

    parameters: tuple[str, ...] = (*BaseSelection.parameters, "concave_func")

    def __init__(self, n_samples: int = 10, concave_func: Concave = "sqrt", **more: Any) -> None:
        """Keep the parameters; concave_func is how returns fall, "sqrt", "log", "sigmoid" or a function."""
        super().__init__(n_samples, **more)
        self.concave_func: Concave = concave_func

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        return lambda: FeatureCoverage(x, concave=self.concave_func)


class MaxCoverageSelection(BaseSelection):
    """Rows in which as many features as possible reach a threshold together."""

    parameters: tuple[str, ...] = (*BaseSelection.parameters, "threshold")

    def __init__(self, n_samples: int = 10, threshold: float = 1.0, **more: Any) -> None:
        """Keep the parameters; a feature counts up to the threshold, which is above 0."""
        super().__init__(n_samples, **more)
        self.threshold = threshold

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        most = self.threshold
        return lambda: FeatureCoverage(x, concave=lambda total: np.minimum(total, most))


class _Custom(BaseSelection):
    """What both kinds of a function of one's own share."""

    parameters: tuple[str, ...] = (*BaseSelection.parameters, "function", "function_kwds")

    def __init__(
        self,
        n_samples: int,
        function: Callable[..., float],
        *,
        function_kwds: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Keep the parameters.

        Args:
            n_samples: rows to select.
            function: gives the value of (k, d) picked rows; it may not change them.
            function_kwds: more arguments of it.
            **more: of the class above.
        """
        super().__init__(n_samples, **more)
        self.function, self.function_kwds = function, function_kwds

    def valued(self, rows: NDArray[Any]) -> Callable[[], Objective]:
        """Return what makes the objective on rows that the function is called with."""
        more = self.function_kwds or {}
        return lambda: SetFunction(lambda picks: self.function(rows[picks], **more), len(rows))


class CustomSelection(_Custom):
    """Rows that maximise a function of one's own, called on the picked rows; plain greedy."""

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        return self.valued(np.asarray(x))


class CustomGraphSelection(_Custom, BaseGraphSelection):
    """Rows that maximise a function of one's own, called on the picked rows' similarities with all; plain greedy."""

    parameters: tuple[str, ...] = (*BaseGraphSelection.parameters, "function", "function_kwds")

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        kernel = self.kernel(x)
        return self.valued(kernel.columns(np.arange(kernel.shape[1])).T)


class MixtureSelection(BaseSelection):
    """Rows that maximise a weighted sum of other estimators' objectives."""

    parameters: tuple[str, ...] = (*BaseSelection.parameters, "functions", "weights")

    def __init__(
        self, n_samples: int, functions: Sequence[BaseSelection], weights: ArrayLike | None = None, **more: Any
    ) -> None:
        """Keep the parameters; functions are estimators, weights one number of at least 0 each, 1 by default."""
        super().__init__(n_samples, **more)
        self.functions, self.weights = functions, weights

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        weights = np.ones(len(self.functions)) if self.weights is None else np.asarray(self.weights, np.float64)
        if weights.shape != (len(self.functions),):
            raise SelectionError(f"{weights.shape} weights for {len(self.functions)} functions: expected one each")
        makers = [function.objective(x) for function in self.functions]
        return lambda: Mixture([(float(w), make()) for w, make in zip(weights, makers, strict=True)])


def similarities(x: ArrayLike, metric: Metric) -> NDArray[np.floating[Any]]:
    """Return the similarities of rows, as apricot defines them.

    Args:
        x: (n, d) finite numbers.
        metric: "euclidean", "cosine" or "corr".

    Returns:
        (n, n), symmetric, in the floats of x.

    Raises:
        SelectionError: another metric, or rows that can't be used.
    """
    if hasattr(x, "tocsr"):
        raise SelectionError(f"a sparse matrix holds similarities: metric 'precomputed' takes it, not {metric!r}")
    rows = np.asarray(x)
    rows = rows.astype(np.float64) if rows.dtype not in (np.float32, np.float64) else rows
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise SelectionError(f"rows of shape {rows.shape} can't be compared: expected (n, d) finite numbers")
    if metric == "euclidean":
        rows = rows - rows.mean(axis=0)  # distances stay, rounding shrinks
        squares = np.einsum("nd,nd->n", rows, rows)
        distance = np.maximum(squares[:, None] + squares - 2.0 * (rows @ rows.T), 0.0)
        np.fill_diagonal(distance, 0.0)
        out = distance.max(initial=0.0) - distance
    elif metric in ("cosine", "corr", "correlation"):
        centred = rows if metric == "cosine" else rows - rows.mean(axis=1, keepdims=True)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit = centred / np.where(length > 0, length, 1.0)
        out = np.square(unit @ unit.T)
    else:
        raise SelectionError(f"there is no metric {metric!r}: expected precomputed, euclidean, cosine or corr")
    symmetric: NDArray[np.floating[Any]] = np.maximum(out, out.T)
    return symmetric
