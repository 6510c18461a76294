"""What is tried on the first rows of an ingest: whether the factors that a batch gives are those of its instances."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from repmatch.curator.apart import different
from repmatch.curator.precision import is_out_of_memory
from repmatch.errors import ModelError, RepMatchError, quote_list

if TYPE_CHECKING:
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.datamodels import Space

logger = logging.getLogger(__name__)

# Gradients of a batch, and its losses.
Computed: TypeAlias = "tuple[dict[str, Tensor], Tensor]"


def check(engine: FactorEngine, task: Task, examples: Sequence[Example]) -> None:
    """Check that every adapted layer is run, and that a batch gives each instance the gradient that it has alone.

    Two instances of unlike length are computed, together and alone, so that it costs little with large models.

    Args:
        engine: the factor engine.
        task: collates.
        examples: the first rows, one or more.

    Raises:
        ModelError: a layer is not run, or instances see each other.
    """
    pair = unlike(examples)
    alone = [_alone(engine, task, example) for example in pair]
    _check_reached(engine, task, examples)
    if len(pair) > 1:
        _check_apart(engine, task, pair, alone)
    _warn_of_zeros(engine, task, examples, [gradients for gradients, _ in alone])


def _alone(engine: FactorEngine, task: Task, example: Example) -> Computed:
    try:
        return engine.gradients(task.collate([example]))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, RepMatchError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"the model cannot be run on a row of {example.tokens} tokens alone ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0][:300]}). Name another with --model."
        ) from error


def unlike(examples: Sequence[Example]) -> list[Example]:
    """Choose two instances that a batch would show to be mixed, if it mixes them.

    Args:
        examples: one or more.

    Returns:
        The shortest and the middle one, or the longest where these are alike; one where there are no two.
    """
    ordered = sorted(examples, key=lambda example: example.tokens)
    middle = ordered[len(ordered) // 2]
    return [ordered[0], middle if middle.tokens > ordered[0].tokens else ordered[-1]][: len(ordered)]


def tried(module: nn.Module, space: Space, task: Task, examples: Sequence[Example]) -> FactorEngine:
    """Find out how a model takes rows side by side.

    Args:
        module: the frozen model.
        space: the space.
        task: collates, and gives losses.
        examples: one or more.

    Returns:
        An engine that has found its way.
    """
    from repmatch.curator.engine import FactorEngine

    engine = FactorEngine(module, space, task.losses, str(next(module.parameters()).device))
    engine.find_way(task.collate(unlike(examples)))
    return engine


def _check_reached(engine: FactorEngine, task: Task, examples: Sequence[Example]) -> None:
    if _not_reached(engine):
        # Two rows may not be enough for a module that runs a layer for some rows only.
        engine.gradients(task.collate(list(examples)))
    lost = _not_reached(engine)
    if lost:
        raise ModelError(
            f"the model does not call {quote_list(lost, 5)}, so that there is nothing to adapt; expected layers that "
            "are called as modules. (Attention of torch.nn, for one, reads the weight of its out_proj past the layer.) "
            "Name others with --targets."
        )


def _not_reached(engine: FactorEngine) -> list[str]:
    return [m.name for m in engine.space.matrices if m.name not in engine.reached]


def _warn_of_zeros(
    engine: FactorEngine, task: Task, examples: Sequence[Example], alone: Sequence[dict[str, Tensor]]
) -> None:
    lost = [m.name for m in engine.space.matrices if not any(bool(found[m.name].any()) for found in alone)]
    if lost and len(examples) > len(alone):
        every = engine.gradients(task.collate(list(examples)))[0]
        lost = [name for name in lost if not bool(every[name].any())]
    if lost:
        logger.warning(
            "the gradient of %s is zero for each of the first %d rows: its factors are zero and say nothing",
            quote_list(lost, 5),
            len(examples),
        )


def _check_apart(engine: FactorEngine, task: Task, pair: Sequence[Example], alone: Sequence[Computed]) -> None:
    gradients, losses = engine.gradients(task.collate(pair))
    for at, (found, loss) in enumerate(alone):
        other = different(found, gradients, at, rough=engine.is_rough)
        if other is None:
            continue
        raise ModelError(
            f"the gradient of {other[0]!r} for one instance is another in a batch of two (relative difference "
            f"{other[1]:.2g}; loss {float(loss[0]):.4g} alone, {float(losses[at]):.4g} in company); expected "
            "instances that do not see each other. Mask the padding, and use no batch statistics; of a model that is "
            "not your own adapt other layers with --targets, or name another with --model."
        )
