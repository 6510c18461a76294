"""Spaces: what factors must share to be compared, and how they lie in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from repmatch.datamodels.digests import canonical_json, digest

Encoding = Literal["float32", "float16", "sign"]
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "sign")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One adapted weight matrix of the base model.

    Attributes:
        name: the module's dotted name in the base model.
        d_out: rows of ΔW, the length of a column of B.
        d_in: columns of ΔW, the length of a row of A.
    """

    name: str
    d_out: int
    d_in: int


@dataclass(frozen=True)
class Layout:
    """How the factors of one instance lie in a flat array.

    Matrix after matrix in model order; each block is (d_out, rank) in C order. With rank 1 a block is one unit vector.

    Attributes:
        matrices: the adapted matrices in order.
        rank: columns of a block.
    """

    matrices: tuple[Matrix, ...]
    rank: int

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """d_out of each matrix."""
        return tuple(m.d_out for m in self.matrices)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each matrix."""
        return tuple(m.name for m in self.matrices)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each block in the flat array, in numbers; one more entry than matrices, the last is the width."""
        out = [0]
        for d in self.dims:
            out.append(out[-1] + d * self.rank)
        return tuple(out)

    @property
    def width(self) -> int:
        """Numbers in a flat factor."""
        return self.offsets[-1]

    @cached_property
    def words(self) -> tuple[int, ...]:
        """uint64 words that the sign codes of each matrix take (rank 1): d_out bits, padded to whole words."""
        return tuple((d + 63) // 64 for d in self.dims)


@dataclass(frozen=True)
class Space:
    """Everything that decides whether two adapters can be compared.

    Attributes:
        model: how the user named the base model; not part of the identity.
        model_fingerprint: SHA-256 over weights and architecture of the base model.
        tokenizer_fingerprint: SHA-256 over the tokenizer.
        task: the task's name, such as "sequence-classification".
        template: how the fields become model input.
        max_length: tokens kept of an instance.
        rank: LoRA rank r.
        alpha: LoRA alpha; ΔW = (alpha / rank) · B·A.
        seed: seed of the head and of every A.
        matrices: the adapted matrices.
        optimizer: the instance step: name, learning rate and eps; "steps" where there are more than one, and whatever
            differs from torch's defaults.
        warm_start: id of the adapter merged into the base first, or None.
    """

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    task: str
    template: str
    max_length: int
    rank: int
    alpha: float
    seed: int
    matrices: tuple[Matrix, ...]
    optimizer: Mapping[str, Any]
    warm_start: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide comparability, as plain JSON values."""
        fields = asdict(self)
        del fields["model"]
        fields["matrices"] = [[m.name, m.d_out, m.d_in] for m in self.matrices]
        fields["optimizer"] = dict(self.optimizer)
        return fields

    @cached_property
    def id(self) -> str:
        """The hash of the identity, 32 hexadecimal digits."""
        return digest(self.identity)

    @cached_property
    def layout(self) -> Layout:
        """How factors of this space lie in a flat array."""
        return Layout(self.matrices, self.rank)

    def differences(self, other: Space) -> dict[str, tuple[Any, Any]]:
        """Return the identity fields in which two spaces differ.

        Args:
            other: the space compared with.

        Returns:
            Field name -> (value here, value there); empty when the spaces are one. `matrices` shows names only.
        """
        mine, theirs = self.identity, other.identity
        out = {k: (mine[k], theirs[k]) for k in mine if mine[k] != theirs[k]}
        if "matrices" in out:
            out["matrices"] = (list(self.layout.names), list(other.layout.names))
        return out

    def to_json(self) -> str:
        """Serialise every field, the model's name too."""
        return canonical_json({"model": self.model, **self.identity})

    @classmethod
    def from_json(cls, text: str) -> Space:
        """Rebuild a space from `to_json`.

        Args:
            text: what `to_json` returned.

        Returns:
            The space.
        """
        fields = json.loads(text)
        fields["matrices"] = tuple(Matrix(*m) for m in fields["matrices"])
        return cls(**fields)
