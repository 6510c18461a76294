"""Strategies with scikit-learn's manners: construct, fit, read `ranking_`. scikit-learn itself is not needed.

`Selector` runs any registered strategy on a kernel. The classes named ...Selection take rows of features and the
arguments that apricot-select's classes of the same names take, so that its users change an import:

    from repmatch.selectors.estimators import FacilityLocationSelection
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, share
from repmatch.selectors.facility import facility_location
from repmatch.selectors.greedy import Objective, Search
from repmatch.selectors.kernels import DenseKernel, Kernel, as_kernel
from repmatch.selectors.objectives import (
    Concave,
    Coverage,
    FeatureCoverage,
    GraphCut,
    Mixture,
    SaturatedCoverage,
    SetFunction,
)
from repmatch.selectors.registry import Problem, select
from repmatch.selectors.selection import Selection
from repmatch.selectors.sparse import SparseKernel
from repmatch.selectors.strategies import maximize

Metric = Literal["precomputed", "euclidean", "cosine", "corr", "correlation"]
Optimizer = Literal["auto", "lazy", "naive", "two-stage", "stochastic", "greedi"]


class _Estimator:
    """What all estimators share: results, transform, parameters."""

    parameters: tuple[str, ...] = ()
    ranking_: NDArray[np.int64]
    gains_: NDArray[np.float64]
    selection_: Selection

    @property
    def ranking(self) -> NDArray[np.int64]:
        """`ranking_` by apricot's name."""
        return self.ranking_

    @property
    def gains(self) -> NDArray[np.float64]:
        """`gains_` by apricot's name."""
        return self.gains_

    def _keep(self, selection: Selection) -> Self:
        self.selection_, self.ranking_, self.gains_ = selection, selection.indices, selection.gains
        return self

    def transform(self, values: ArrayLike, y: ArrayLike | None = None) -> Any:
        """Return the picked rows of an array, in pick order.

        Args:
            values: (n, ...) one row an instance.
            y: (n, ...) labels, picked along.

        Returns:
            (k, ...) rows; with y a pair of rows and labels.

        Raises:
            SelectionError: nothing was fitted yet.
        """
        if not hasattr(self, "ranking_"):
            raise SelectionError("this selector holds no selection yet: call fit first")
        rows = np.asarray(values)[self.ranking_]
        return rows if y is None else (rows, np.asarray(y)[self.ranking_])

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name.

        Args:
            deep: for scikit-learn's sake; there is nothing below.
        """
        return {name: getattr(self, name) for name in self.parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Change parameters.

        Args:
            **parameters: new values by name.

        Returns:
            This object.

        Raises:
            SelectionError: a name that is none of them.
        """
        for name, value in parameters.items():
            if name not in self.parameters:
                raise SelectionError(f"a selector has no parameter {name!r}: expected {', '.join(self.parameters)}")
            setattr(self, name, value)
        return self


class Selector(_Estimator):
    """Select instances with any registered strategy.

    Attributes:
        ranking_: (k,) int64 positions in pick order, after `fit`.
        gains_: (k,) float64, what each pick added.
        selection_: the whole result.
    """

    parameters: tuple[str, ...] = ("n_select", "strategy", "constraints", "algorithm", "seed")

    def __init__(
        self,
        n_select: int | float = 0.1,
        *,
        strategy: str = "facility-location",
        constraints: Constraints | None = None,
        algorithm: str = "auto",
        seed: int = 0,
    ) -> None:
        """Keep the parameters.

        Args:
            n_select: picks, or their share of all instances as a float between 0 and 1.
            strategy: a registered name.
            constraints: rules for the picks.
            algorithm: how the strategy finds them.
            seed: for strategies that draw.
        """
        self.n_select, self.strategy, self.constraints = n_select, strategy, constraints
        self.algorithm, self.seed = algorithm, seed

    def fit(self, kernel: Kernel | Factors | ArrayLike, y: ArrayLike | None = None) -> Self:
        """Select.

        Args:
            kernel: a kernel, factors, an (n, n) array of similarities, or a sparse matrix of them.
            y: (n,) scores, for strategies that need them.

        Returns:
            This object.
        """
        given = as_kernel(kernel)
        n = given.shape[1]
        k = share(n, self.n_select) if isinstance(self.n_select, float) else self.n_select
        scores = None if y is None else np.asarray(y, np.float64)
        rules = self.constraints or Constraints()
        return self._keep(select(self.strategy, Problem(n, k, given, scores, rules, self.seed, self.algorithm)))

    def fit_transform(self, kernel: Kernel | Factors | ArrayLike, y: ArrayLike | None = None) -> NDArray[Any]:
        """Select and return the picks' rows of the kernel array.

        Args:
            kernel: an (n, n) array of similarities.
            y: (n,) scores, for strategies that need them.

        Returns:
            (k, n) rows.
        """
        return np.asarray(self.fit(kernel, y).transform(np.asarray(kernel)))


class BaseSelection(_Estimator, ABC):
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
    ) -> None:
        """Keep the parameters.

        Args:
            n_samples: rows to select; with `sample_cost` what they may cost together.
            initial_subset: positions of rows that are there already and are not picked again.
            optimizer: "stochastic" looks at samples, "greedi" works in parts (facility location); the others are exact.
            random_state: seed, for those two.
        """
        self.n_samples, self.initial_subset = n_samples, initial_subset
        self.optimizer, self.random_state = optimizer, random_state

    @abstractmethod
    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""

    def fit(self, x: Any, y: ArrayLike | None = None, *, sample_cost: ArrayLike | None = None) -> Self:
        """Select.

        Args:
            x: (n, d) rows, or whatever the metric expects.
            y: not used.
            sample_cost: (n,) what each row costs, above 0.

        Returns:
            This object.

        Raises:
            SelectionError: rows, sizes or costs that can't be used.
        """
        known = ("auto", "lazy", "naive", "two-stage", "stochastic", "greedi")
        if self.optimizer not in known:
            raise SelectionError(f"there is no optimizer {self.optimizer!r}: expected one of {', '.join(known)}")
        given = () if self.initial_subset is None else np.asarray(self.initial_subset)
        rules = Constraints(given=given)
        k: int = self.n_samples
        if sample_cost is not None:
            rules = Constraints(given=given, costs=sample_cost, budget=float(self.n_samples))
            k = int(np.shape(sample_cost)[0]) - len(given)
        return self._keep(self._solve(x, k, rules))

    def _solve(self, x: Any, k: int, rules: Constraints) -> Selection:
        if self.optimizer == "greedi":
            raise SelectionError("greedi works with facility location only: choose another optimizer")
        search: Search = "stochastic" if self.optimizer == "stochastic" else "auto"
        make, seed = self.objective(x), self.random_state or 0
        return maximize(make, k, strategy=type(self).__name__, search=search, constraints=rules, seed=seed)

    def fit_transform(self, x: Any, y: ArrayLike | None = None, *, sample_cost: ArrayLike | None = None) -> Any:
        """Select and return the picked rows; with y a pair of rows and labels."""
        return self.fit(x, y, sample_cost=sample_cost).transform(x, y)


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
        names = {"stochastic": "stochastic", "greedi": "partitioned"}
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
        """Keep the parameters; concave_func is how returns fall, "sqrt" or "log"."""
        super().__init__(n_samples, **more)
        self.concave_func: Concave = concave_func

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        return lambda: FeatureCoverage(x, concave=self.concave_func)


class CustomSelection(BaseSelection):
    """Rows that maximise a function of one's own, called on the picked rows; plain greedy."""

    parameters: tuple[str, ...] = (*BaseSelection.parameters, "function")

    def __init__(self, n_samples: int, function: Callable[[NDArray[Any]], float], **more: Any) -> None:
        """Keep the parameters; function gives the value of (k, d) picked rows."""
        super().__init__(n_samples, **more)
        self.function = function

    def objective(self, x: Any) -> Callable[[], Objective]:
        """Return what makes the objective on some rows."""
        rows = np.asarray(x)
        return lambda: SetFunction(lambda picks: self.function(rows[picks]), len(rows))


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
