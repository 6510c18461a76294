"""The lower layers of a model, run once an instance where trainings adapt the upper ones alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repmatch.curator.batches import batches_by_tokens
from repmatch.curator.precision import is_out_of_memory
from repmatch.curator.tasks import Example, Task
from repmatch.datamodels import Matrix
from repmatch.errors import ModelError


class _Reached(Exception):  # noqa: N818 -- no error: it ends a forward pass that has gone far enough
    """The first adapted layer was reached."""


class _Passed(nn.Module):
    """Stands in place of a layer that need not run: its answer is what came in.

    Args:
        parts: of the layer's answer, where it is a tuple that begins with the hidden states; 0: it is these alone.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor | None, ...]:
        return (hidden, *[None] * (self.parts - 1)) if self.parts else hidden


def find_blocks(module: nn.Module, matrices: Sequence[Matrix]) -> tuple[str, nn.ModuleList]:
    """Find a model's list of layers.

    Args:
        module: the model.
        matrices: the adapted ones.

    Returns:
        Name and list; the longest one that holds every adapted matrix.

    Raises:
        ModelError: there is none.
    """
    found = [
        (name, held)
        for name, held in module.named_modules()
        if isinstance(held, nn.ModuleList) and all(m.name.startswith(f"{name}.") for m in matrices)
    ]
    if not found:
        raise ModelError(
            f"{type(module).__name__} has no list of layers that holds every adapted matrix; leave --layers out."
        )
    return max(found, key=lambda pair: len(pair[1]))


@dataclass
class LowerLayers:
    """Hidden states below the first adapted layer, computed once for each instance.

    Attributes:
        module: the frozen model.
        name: of its list of layers.
        blocks: the list.
        depth: how many of them lie below.
        left: whether padding goes before the text.
    """

    module: nn.Module
    name: str
    blocks: nn.ModuleList
    depth: int
    left: bool = False
    _states: dict[int, tuple[Example, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _given: Tensor | None = field(default=None, init=False, repr=False)
    _parts: int = field(default=0, init=False, repr=False)

    @classmethod
    def of(cls, module: nn.Module, matrices: Sequence[Matrix], upper: int, *, left: bool = False) -> LowerLayers:
        """Set the border.

        Args:
            module: the model.
            matrices: the adapted ones, of every layer.
            upper: how many of the last layers are adapted.
            left: whether padding goes before the text.

        Returns:
            What lies below.

        Raises:
            ModelError: the model has no list of layers.
        """
        name, blocks = find_blocks(module, matrices)
        return cls(module, name, blocks, max(0, len(blocks) - upper), left)

    def above(self, matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
        """Return the matrices of the upper layers.

        Args:
            matrices: of every layer.

        Returns:
            Those above the border.

        Raises:
            ModelError: none is.
        """
        kept = tuple(m for m in matrices if int(m.name[len(self.name) + 1 :].split(".")[0]) >= self.depth)
        if not kept:
            raise ModelError(
                f"the last {len(self.blocks) - self.depth} of {len(self.blocks)} layers have no adapted matrix; raise "
                "--layers, or leave it out."
            )
        return kept

    def remember(self, task: Task, examples: Sequence[Example], batch_tokens: int) -> None:
        """Compute the states of those examples that are new.

        Args:
            task: collates them.
            examples: instances; they must live as long as this does.
            batch_tokens: padded tokens a batch may hold.

        Raises:
            ModelError: the model never calls the layer at the border with hidden states.
        """
        new = list({id(e): e for e in examples if id(e) not in self._states}.values())
        device = next(self.module.parameters()).device
        with torch.inference_mode(), self._watched():
            for at in batches_by_tokens([e.tokens for e in new], batch_tokens):
                inputs = {k: v.to(device) for k, v in task.collate([new[i] for i in at]).items()}
                states = self._run(inputs)
                for row, i in enumerate(at):
                    n = new[i].tokens
                    held = states[row, -n:] if self.left else states[row, :n]
                    self._states[id(new[i])] = new[i], held.clone()

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._given = None
        with suppress(_Reached):
            self.module(**{name: value for name, value in inputs.items() if name != "labels"})
        if self._given is None:
            raise ModelError(
                f"{type(self.module).__name__} gives its layers no hidden states as their first argument; leave "
                "--layers out."
            )
        given, self._given = self._given, None
        return given

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def see(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            first = args[0] if args else given.get("hidden_states")
            if isinstance(first, Tensor):
                self._given = first
            raise _Reached

        def shape(_: nn.Module, __: Any, output: Any) -> None:
            self._parts = len(output) if isinstance(output, tuple) else 0

        handles = [self.blocks[self.depth].register_forward_pre_hook(see, with_kwargs=True)]
        if self.depth:
            handles.append(self.blocks[0].register_forward_hook(shape))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def give(self, examples: Sequence[Example], times: int = 1) -> None:
        """Set the hidden states of the next forward pass, in a batch padded as the task pads.

        Args:
            examples: from `remember`, in the batch's order.
            times: how often the batch is repeated.
        """
        held = [self._states[id(e)][1] for e in examples]
        longest = max(len(state) for state in held)
        batch = held[0].new_zeros(len(held), longest, held[0].shape[-1])
        for row, state in enumerate(held):
            lo = longest - len(state) if self.left else 0
            batch[row, lo : lo + len(state)] = state
        self._given = batch.repeat(times, 1, 1) if times > 1 else batch

    def is_right(self, task: Task, examples: Sequence[Example]) -> bool:
        """Whether a model gives the same without its lower layers: some hand on more than hidden states.

        Args:
            task: collates them.
            examples: from `remember`, a few.

        Returns:
            True or False.
        """
        device = next(self.module.parameters()).device
        inputs = {k: v.to(device) for k, v in task.collate(examples).items() if k != "labels"}
        self.give(examples)
        with torch.inference_mode():
            whole = self.module(**inputs).logits.float()
            try:
                with self.skipped():
                    short = self.module(**inputs).logits.float()
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                if is_out_of_memory(error):
                    raise
                return False
        slack = 1e-3 * float(whole.nan_to_num(0.0).abs().max())
        return torch.allclose(whole, short, rtol=1e-3, atol=slack, equal_nan=True)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Leave the lower layers out of every forward pass: `give` says what comes out of them.

        Yields:
            Nothing; the model is as before afterwards.
        """
        kept = [self.blocks[i] for i in range(self.depth)]

        def put(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self._given, *args[1:]), given
            return args, {**given, "hidden_states": self._given}

        handle = self.blocks[self.depth].register_forward_pre_hook(put, with_kwargs=True)
        try:
            for i in range(self.depth):
                self.blocks[i] = _Passed(self._parts)
            yield
        finally:
            handle.remove()
            for i, block in enumerate(kept):
                self.blocks[i] = block
