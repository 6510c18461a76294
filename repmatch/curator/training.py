"""Subset adapters: LoRA factors trained on a subset from the shared start, base and head frozen."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator import start
from repmatch.curator.layers import given
from repmatch.curator.tasks import Example, Task
from repmatch.datamodels import Space
from repmatch.errors import ModelError, quote_list

# Batches are cut from shuffled stretches of this many batches sorted by length: little padding, still random order.
_BUCKET = 16


@dataclass(frozen=True)
class Recipe:
    """How a subset adapter is trained.

    Attributes:
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        epochs: passes over the subset.
        batch_size: instances a step.
        max_steps: at most so many steps, whatever the subset's size; a larger subset is then read in part, in the
            shuffled order.
        seed: of the order.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 3
    batch_size: int = 32
    max_steps: int = 600
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    def steps(self, instances: int) -> int:
        """Return the number of steps for a subset of this size."""
        return min(self.max_steps, self.epochs * math.ceil(instances / self.batch_size))


@dataclass(frozen=True)
class Trained:
    """What a training left: A (r, d_in) and B (d_out, r) float32 by matrix name, and its record."""

    a: dict[str, NDArray[np.float32]]
    b: dict[str, NDArray[np.float32]]
    record: dict[str, Any]


@contextmanager
def adapted(module: nn.Module, space: Space, rank: int | None = None) -> Iterator[PeftModel]:
    """Put peft's LoRA layers at the shared start onto a model, and take them off again.

    Args:
        module: the frozen model.
        space: names the matrices, the seed, alpha and rank.
        rank: another rank than the space's.

    Yields:
        The wrapped model; only A and B require gradients.
    """
    rank = space.rank if rank is None else rank
    names = [m.name for m in space.matrices]
    alpha: Any = space.alpha  # peft divides by it, whole or not, though it says int
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renames
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # Conv1D: peft sets it right by itself
        try:
            wrapped = get_peft_model(module, config)
        except ValueError as error:  # of a model with experts, whose layers it takes by their names
            raise ModelError(f"peft cannot adapt these layers ({error}) Adapt others with --targets.") from error
    try:
        layers = dict(module.named_modules())
        for name in names:
            _say_again(layers[name])
        passed_over = [name for name in names if not hasattr(layers[name], "lora_A")]
        if passed_over:
            raise ModelError(
                f"peft does not adapt {quote_list(passed_over, 3)} of this model (where a model has experts, it takes "
                "such names for theirs), so that no subset adapter can be trained. Adapt other layers with --targets."
            )
        with torch.no_grad():
            for matrix in space.matrices:
                values = torch.from_numpy(start.draw_a(space.seed, matrix.name, rank, matrix.d_in))
                weight = layers[matrix.name].lora_A["default"].weight
                weight.copy_(values.reshape(weight.shape))
                layers[matrix.name].lora_B["default"].weight.zero_()
                layers[matrix.name].register_forward_pre_hook(_by_position, with_kwargs=True)
        wrapped.requires_grad_(False)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("lora_" in name)
        wrapped.eval()
        yield wrapped
    finally:
        wrapped.unload()
        module.requires_grad_(False)


def _say_again(layer: Any) -> None:
    """Let a convolution that is wrapped say what its base layer says: some models read how far it strides."""
    base = getattr(layer, "base_layer", None)
    if isinstance(base, nn.Conv2d):
        for name in ("stride", "padding", "kernel_size", "dilation", "groups"):
            setattr(layer, name, getattr(base, name))


def _by_position(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> Any:
    """Pass a layer's input by position: peft's layers call it otherwise than torch's do."""
    return None if args else ((given(args, options),), {})


def batches(examples: Sequence[Example], recipe: Recipe) -> Iterator[list[int]]:
    """Yield the batches of a training: shuffled every epoch, similar lengths together.

    Args:
        examples: the tokenised subset.
        recipe: batch size, epochs, most steps and the seed of the order.

    Yields:
        Positions in `examples`.
    """
    left = recipe.steps(len(examples))
    for epoch in range(recipe.epochs):
        draw = start.generator(recipe.seed, f"order:{epoch}")
        order = draw.permutation(len(examples))
        span = recipe.batch_size * _BUCKET
        chunks = []
        for at in range(0, len(order), span):
            stretch = sorted(order[at : at + span].tolist(), key=lambda i: (examples[i].tokens, i))
            chunks += [stretch[b : b + recipe.batch_size] for b in range(0, len(stretch), recipe.batch_size)]
        for chunk in draw.permutation(len(chunks)):
            if left == 0:
                return
            left -= 1
            yield chunks[chunk]


def train(
    module: nn.Module,
    space: Space,
    task: Task,
    examples: Sequence[Example],
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train a subset adapter from the shared start.

    Args:
        module: the frozen model; it is as before afterwards.
        space: the space.
        task: collates examples.
        examples: the subset, tokenised.
        recipe: optimiser, epochs, batches.
        progress: called with (steps done, steps in all).

    Returns:
        A and B of each matrix, and the record: losses, accuracy, steps, seconds.

    Raises:
        ModelError: a loss is not finite.
    """
    began = time.monotonic()
    total, seen = recipe.steps(len(examples)), 0
    losses: list[float] = []
    right: int | None = None
    with adapted(module, space) as wrapped:
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        for step, at in enumerate(batches(examples, recipe)):
            loss, hits = train_step(wrapped, optimizer, task.collate([examples[i] for i in at]), task)
            if not math.isfinite(loss):
                raise ModelError(
                    f"training the subset adapter diverged at step {step + 1} (loss {loss}); try a smaller learning "
                    f"rate than {recipe.learning_rate}."
                )
            losses.append(loss)
            right, seen = None if hits is None else (right or 0) + hits, seen + len(at)
            if progress is not None:
                progress(step + 1, total)
        layers = dict(module.named_modules())
        a = {m.name: _matrix(layers[m.name].lora_A) for m in space.matrices}
        b = {m.name: _matrix(layers[m.name].lora_B) for m in space.matrices}
    return Trained(a, b, training_record(len(examples), seen, losses, right, time.monotonic() - began))


def _matrix(parts: Any) -> NDArray[np.float32]:
    """Return a LoRA factor as a matrix; that of a convolution has its channels first."""
    weight = parts["default"].weight.detach().cpu().numpy()
    found: NDArray[np.float32] = weight.reshape(len(weight), -1).copy()
    return found


def training_record(
    instances: int, seen: int, losses: Sequence[float], right: int | None, seconds: float
) -> dict[str, Any]:
    """Describe what happened in a training.

    Args:
        instances: of the subset.
        seen: instances read, an instance as often as it was.
        losses: of every step.
        right: how many were classified right just before their step; None where nothing is classified.
        seconds: it took.

    Returns:
        Plain JSON values.
    """
    tail = max(1, len(losses) // 10)
    record = {
        "instances": instances,
        "instances_read": seen,
        "steps": len(losses),
        "first_loss": float(np.mean(losses[:tail])),
        "last_loss": float(np.mean(losses[-tail:])),
        "losses": [round(value, 6) for value in losses],
        "seconds": round(seconds, 3),
    }
    if right is not None:
        record["running_accuracy"] = right / max(seen, 1)
    return record


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor], task: Task | None = None
) -> tuple[float, int | None]:
    """Take one optimiser step on one batch.

    Args:
        model: what requires gradients is trained.
        optimizer: over those parameters.
        batch: from the task's `collate`.
        task: gives the loss; None: sequence classification.

    Returns:
        The mean loss, and how many of the batch were classified right before the step; None where nothing is
        classified.
    """
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in batch.items()}
    right = None
    with torch.enable_grad():
        if task is None or task.name == "sequence-classification":
            logits = model(**{name: value for name, value in moved.items() if name != "labels"}).logits.float()
            loss = functional.cross_entropy(logits, moved["labels"])
            right = int((logits.argmax(dim=1) == moved["labels"]).sum())
        else:
            loss = task.losses(model, moved).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach()), right
