"""What scikit-learn calls an estimator, without scikit-learn: construct, fit, read `ranking_`."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, share
from repmatch.selectors.kernels import Kernel, as_kernel
from repmatch.selectors.registry import Problem, select
from repmatch.selectors.selection import Selection


class Estimator:
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
        rows = (values.tocsr() if hasattr(values, "tocsr") else np.asarray(values))[self.ranking_]
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


class Selector(Estimator):
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
