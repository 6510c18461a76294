"""What the user asks of a space and of the machine, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from repmatch.errors import UsageError

if TYPE_CHECKING:
    from repmatch.datamodels import Space

DEFAULT_RANK = 1
DEFAULT_ALPHA = 4.0
DEFAULT_MAX_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """Settings of a space and of where to compute; None: a stored space's own value, or the default for a new space.

    Attributes:
        model: folder, hub name or "embedded", which is the default.
        rank: LoRA rank, 1 to 64; default 1.
        alpha: LoRA alpha; default 4.
        targets: endings of module names or regular expressions; default: the architecture's query and value matrices.
        max_length: tokens kept of an instance; default 256, or fewer where the model reads fewer.
        seed: of the head and of every A; default 0.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        batch_tokens: padded tokens a batch may hold; None: the measured default of the device.
    """

    model: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    max_length: int | None = None
    seed: int | None = None
    device: str = "auto"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.rank is not None and not 1 <= self.rank <= 64:
            raise UsageError(f"--rank {self.rank} is out of range; expected 1 to 64 (the paper uses 1).")
        if self.batch_tokens is not None and self.batch_tokens < 16:
            raise UsageError(f"--batch-tokens {self.batch_tokens} is too small; expected 16 or more.")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError(f"alpha {self.alpha} is out of range; expected a positive number.")

    @property
    def asks_nothing(self) -> bool:
        """Whether every field that decides the space was left to its default."""
        return all(
            value is None for value in (self.model, self.rank, self.alpha, self.targets, self.max_length, self.seed)
        )

    def like(self, space: Space) -> Settings:
        """Fill in what was not asked for from a stored space.

        Args:
            space: the stored space.

        Returns:
            Settings that make that space again, but for what was asked.
        """
        return replace(
            self,
            model=space.model if self.model is None else self.model,
            rank=space.rank if self.rank is None else self.rank,
            alpha=space.alpha if self.alpha is None else self.alpha,
            targets=space.layout.names if self.targets is None else self.targets,
            max_length=space.max_length if self.max_length is None else self.max_length,
            seed=space.seed if self.seed is None else self.seed,
        )
