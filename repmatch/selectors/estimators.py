"""Strategies with scikit-learn's manners: construct, fit, read `ranking_`. scikit-learn itself is not needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, share
from repmatch.selectors.kernels import Kernel, as_kernel
from repmatch.selectors.registry import Problem, select
from repmatch.selectors.selection import Selection


class Selector:
    """Select instances with any registered strategy.

    Attributes:
        ranking_: (k,) int64 positions in pick order, after `fit`.
        gains_: (k,) float64, what each pick added.
        selection_: the whole result.
    """

    ranking_: NDArray[np.int64]
    gains_: NDArray[np.float64]
    selection_: Selection

    def __init__(
        self,
        n_select: int | float = 0.1,
        *,
        strategy: str = "facility-location",
        constraints: Constraints | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the parameters.

        Args:
            n_select: picks, or their share of all instances as a float between 0 and 1.
            strategy: a registered name.
            constraints: rules for the picks.
            seed: for strategies that draw.
        """
        self.n_select, self.strategy, self.constraints, self.seed = n_select, strategy, constraints, seed

    def fit(self, kernel: Kernel | Factors | ArrayLike, y: ArrayLike | None = None) -> Selector:
        """Select.

        Args:
            kernel: a kernel, factors, or an (n, n) array of similarities.
            y: (n,) scores, for strategies that need them.

        Returns:
            This object.
        """
        given = as_kernel(kernel)
        n = given.shape[1]
        k = share(n, self.n_select) if isinstance(self.n_select, float) else self.n_select
        scores = None if y is None else np.asarray(y, np.float64)
        problem = Problem(n, k, given, scores, self.constraints or Constraints(), self.seed)
        self.selection_ = select(self.strategy, problem)
        self.ranking_, self.gains_ = self.selection_.indices, self.selection_.gains
        return self

    def transform(self, values: ArrayLike) -> NDArray[Any]:
        """Return the picked rows of an array, in pick order.

        Args:
            values: (n, ...) one row an instance.

        Returns:
            (k, ...) rows.

        Raises:
            SelectionError: nothing was fitted yet.
        """
        if not hasattr(self, "ranking_"):
            raise SelectionError("this selector holds no selection yet: call fit first")
        return np.asarray(values)[self.ranking_]

    def fit_transform(self, kernel: Kernel | Factors | ArrayLike, y: ArrayLike | None = None) -> NDArray[Any]:
        """Select and return the picks' rows of the kernel array.

        Args:
            kernel: an (n, n) array of similarities.
            y: (n,) scores, for strategies that need them.

        Returns:
            (k, n) rows.
        """
        return self.fit(kernel, y).transform(np.asarray(kernel))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name.

        Args:
            deep: for scikit-learn's sake; there is nothing below.
        """
        return {name: getattr(self, name) for name in ("n_select", "strategy", "constraints", "seed")}

    def set_params(self, **parameters: Any) -> Selector:
        """Change parameters.

        Args:
            **parameters: new values by name.

        Returns:
            This object.

        Raises:
            SelectionError: a name that is none of them.
        """
        for name, value in parameters.items():
            if name not in self.get_params():
                raise SelectionError(f"a selector has no parameter {name!r}: expected {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self
