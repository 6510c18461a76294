"""What a model computes in: float32, tf32, bfloat16 or parts of it, and whether the factors stay what they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmatch.curator.apart import Way

if TYPE_CHECKING:
    from repmatch.curator.engine import BatchFactors, FactorEngine
    from repmatch.datamodels import Layout

logger = logging.getLogger(__name__)

Precision = Literal["float32", "tf32", "bf16", "bf16x3"]
# Fastest first.
CUDA: tuple[Precision, ...] = ("bf16", "tf32", "bf16x3")
LEAST_AGREEMENT = 0.999


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in a precision.

    Args:
        precision: "float32", "tf32" (matrix products on tensor cores, 10 bits of mantissa), "bf16" (autocast) or
            "bf16x3", which is float32 here: the engine puts `repmatch.curator.split` onto the model's linear layers.
        device: where.

    Yields:
        Nothing.
    """
    backends: Any = torch.backends
    with ExitStack() as held:
        matmul = (backends.cuda.matmul, backends.mkldnn.matmul) if _NEWER else ()
        asked = "high" if precision == "tf32" else "highest"
        held.enter_context(_set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, asked, matmul))
        if device.type == "cuda":  # where convolutions are in tf32 unless told otherwise
            cudnn = (backends.cudnn.conv, backends.cudnn.rnn) if _NEWER else ()
            read, write = partial(getattr, backends.cudnn, "allow_tf32"), _allow_tf32
            held.enter_context(_set(read, write, precision == "tf32", cudnn))
        if precision == "bf16":
            held.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        yield


# torch 2.9 brought a flag for each library; the older ones, which stand for several of these, can't be read any more
# where a program has set the newer ones otherwise, but they can be set.
_NEWER = hasattr(torch.backends.cudnn, "conv")


def _allow_tf32(value: bool) -> None:
    torch.backends.cudnn.allow_tf32 = value


@contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], None], value: Any, newer: Sequence[Any]) -> Iterator[None]:
    """Set one of torch's older flags, and put back what was there, be it by the newer flags that it stands for."""
    try:
        before, parts = read(), None
    except RuntimeError:
        before, parts = None, [(part, part.fp32_precision) for part in newer]
    write(value)
    try:
        yield
    finally:
        if parts is None:
            write(before)
        for part, kept in parts or ():
            part.fp32_precision = kept


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 are rounded to tf32 where a tensor lies.

    Args:
        device: where.

    Returns:
        True on CUDA where a program has asked for it.
    """
    if device.type != "cuda":
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer flags
        return True


def agreement(one: BatchFactors, other: BatchFactors, layout: Layout) -> NDArray[np.float64]:
    """Compare the factors of the same instances.

    Args:
        one: factors.
        other: factors in the same order.
        layout: how they lie.

    Returns:
        (n, m) share of the one's directions that lies in the other's: the squared cosine for rank 1. 1 where both are
        zero.
    """
    out = np.empty((len(one.losses), len(layout.matrices)))
    for m, d in enumerate(layout.dims):
        lo, hi = layout.offsets[m : m + 2]
        u, v = (f.values[:, lo:hi].reshape(len(out), d, layout.rank).astype(np.float64) for f in (one, other))
        inner = np.einsum("ndr,nds->nrs", u, v)
        kept = np.minimum(*((np.linalg.norm(x, axis=1) > 0.5).sum(axis=1) for x in (u, v)))
        out[:, m] = np.where(kept > 0, (inner**2).sum(axis=(1, 2)) / np.maximum(kept, 1), 1.0)
    return out


def choose(
    engine: FactorEngine, inputs: Mapping[str, Tensor], candidates: tuple[Precision, ...] | None = None
) -> tuple[Precision, dict[str, float]]:
    """Set an engine to the fastest precision whose factors agree with those of float32.

    Args:
        engine: the engine.
        inputs: a batch to try on.
        candidates: to try, fastest first; None: those of the engine's device (none but on cuda).

    Returns:
        The precision that the engine is set to, and the mean agreement of each that was tried.
    """
    if candidates is None:
        candidates = CUDA if engine.device.type == "cuda" else ()
    measured: dict[str, float] = {}
    engine.precision = "float32"
    if not candidates:
        return "float32", measured
    exact = engine.compute(inputs)
    if engine.way is Way.APART:  # which nothing computes in bfloat16
        candidates = tuple(candidate for candidate in candidates if candidate == "tf32")
    for candidate in candidates:
        engine.precision = candidate
        try:
            rough = engine.compute(inputs)
        except (RuntimeError, TypeError) as error:  # an older device or torch, or no room for a second set of weights
            logger.info("%s: not to be had here (%s)", candidate, str(error).partition("\n")[0][:200])
            continue
        found = agreement(exact, rough, engine.layout)
        measured[candidate] = float(np.nan_to_num(found, nan=0.0).mean())
        if measured[candidate] >= LEAST_AGREEMENT:
            return candidate, measured
        logger.info(
            "%s: squared cosine with float32 %.5f, below %s; not used", candidate, measured[candidate], LEAST_AGREEMENT
        )
    engine.precision = "float32"
    return "float32", measured


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU.

    Args:
        error: any error.

    Returns:
        True or False.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # The last is how CUDA's libraries say it, of their own workspace.
    signs = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def halving(
    compute: Callable[[list[int]], BatchFactors], positions: list[int], free: Callable[[], None]
) -> list[tuple[list[int], BatchFactors]]:
    """Compute a batch; where memory runs out, compute its halves.

    Args:
        compute: maps positions to their factors.
        positions: of the batch.
        free: called before a second try.

    Returns:
        Positions and factors of each part, in order.

    Raises:
        RuntimeError: one instance alone does not fit.
    """
    try:
        return [(positions, compute(positions))]
    except (RuntimeError, MemoryError) as error:
        if len(positions) == 1 or not is_out_of_memory(error):
            raise
    # Outside of the handler, so that the failed try's tensors are not held by the traceback.
    free()
    middle = len(positions) // 2
    logger.info("out of memory with %d instances; trying %d", len(positions), middle)
    return halving(compute, positions[:middle], free) + halving(compute, positions[middle:], free)
