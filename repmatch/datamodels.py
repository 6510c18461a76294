"""The words of repmatch as frozen dataclasses: spaces, rows, factors, adapters, coresets.

Nothing here computes anything that needs torch or the store; arrays are numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Encoding = Literal["float32", "float16", "sign"]
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "sign")


def canonical_json(value: Any) -> str:
    """Serialise to the one JSON text that equal values share (sorted keys, no spaces, no NaN).

    Args:
        value: anything JSON can hold.

    Returns:
        The text, UTF-8 encodable.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, size: int = 16) -> str:
    """Hash the canonical JSON of a value with BLAKE2b.

    Args:
        value: anything JSON can hold.
        size: bytes of the digest.

    Returns:
        `2 * size` hexadecimal digits.
    """
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=size).hexdigest()


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


@dataclass(frozen=True, slots=True)
class Row:
    """One input row that passed every check.

    Attributes:
        id: the user's id, as text.
        json: the row as it came, one JSON object (the very bytes of the line for JSONL).
        text: first text field; the prompt of a completion, the conversation before its last message, the path of an
            image.
        text_pair: second text field or None; the completion, or the last message.
        label: the label as text; "" where the task needs none and the row has none.
        row_hash: digest of the canonical row.
        task_hash: digest of what the task reads (text, text_pair, label): the factors depend on nothing else.
        source: file the row came from.
        line: line (JSONL, CSV) or row number (Parquet, hub) in it, from 1.
    """

    id: str
    json: str
    text: str
    text_pair: str | None
    label: str
    row_hash: str
    task_hash: str
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """One input row that was set aside (quarantined), and why.

    Attributes:
        source: file the row came from.
        line: line or row number in it, from 1.
        id: the user's id where it could be read.
        reason: what is wrong, the value, what was expected and the remedy.
    """

    source: str
    line: int
    id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Which columns of a row are read.

    Attributes:
        id_field: column with the user's id; None: the id is the digest of the row.
        text_field: column with the text.
        text_pair_field: column with the second text; None: single texts.
        label_field: column with the label.
        form: what the columns hold, see `repmatch.curator.forms`.
    """

    id_field: str | None
    text_field: str
    text_pair_field: str | None
    label_field: str
    form: str = "classes"


@dataclass(frozen=True)
class Dataset:
    """A named set of instances.

    Attributes:
        name: the user's name for it.
        fields: the columns that are read.
        labels: every label, sorted; a label's index decides its row of the head. Fixed at the first ingest.
        columns: column name -> "string", "number", "boolean" or "json", from the rows seen.
        space_id: the space of its instance factors, None before the first.
        encoding: how its factors are kept.
    """

    name: str
    fields: Fields
    labels: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    space_id: str | None = None
    encoding: Encoding = "float16"


@dataclass(frozen=True)
class FactorBatch:
    """Instance factors of a few rows, as the engine makes them.

    Attributes:
        rows: the rows, n of them.
        values: (n, layout.width) float32; per matrix the left singular vectors of ΔW as unit columns in order of
            falling singular value, signs as in ΔW (rank 1: B / |B|). A zero gradient gives zeros.
        cores: (n, m, r, r) float32 with ΔW = (values · core) · Qᵀ up to one scale, where Q is the space's orthonormal
            basis of the rows of A; None for rank 1.
        norms: (n, m) float32, norm of ∂L/∂B per matrix; 0 marks a zero factor.
        losses: (n,) float32, loss of each instance at the shared start.
        tokens: (n,) int32, tokens read.
        truncated: (n,) bool, whether the text was longer than max_length.
    """

    rows: tuple[Row, ...]
    values: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    norms: NDArray[np.float32]
    losses: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]


@dataclass(frozen=True)
class Factors:
    """Stored instance factors of a dataset, in the dataset's order.

    Attributes:
        ids: the user's ids, n of them.
        layout: matrices and rank.
        encoding: how they are kept.
        flat: (n, layout.width) float32 or float16, maybe a read-only view of the store's file; None for sign codes.
        bits: (n, sum(layout.words)) uint64 sign codes, bit j of word w is 1 where number 64·w + j is negative, padding
            bits 0; None for floats.
        norms: (n, m) float32, norm of the gradient per matrix; 0 marks a zero factor (its sign code means nothing).
        cores: (n, m, r, r) float32 or None (rank 1).
        space_id: the space they belong to.
        embeddings: (n, d) floats, unit rows that a kernel may join with the factors; None where nobody asked for them.
    """

    ids: tuple[str, ...]
    layout: Layout
    encoding: Encoding
    flat: NDArray[np.floating[Any]] | None
    bits: NDArray[np.uint64] | None
    norms: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    space_id: str
    embeddings: NDArray[np.floating[Any]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the adapted matrices."""
        return self.layout.names

    @property
    def values(self) -> NDArray[np.floating[Any]]:
        """(n, m, d) or (n, m, d, r) unit columns; only where every matrix has the same d_out and floats are kept.

        Raises:
            ValueError: sign codes are kept, or the matrices' d_out differ (use `matrix(i)` then).
        """
        if self.flat is None:
            raise ValueError("this dataset keeps sign codes; use .codes, or ingest with --encoding float16 for values")
        dims = set(self.layout.dims)
        if len(dims) != 1:
            raise ValueError(f"matrices have different d_out {sorted(dims)}; use .matrix(i) for each")
        shape = (len(self.ids), len(self.layout.dims), dims.pop())
        return self.flat.reshape(shape if self.layout.rank == 1 else (*shape, self.layout.rank))

    @property
    def codes(self) -> NDArray[np.uint64]:
        """(n, m, words) uint64 sign codes, where every matrix takes the same number of words.

        Raises:
            ValueError: floats are kept, or the matrices' words differ (use `.bits` and `.layout.words` then).
        """
        if self.bits is None:
            raise ValueError(f"this dataset keeps {self.encoding} values; use .values")
        words = set(self.layout.words)
        if len(words) != 1:
            raise ValueError(f"matrices take different words {sorted(words)}; use .bits and .layout.words")
        return self.bits.reshape(len(self.ids), len(self.layout.dims), words.pop())

    def matrix(self, index: int) -> NDArray[np.floating[Any]]:
        """Return the factors of one matrix.

        Args:
            index: position in `matrices`.

        Returns:
            (n, d_out, r) floats.
        """
        if self.flat is None:
            raise ValueError("this dataset keeps sign codes; use .codes")
        lo, hi = self.layout.offsets[index : index + 2]
        return self.flat[:, lo:hi].reshape(len(self.ids), self.layout.dims[index], self.layout.rank)


@dataclass(frozen=True)
class Adapter:
    """A subset adapter: LoRA factors learned from a subset.

    Attributes:
        id: digest of space, members and training recipe.
        space_id: the space it was trained in.
        subset: how the user named the subset.
        members: digest over the ids and task hashes it was trained on, in order.
        recipe: optimiser, learning rate, epochs, batch size, seed.
        record: steps, losses, accuracy, seconds: what happened.
        a: matrix name -> (r, d_in) float32.
        b: matrix name -> (d_out, r) float32.
        full: parameter name -> float32, what was trained in full beside the factors: the head of a warm start.
    """

    id: str
    space_id: str
    subset: str
    members: str
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    a: Mapping[str, NDArray[np.float32]]
    b: Mapping[str, NDArray[np.float32]]
    full: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Coreset:
    """An ordered selection from a dataset.

    Attributes:
        name: its name in the store.
        dataset: the dataset's name.
        strategy: how it was chosen.
        arguments: everything that repeats it: k, balance or stratify field, seed, algorithm, versions.
        ids: picked ids in pick order, k of them.
        gains: (k,) float64, what each pick added to the objective.
        all_ids: ids of the whole dataset, n of them.
        representative: (n,) int64, for each of `all_ids` the position in `ids` of its pick; -1: none.
        similarity: (n,) float32, score of each of `all_ids` with its representative.
    """

    name: str
    dataset: str
    strategy: str
    arguments: Mapping[str, Any]
    ids: tuple[str, ...]
    gains: NDArray[np.float64]
    all_ids: tuple[str, ...]
    representative: NDArray[np.int64]
    similarity: NDArray[np.float32]
