"""Warm start: a short training of head and adapters on a few random instances, merged into the base model.

With a random head an instance's gradient depends on its label and the head's random rows first of all. A start that has
seen a little of the task makes the gradients speak of the text. Once the trained factors are merged into the base, B is
zero again and the first step keeps its closed form. The trained values are part of the space's identity.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmatch.curator import layers, start
from repmatch.curator.settings import START_SIZE
from repmatch.curator.stack import AdapterStack
from repmatch.curator.windows import encoded
from repmatch.datamodels import Adapter, BadRow, Row, digest
from repmatch.errors import InputError, ModelError, StoreError, UsageError

if TYPE_CHECKING:
    from repmatch.curator.tasks import Example
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Store

logger = logging.getLogger(__name__)

RANK = 8
ALPHA = 16.0
RATE = 3e-3
# Rate times steps, at most: AdamW moves every weight by about its rate a step, and a start that has moved far knows its
# own rows by heart, wrong labels among them.
DISTANCE = 0.2
PASSES = 5
BATCH = 16
STEPS = (10, 200)
# "auto": datasets of at least so many instances are started on so many of them at most (docs/findings.md).
AUTO_FROM = 1000
AUTO_MOST = 640
# Tasks whose head is drawn at random, so that it has to be trained before its gradients mean much.
_HEADED = frozenset(["sequence-classification", "text-regression", "image-classification"])


def default_size(bench: Workbench, total: int) -> int | None:
    """Return how many instances `--warm-start auto` trains the start on.

    A start that has read most of a small dataset knows its rows by heart, so a third of the rows is the most.

    Args:
        bench: the cold workbench.
        total: instances of the dataset.

    Returns:
        The number; None for a cold start: fewer than 1,000 instances, no random head to train, or quantised layers.
    """
    space = bench.space
    if total < AUTO_FROM or space.task not in _HEADED or space.model.startswith("own:"):
        return None
    module = bench.module(2)
    if not all(layers.can_be_added_to(module.get_submodule(m.name)) for m in space.matrices):
        return None
    return min(AUTO_MOST, total // 3)


def sample_size(asked: str, total: int) -> int | None:
    """Read how many instances a warm start is trained on.

    Args:
        asked: "160" or "5%".
        total: instances there are.

    Returns:
        The number, at most `total`; None where `asked` is neither a number nor a share.

    Raises:
        UsageError: the number or share is out of range.
    """
    match = START_SIZE.fullmatch(asked)
    if match is None:
        return None
    value = float(match[1])
    share = bool(match[2])
    if (share and not 0 < value <= 100) or (not share and (value < 2 or value != int(value))):
        raise UsageError(
            f"--warm-start {asked!r} is out of range; expected a number of instances from 2 on, a share such as 5%, "
            "the name of a dataset that was warm-started, or none."
        )
    return min(total, max(2, math.ceil(value / 100 * total)) if share else int(value))


def size_of(bench: Workbench, asked: str | None, total: int) -> int | None:
    """Return on how many instances a start that was asked for is trained.

    Args:
        bench: the cold workbench.
        asked: see `Settings.warm_start`.
        total: instances of the dataset.

    Returns:
        The number; None where nothing is trained: a cold start, or that of another dataset.

    Raises:
        UsageError: the number or share is out of range.
    """
    if asked in (None, "none"):
        return None
    return default_size(bench, total) if asked == "auto" else sample_size(str(asked), total)


def steps_for(count: int) -> int:
    """Return how many optimiser steps a start on so many instances takes: five passes, within 10 to 200 steps."""
    return min(max(STEPS[0], math.ceil(PASSES * count / BATCH)), STEPS[1])


def sample(chunks: Iterable[Sequence[Row]], count: int, seed: int) -> list[Row]:
    """Draw rows at random, whatever their order.

    Args:
        chunks: rows.
        count: how many.
        seed: of the draw.

    Returns:
        The rows whose digests with the seed are smallest, in that order.
    """

    def key(row: Row) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}\0{row.task_hash}\0{row.id}".encode(), digest_size=16).digest(), row.id

    return heapq.nsmallest(count, (row for chunk in chunks for row in chunk), key=key)


def train(
    bench: Workbench,
    labels: Sequence[str],
    rows: Sequence[Row],
    *,
    asked: str = "",
    task: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """Train a warm start: fresh adapters of rank 8, and the head where it was drawn at random.

    Rows that the task refuses, and rows without a finite loss or gradient, are left out.

    Args:
        bench: the cold workbench.
        labels: the dataset's labels.
        rows: what to train on.
        asked: how the user asked for it.
        task: the task, where it is at hand; None: made of the labels.
        progress: called with (steps done, steps in all).

    Returns:
        The adapter: its factors, and the head's parameters under `full`.

    Raises:
        InputError: no row can be used.
        ModelError: a loss is not finite, though that of every row is at the beginning.
    """
    task = task or bench.task(labels)
    made = encoded(task, rows)
    bad = [found for found in made if isinstance(found, BadRow)]
    good = [(row, found) for row, found in zip(rows, made, strict=True) if not isinstance(found, BadRow)]
    try:
        _refuse_none(good, bad)
        return _trained(bench, labels, good, asked, task, progress)
    except _DivergedError:  # of what is left out nobody knows before a loss says so: looking first would cost a pass
        found, more = _finite(bench, labels, task, good)
        if not more:
            raise
        bad += more
        good = found
    _refuse_none(good, bad)
    return _trained(bench, labels, good, asked, task, progress)


class _DivergedError(ModelError):
    """A loss that is not finite."""


def _refuse_none(good: Sequence[object], bad: Sequence[BadRow]) -> None:
    if not bad:
        return
    listed = f"{bad[0].source}:{bad[0].line}: {bad[0].reason}"
    if not good:
        raise InputError(f"none of the {len(bad)} rows drawn for the warm start can be used: {listed}.")
    logger.warning("%d rows are left out of the warm start, the first %s", len(bad), listed)


def _finite(
    bench: Workbench, labels: Sequence[str], task: Any, good: Sequence[tuple[Row, Example]]
) -> tuple[list[tuple[Row, Example]], list[BadRow]]:
    """Tell rows with a finite loss and gradient at the cold start from the others, just as an ingest does."""
    from repmatch.curator.batches import factors_of

    rows, examples = [row for row, _ in good], [example for _, example in good]
    _, bad = factors_of(bench.engine(labels, task), task, rows, examples, bench.batch_tokens)
    out = {row.id for row in bad}
    return [(row, example) for row, example in good if row.id not in out], bad


def _trained(
    bench: Workbench,
    labels: Sequence[str],
    good: Sequence[tuple[Row, Example]],
    asked: str,
    task: Any,
    progress: Callable[[int, int], None] | None,
) -> Adapter:
    from repmatch.curator.training import Recipe, batches

    rows, examples = [row for row, _ in good], [example for _, example in good]
    steps = steps_for(len(rows))
    epochs = math.ceil(steps / math.ceil(len(rows) / BATCH))
    rate = min(RATE, DISTANCE / steps)
    recipe = Recipe(rate, 0.01, epochs, BATCH, steps, bench.space.seed)
    space = replace(bench.space, rank=RANK, alpha=ALPHA)
    seed = int(start.generator(space.seed, "warm-start").integers(2**31))
    module = shared_copy(bench.module(len(labels)))
    head = _own_head(module) if space.task in _HEADED else {}
    stack = AdapterStack(module, space, [seed], torch.device(bench.device))
    optimizer = torch.optim.AdamW([*stack.parameters, *head.values()], lr=rate, weight_decay=0.01)
    losses: list[float] = []
    with torch.enable_grad(), stack.attached():
        for at in batches(examples, recipe):
            inputs = {k: v.to(bench.device) for k, v in task.collate([examples[i] for i in at]).items()}
            loss = task.losses(module, inputs).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise _DivergedError(
                    f"the warm start diverged at step {len(losses)} (loss {losses[-1]}); leave --warm-start out."
                )
            if progress is not None:
                progress(len(losses), steps)
    a, b = stack.arrays(0)
    full = {name: value.detach().float().cpu().numpy().copy() for name, value in head.items()}
    about = {**recipe.as_json(), "kind": "warm-start", "asked": asked, "instances": len(rows), "labels": list(labels)}
    about |= {"rank": RANK, "alpha": ALPHA, "a_seed": seed}
    members = digest([[row.id, row.task_hash] for row in rows])
    tail = max(1, len(losses) // 10)
    record = {
        "instances": len(rows),
        "steps": len(losses),
        "first_loss": float(np.mean(losses[:tail])),
        "last_loss": float(np.mean(losses[-tail:])),
        "losses": [round(value, 6) for value in losses],
    }
    identity = {"space": bench.space.id, "members": members, "recipe": about, "values": _values(a, b, full)}
    return Adapter(digest(identity), bench.space.id, "warm start", members, about, record, a, b, full)


def _values(*held: Mapping[str, NDArray[np.float32]]) -> str:
    total = hashlib.sha256()
    for arrays in held:
        for name in sorted(arrays):
            total.update(f"{name}{arrays[name].shape}".encode())
            total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def shared_copy(module: nn.Module) -> nn.Module:
    """Copy a module whose parameters and buffers stay shared with the original.

    Args:
        module: the module.

    Returns:
        A module of its own; replace its parameters, don't change them in place.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def _own_head(module: nn.Module) -> dict[str, Tensor]:
    """Give a classifier a head of its own that can be trained."""
    prefix = f"{module.base_model_prefix}."
    head: dict[str, Tensor] = {}
    for name, parameter in list(module.named_parameters()):
        if not name.startswith(prefix):
            head[name] = _replace(module, name, parameter.detach().clone(), trained=True)
    return head


def _replace(module: nn.Module, name: str, value: Tensor, *, trained: bool = False) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=trained)
    setattr(module.get_submodule(owner), leaf, parameter)
    return parameter


def merged(cold: nn.Module, warm: Adapter, labels: Sequence[str]) -> nn.Module:
    """Return a model with a warm start merged into it.

    A label that the warm start was trained with keeps its row of the head, whatever its index here; other labels have
    the row of the cold start.

    Args:
        cold: the frozen base model with a head for `labels`.
        warm: from `train`.
        labels: the dataset's labels.

    Returns:
        A frozen model of its own that shares everything unchanged with `cold`.

    Raises:
        StoreError: the adapter is no warm start of this model.
    """
    if warm.recipe.get("kind") != "warm-start":
        raise StoreError(f"the adapter {warm.id} is no warm start; restore the store, or ingest into a new dataset.")
    module = shared_copy(cold)
    modules = dict(module.named_modules())
    device = next(module.parameters()).device
    scaling = float(warm.recipe["alpha"]) / int(warm.recipe["rank"])
    known = list(warm.recipe["labels"])
    with torch.no_grad():
        for name, b in warm.b.items():
            if name not in modules:
                raise StoreError(f"the warm start {warm.id} adapts {name!r}, which the model does not have.")
            delta = scaling * torch.from_numpy(b).to(device) @ torch.from_numpy(warm.a[name]).to(device)
            layers.add_to_weight(modules[name], delta)
        for name, value in warm.full.items():
            held = module.get_parameter(name).detach().clone()
            trained = torch.from_numpy(value).to(held)
            if held.shape == trained.shape and (list(labels) == known or held.shape[0] != len(labels)):
                held = trained
            else:
                for at, label in enumerate(labels):
                    if label in known:
                        held[at] = trained[known.index(label)]
            _replace(module, name, held)
    return module.eval().requires_grad_(False)


def warm_adapter(store: Store, adapter_id: str) -> Adapter:
    """Return a stored warm start.

    Args:
        store: the store.
        adapter_id: its id.

    Returns:
        The adapter.

    Raises:
        StoreError: the store does not have it.
    """
    found = store.adapter(adapter_id)
    if found is None:
        raise StoreError(
            f"the space starts from the adapter {adapter_id}, which the store does not hold; restore it from a backup, "
            "or ingest into a new dataset."
        )
    return found
