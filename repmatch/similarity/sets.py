"""Factors of many instances: against an adapter, against each other, against the mean of a set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import BLOCK_BYTES, dense_block, row_blocks, same_space, second_moment, take
from repmatch.compiled import in_chunks
from repmatch.datamodels import Factors
from repmatch.errors import UsageError
from repmatch.similarity.pairs import Blocks, Floats, as_frame, best

_CAST_ROWS = 1024  # rows of one matrix that are float32 at a time in `mean_scores`
_FEW = 4  # queries that are not worth BLAS


def score_against(factors: Factors, u: Blocks) -> NDArray[np.float32]:
    """Score every instance against one adapter, per matrix: the maximum of φ(i, j) over all i, j.

    Args:
        factors: n instances.
        u: m arrays (d_out, r) with orthonormal columns in order of falling singular value; any rank.

    Returns:
        (n, m) float32 in [0, 1]; 0 where a factor is zero. Average over axis 1 for the RepMatch score.

    Raises:
        UsageError: another number of matrices, another d_out, or columns that are not orthonormal.
    """
    return _scores(factors, u).astype(np.float32)


def _scores(factors: Factors, u: Blocks, *, exact: bool = False) -> Floats:
    dims = factors.layout.dims
    if len(u) != len(dims):
        raise UsageError(f"the adapter has {len(u)} matrices, the instances {len(dims)}: expected the same")
    frames = [as_frame(block, f"u[{m}]") for m, block in enumerate(u)]
    out = np.zeros((len(factors), len(dims)), np.float64 if exact else np.float32)
    for m, frame in enumerate(frames):
        if len(frame) != dims[m]:
            raise UsageError(f"matrix {factors.matrices[m]!r} has d_out {dims[m]} here, {len(frame)} in the adapter")
        for lo, hi, overlap in _overlaps(factors, m, frame, exact=exact):
            out[lo:hi, m] = best(np.square(overlap))
    out[factors.norms == 0] = 0.0
    return out


def signed_against(factors: Factors, directions: Blocks) -> NDArray[np.float32]:
    """Return the cosine of every instance's ΔW with one direction, per matrix: negative where they pull apart.

    Args:
        factors: n instances.
        directions: m arrays. Rank 1: (d_out,) or (d_out, 1), of any length. Rank r > 1: (d_out, r), ΔW·Q of the other
            adapter with Q the space's orthonormal basis of the rows of A (for an instance: values · core).

    Returns:
        (n, m) float32 in [−1, 1]; 0 where a factor or a direction is zero.

    Raises:
        UsageError: shapes that don't fit, or rank above 1 without cores.
    """
    return _cosines(factors, directions).astype(np.float32)


def _cosines(factors: Factors, directions: Blocks, *, exact: bool = False) -> Floats:
    layout = factors.layout
    if len(directions) != len(layout.dims):
        raise UsageError(f"got {len(directions)} directions for {len(layout.dims)} matrices: expected one each")
    if layout.rank > 1 and factors.cores is None:
        raise UsageError(f"signed similarity at rank {layout.rank} needs cores, and these factors have none")
    out = np.zeros((len(factors), len(layout.dims)), np.float64 if exact else np.float32)
    for m, block in enumerate(directions):
        direction = np.asarray(block, np.float64).reshape(len(block), -1)
        if direction.shape != (layout.dims[m], layout.rank):
            raise UsageError(f"direction {m} has shape {direction.shape}: expected {(layout.dims[m], layout.rank)}")
        length = float(np.linalg.norm(direction))
        if length == 0.0:
            continue
        for lo, hi, overlap in _overlaps(factors, m, direction / length, exact=exact):
            if factors.cores is None:
                cosine = overlap[:, 0, 0]
            else:  # ⟨V·C, D⟩ / ‖C‖ = ⟨C, VᵀD⟩ / ‖C‖, for the columns of V are orthonormal
                core = np.asarray(factors.cores[lo:hi, m], np.float64)
                size = np.linalg.norm(core, axis=(1, 2))
                cosine = (core * overlap).sum(axis=(1, 2)) / np.where(size > 0, size, 1.0)
            out[lo:hi, m] = np.clip(cosine, -1.0, 1.0)
    out[factors.norms == 0] = 0.0
    return out


def kernel_block(a: Factors, b: Factors) -> NDArray[np.float32]:
    """Return the RepMatch kernel of all pairs: the mean over matrices of tr(P₁P₂)/√(r₁r₂), positive semi-definite.

    P projects on the columns of U and r₁, r₂ are the columns that are not zero: at full rank this is φ(r, r), and a
    factor of lower rank (the last layer's query often has rank 1) still has kernel 1 with itself.

    Args:
        a: na instances.
        b: nb instances of the same space.

    Returns:
        (na, nb) float32 in [0, 1]; 0 with a zero factor. At rank 1 this is the RepMatch score itself.

    Raises:
        SpaceMismatchError: the two are of different spaces.
    """
    same_space(a, b)
    if a.bits is not None and b.bits is not None:
        from repmatch import signcodes

        return signcodes.kernel((a.bits, a.norms), (b.bits, b.norms), a.layout.words, a.layout.dims)
    r, count = a.layout.rank, len(a.layout.dims)
    out = np.empty((len(a), len(b)), np.float32)
    step = max(64, BLOCK_BYTES // (16 * r * r * max(1, len(b))))
    for m, d in enumerate(a.layout.dims):
        theirs = _at_full_rank(dense_block(b, m, 0, len(b)))
        other = theirs[:, :, 0].T if r == 1 else np.ascontiguousarray(theirs.transpose(1, 0, 2)).reshape(d, -1)
        for lo in range(0, len(a), step):
            hi = min(len(a), lo + step)
            mine = _at_full_rank(dense_block(a, m, lo, hi))
            overlap = (mine[:, :, 0] if r == 1 else mine.transpose(0, 2, 1).reshape(-1, d)) @ other
            np.square(overlap, out=overlap)
            if r > 1:
                overlap = overlap.reshape(hi - lo, r, len(b), r).sum(axis=(1, 3))
            if m == 0:
                out[lo:hi] = overlap
            else:
                out[lo:hi] += overlap
    if r * count > 1:
        out /= np.float32(r * count)
    return np.minimum(out, np.float32(1.0), out=out)


def _at_full_rank(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale (n, d, r) columns so that tr(P₁P₂)/r becomes tr(P₁P₂)/√(r₁r₂) for blocks with zero columns."""
    if block.shape[2] == 1:
        return block
    scaled: NDArray[np.float32] = block * np.sqrt(_missing_rank(block))[:, None, None]
    return scaled


def _missing_rank(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return √(r / columns that are not zero) of each of (n, d, r); 1 for a zero factor, which stays zero."""
    columns = block.any(axis=1).sum(axis=1)
    missing: NDArray[np.float32] = np.sqrt(block.shape[2] / np.maximum(columns, 1)).astype(np.float32)
    return missing


def mean_similarity(factors: Factors, to: Factors) -> NDArray[np.float32]:
    """Return each instance's mean kernel value with a whole set, exact, through the set's mean projectors.

    mean_j tr(P P_j)/√(r r_j) = tr(Uᵀ P̄ U)/√r with P̄ the mean of U_j U_jᵀ/√r_j, one (d, d) matrix for each adapted
    matrix: the cost does not grow with the product of the two sizes.

    Args:
        factors: n instances.
        to: the set, of the same space, not empty.

    Returns:
        (n,) float32 in [0, 1], mean over matrices.
    """
    same_space(factors, to)
    return similarity_to(factors, mean_projectors([to]))


def mean_projectors(parts: Iterable[Factors]) -> list[NDArray[np.float32]]:
    """Return the mean projectors P̄ of a set that comes in parts, for `similarity_to`.

    Args:
        parts: the set's factors, all of one space.

    Returns:
        m arrays (d_out, d_out) float32.

    Raises:
        UsageError: the set is empty.
    """
    sums: list[NDArray[np.float64]] = []
    count = 0
    for part in parts:
        count += len(part)
        for m in range(len(part.layout.dims)):
            weights = np.ones(len(part), np.float32)
            if part.layout.rank > 1:
                weights = np.concatenate(
                    [np.empty(0, np.float32)]
                    + [_missing_rank(dense_block(part, m, lo, hi)) for lo, hi in row_blocks(part, m)]
                )
            moment = second_moment(part, m, weights)
            if m == len(sums):
                sums.append(moment)
            else:
                sums[m] += moment
    if count == 0:
        raise UsageError("the mean similarity to an empty set is not defined: expected at least one instance")
    return [(total / count).astype(np.float32) for total in sums]


def similarity_to(factors: Factors, projectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return each instance's mean kernel value with the set that mean projectors were made of.

    Args:
        factors: n instances.
        projectors: from `mean_projectors`, of the same space.

    Returns:
        (n,) float32 in [0, 1], mean over matrices.
    """
    total = np.zeros(len(factors))
    for m, moment in enumerate(projectors):
        for lo, hi in row_blocks(factors, m):
            block = _at_full_rank(dense_block(factors, m, lo, hi))
            image = np.matmul(moment, block) if block.shape[2] > 1 else (block[:, :, 0] @ moment)[:, :, None]
            total[lo:hi] += np.einsum("ndr,ndr->n", image, block)
    total /= len(factors.layout.dims) * factors.layout.rank
    return np.clip(total, 0.0, 1.0).astype(np.float32)


def directions_of(factors: Factors, row: int) -> list[NDArray[np.float64]]:
    """Return one instance's ΔW per matrix, up to scale, in the space's basis of the rows of A.

    Args:
        factors: n instances.
        row: its position.

    Returns:
        m arrays (d_out, r): the unit vector at rank 1, values · core above.
    """
    out = []
    for m in range(len(factors.layout.dims)):
        block = dense_block(factors, m, row, row + 1)[0].astype(np.float64)
        out.append(block if factors.cores is None else block @ factors.cores[row, m])
    return out


def score_instance(factors: Factors, query: Factors, *, signed: bool = False) -> NDArray[np.float32]:
    """Score every instance against one other instance, per matrix.

    Args:
        factors: n instances.
        query: one instance of the same space.
        signed: the cosine of the two ΔW in place of the RepMatch score.

    Returns:
        (n, m) float32; 0 where either factor is zero.
    """
    return against(query, factors, signed=signed).astype(np.float32)


def against(query: Factors | Blocks, factors: Factors, *, signed: bool, exact: bool = False) -> Floats:
    """Score instances against an adapter or one instance, per matrix.

    Args:
        query: one instance of the same space, or an adapter as `score_against` (signed: as `signed_against`) takes it.
        factors: n instances.
        signed: the cosine of the two ΔW in place of the RepMatch score.
        exact: in float64, each row on its own, so that equal rows get equal scores wherever they stand.

    Returns:
        (n, m) float32, or float64 where exact; 0 where either factor is zero.
    """
    if not isinstance(query, Factors):
        return _cosines(factors, query, exact=exact) if signed else _scores(factors, query, exact=exact)
    same_space(factors, query)
    if len(query) != 1:
        raise UsageError(f"the query holds {len(query)} instances: expected exactly one")
    out: Floats
    if factors.bits is not None and query.bits is not None:
        from repmatch import signcodes

        out = signcodes.cosines(query.bits[0], factors.bits, factors.layout.words, factors.layout.dims)
        out[factors.norms == 0] = 0.0
        out = out if signed else np.square(out)
    elif signed:
        out = _cosines(factors, directions_of(query, 0), exact=exact)
    else:
        frames = [dense_block(query, m, 0, 1)[0] for m in range(len(factors.layout.dims))]
        out = _scores(factors, frames, exact=exact)
    out[:, query.norms[0] == 0] = 0.0
    return out


def mean_scores(queries: Factors, factors: Factors, *, signed: bool = False) -> NDArray[np.float32]:
    """Return the scores of all pairs of queries and instances, mean over the matrices.

    Args:
        queries: q instances.
        factors: n instances of the same space.
        signed: the cosine of the two ΔW in place of the RepMatch score.

    Returns:
        (q, n) float32. Sign codes: exact, equal codes give equal numbers. Floats: float32 matrix products, right to
        about 1e-6.

    Raises:
        SpaceMismatchError: the two are of different spaces.
    """
    same_space(queries, factors)
    layout = factors.layout
    if queries.bits is not None and factors.bits is not None:
        from repmatch import signcodes

        left, right = (queries.bits, queries.norms), (factors.bits, factors.norms)
        return signcodes.kernel(left, right, layout.words, layout.dims, signed=signed)
    out = np.zeros((len(queries), len(factors)), np.float32)
    if layout.rank > 1 or factors.bits is not None:
        for row in range(len(queries)):
            out[row] = against(take(queries, slice(row, row + 1)), factors, signed=signed).mean(axis=1)
        return out
    directions = [dense_block(queries, m, 0, len(queries))[:, :, 0] for m in range(len(layout.dims))]
    if signed:
        lengths = [np.linalg.norm(block, axis=1, keepdims=True).astype(np.float32) for block in directions]
        directions = [
            np.asarray(b / np.where(n > 0, n, np.float32(1.0)), np.float32)
            for b, n in zip(directions, lengths, strict=True)
        ]

    def rows(start: int, stop: int, few: bool) -> None:
        for lo in range(start, stop, _CAST_ROWS):
            hi = min(stop, lo + _CAST_ROWS)
            for m, block in enumerate(directions):
                overlap = _products(block, dense_block(factors, m, lo, hi)[:, :, 0], few)
                if not signed:
                    np.square(overlap, out=overlap)
                out[:, lo:hi] += np.clip(overlap, -1.0, 1.0, out=overlap)

    if len(queries) <= _FEW:  # casting takes longer than the products: a thread for each range of rows
        in_chunks(lambda start, stop: rows(start, stop, True), len(factors), least=_CAST_ROWS)
    else:
        rows(0, len(factors), False)
    out /= np.float32(len(layout.dims))
    return out


def _products(queries: NDArray[np.float32], rows: NDArray[np.float32], few: bool) -> NDArray[np.float32]:
    if not few:
        return queries @ rows.T
    from repmatch.products import row_products

    out = np.empty((len(queries), len(rows)), np.float32)
    for query, line in zip(queries, out, strict=True):
        row_products(rows, np.ascontiguousarray(query), line)
    return out


def _overlaps(factors: Factors, m: int, frame: Floats, *, exact: bool) -> Iterator[tuple[int, int, Floats]]:
    """Yield (lo, hi, (hi − lo, r, c) products of the instances' columns with those of one frame)."""
    if factors.bits is not None:
        from repmatch import signcodes

        start = sum(factors.layout.words[:m])
        columns = [signcodes.dots(factors.bits, start, frame[:, c]) for c in range(frame.shape[1])]
        yield 0, len(factors), np.stack(columns, axis=1)[:, None, :]
        return
    narrow = frame.astype(np.float32)
    for lo, hi in row_blocks(factors, m):
        block = dense_block(factors, m, lo, hi)
        if exact:  # each row on its own, so that equal rows give equal numbers wherever they stand
            yield lo, hi, np.einsum("ndr,dc->nrc", block.astype(np.float64), frame)
        elif block.shape[2] == 1:
            yield lo, hi, (block[:, :, 0] @ narrow)[:, None, :]
        else:
            yield lo, hi, np.matmul(block.transpose(0, 2, 1), narrow)
