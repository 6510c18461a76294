"""Keeping picks apart: what is too similar to a pick can't be picked any more."""

from __future__ import annotations

import numpy as np

from repmatch.selectors.constraints import Constraints
from repmatch.selectors.kernels import Kernel, among_candidates
from repmatch.selectors.tracker import Tracker


class Spacing:
    """Closes, in a tracker, what is more similar to a pick than the rules allow.

    Attributes:
        limit: the largest similarity of two picks, None: any.
    """

    def __init__(self, kernel: Kernel | None, rules: Constraints, tracker: Tracker) -> None:
        """Take the rules.

        Args:
            kernel: similarities; where its rows are not the candidates it must be one of factors.
            rules: of which `apart` counts.
            tracker: what may still be picked.

        Raises:
            SelectionError: picks are to be kept apart and nothing says how similar they are.
        """
        self.limit, self.tracker = rules.apart, tracker
        self.kernel = None
        if rules.apart is not None:
            self.kernel = among_candidates(kernel if rules.apart_by is None else rules.apart_by)

    def close(self, index: int) -> None:
        """Rule out what is too similar to a pick.

        Args:
            index: the pick, or an instance given before.
        """
        if self.kernel is not None and self.limit is not None:
            self.tracker.close(self.kernel.columns(np.array([index], np.int64))[:, 0] > self.limit)
