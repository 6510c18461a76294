"""Subset adapters trained side by side: several subsets, orders or starts in one pass over one frozen model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repmatch.curator import trial
from repmatch.curator.apart import Way
from repmatch.curator.stack import AdapterStack
from repmatch.curator.tasks import Example, Task
from repmatch.curator.training import Recipe, Trained, batches, training_record
from repmatch.datamodels import Space
from repmatch.errors import ModelError, UsageError


@dataclass(frozen=True)
class Job:
    """One subset adapter to train.

    Attributes:
        examples: the subset, made ready.
        recipe: how; the learning rate and the weight decay must be those of the other jobs.
        seed: of A; None: the space's.
    """

    examples: Sequence[Example]
    recipe: Recipe
    seed: int | None = None


@dataclass
class _Runner:
    """A job under way."""

    job: Job
    plan: Iterator[list[int]]
    losses: list[float]
    seen: int = 0


def train_side_by_side(
    module: nn.Module,
    space: Space,
    task: Task,
    jobs: Sequence[Job],
    progress: Callable[[int, int], None] | None = None,
) -> list[Trained]:
    """Train several subset adapters at once; each is what `training.train` makes of it alone, but for rounding.

    A step takes the next batch of every job: each batch goes through its own adapter only. A job that has had all its
    steps leaves. Where a model does not keep the rows of a batch apart, one job is trained after the other.

    Args:
        module: the frozen model at the space's start; it is as before afterwards.
        space: the space.
        task: collates examples and gives losses.
        jobs: at least one.
        progress: called with (steps done, steps in all), over all jobs.

    Returns:
        A, B and record of each job, in order; without accuracy.

    Raises:
        UsageError: the jobs' learning rates or weight decays differ, or a job has no examples.
        ModelError: a loss is not finite.
    """
    _check(jobs)
    total = sum(job.recipe.steps(len(job.examples)) for job in jobs)
    tell = progress or (lambda *_: None)
    every = [example for job in jobs for example in job.examples]
    if len(jobs) == 1 or trial.tried(module, space, task, every).way is Way.TOGETHER:
        return _trained(module, space, task, jobs, lambda done: tell(done, total))
    found: list[Trained] = []
    for job in jobs:
        before = sum(int(trained.record["steps"]) for trained in found)

        def later(done: int, before: int = before) -> None:
            tell(before + done, total)

        found += _trained(module, space, task, [job], later)
    return found


def _trained(
    module: nn.Module, space: Space, task: Task, jobs: Sequence[Job], tell: Callable[[int], None]
) -> list[Trained]:
    began = time.monotonic()
    device = next(module.parameters()).device
    runners = [_Runner(job, batches(job.examples, job.recipe), []) for job in jobs]
    stack = AdapterStack(module, space, [space.seed if j.seed is None else j.seed for j in jobs], device)
    recipe = jobs[0].recipe
    optimizer = _optimizer(stack, recipe)
    active, found = list(range(len(jobs))), dict[int, Trained]()
    while active:
        groups = [next(runners[i].plan, None) for i in active]
        ended = [k for k, group in enumerate(groups) if group is None]
        for k in ended:
            a, b = stack.arrays(k)
            runner = runners[active[k]]
            record = training_record(
                len(runner.job.examples), runner.seen, runner.losses, None, time.monotonic() - began
            )
            found[active[k]] = Trained(a, b, {**record, "side_by_side": len(jobs)})
        if ended:
            kept = [k for k in range(len(active)) if k not in ended]
            active = [active[k] for k in kept]
            if not active:
                break
            stack, optimizer = _keep(stack, optimizer, kept, recipe)
        picked = [group for group in groups if group is not None]
        losses = _step(stack, optimizer, task, [runners[i].job.examples for i in active], picked)
        for i, group, loss in zip(active, picked, losses, strict=True):
            runners[i].losses.append(loss)
            runners[i].seen += len(group)
            if not math.isfinite(loss):
                raise ModelError(
                    f"training subset adapter {i + 1} of {len(jobs)} diverged at step {len(runners[i].losses)} (loss "
                    f"{loss}); try a smaller learning rate than {recipe.learning_rate}."
                )
        tell(sum(len(runner.losses) for runner in runners))
    return [found[i] for i in range(len(jobs))]


def _check(jobs: Sequence[Job]) -> None:
    if not jobs or any(not job.examples for job in jobs):
        raise UsageError("every job needs one or more examples.")
    rates = {(job.recipe.learning_rate, job.recipe.weight_decay) for job in jobs}
    if len(rates) > 1:
        raise UsageError(
            f"jobs side by side share learning rate and weight decay, but these have {sorted(rates)}; train them apart."
        )


def _optimizer(stack: AdapterStack, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(stack.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _keep(
    stack: AdapterStack, optimizer: torch.optim.Optimizer, kept: Sequence[int], recipe: Recipe
) -> tuple[AdapterStack, torch.optim.Optimizer]:
    """Return the stack and the optimiser's state without the adapters that are done."""
    old = stack.parameters
    smaller = stack.only(kept)
    made = _optimizer(smaller, recipe)
    for before, after in zip(old, smaller.parameters, strict=True):
        state: dict[str, Any] = optimizer.state[before]
        chosen = {k: v[list(kept)].clone() if v.shape == before.shape else v for k, v in state.items()}
        if chosen:
            made.state[after] = chosen
    return smaller, made


def _step(
    stack: AdapterStack,
    optimizer: torch.optim.Optimizer,
    task: Task,
    examples: Sequence[Sequence[Example]],
    groups: Sequence[list[int]],
) -> list[float]:
    """Take one step of every adapter; a smaller batch is filled up with rows that do not count."""
    device = next(stack.module.parameters()).device
    most = max(len(group) for group in groups)
    rows: list[Example] = []
    weights = torch.zeros(len(groups), most)
    for k, (held, group) in enumerate(zip(examples, groups, strict=True)):
        rows += [held[i] for i in group] + [held[group[0]]] * (most - len(group))
        weights[k, : len(group)] = 1.0 / len(group)
    inputs = {name: value.to(device) for name, value in task.collate(rows).items()}
    weights = weights.to(device)
    with torch.enable_grad(), stack.attached():
        each: Tensor = task.losses(stack.module, inputs).reshape(len(groups), most)
        means = (each * weights).sum(dim=1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(means.sum())
    optimizer.step()
    found: list[float] = means.detach().tolist()
    return found


def seeds_of(job: Job, seeds: Sequence[int]) -> list[Job]:
    """Return a job once for each start.

    Args:
        job: the job.
        seeds: of A and of the order.

    Returns:
        The jobs.
    """
    return [replace(job, seed=seed, recipe=replace(job.recipe, seed=seed)) for seed in seeds]
