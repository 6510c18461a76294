"""Adapters side by side: many instances or subsets trained at once, each with its own A and B, on one frozen model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmatch.curator import layers, start
from repmatch.datamodels import Matrix, Space


@dataclass(frozen=True)
class Seeded:
    """A's start: the matrices, the rank and the seed of each adapter."""

    matrices: tuple[Matrix, ...]
    rank: int
    seeds: tuple[int, ...]

    def draw(self, matrix: Matrix) -> NDArray[np.float32]:
        """Return A of one matrix for every adapter, (s, r, d_in) float32."""
        drawn = {s: start.draw_a(s, matrix.name, self.rank, matrix.d_in) for s in set(self.seeds)}
        return np.stack([drawn[seed] for seed in self.seeds])


class AdapterStack:
    """LoRA factors of several adapters, as leaves that autograd trains.

    A batch holds the same number of rows for every adapter, those of the first adapter first. A row's forward pass sees
    its own adapter only, so the gradient of a sum of losses is every adapter's own.

    Attributes:
        a: matrix name -> (s, r, d_in).
        b: matrix name -> (s, d_out, r), zeros at first.
        reached: names of the layers that have been run with adapters.

    Args:
        module: the frozen model.
        space: names the matrices, the rank and alpha.
        seeds: of A, one an adapter.
        device: where the model is.
    """

    def __init__(self, module: nn.Module, space: Space, seeds: Sequence[int], device: torch.device) -> None:
        self.module = module
        self.space = space
        self.size = len(seeds)
        self.reached: set[str] = set()
        seeded = Seeded(space.matrices, space.rank, tuple(seeds))
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for matrix in space.matrices:
            a = torch.from_numpy(seeded.draw(matrix)).to(device)
            self.a[matrix.name] = a.requires_grad_(True)
            zeros = torch.zeros(self.size, matrix.d_out, space.rank, device=device)
            self.b[matrix.name] = zeros.requires_grad_(True)

    def only(self, positions: Sequence[int]) -> AdapterStack:
        """Return a stack of some of the adapters, as they are now.

        Args:
            positions: which, in order.

        Returns:
            The stack, with leaves of its own.
        """
        other = copy.copy(self)
        other.size = len(positions)
        other.reached = set()
        at = list(positions)
        other.a = {name: value.detach()[at].clone().requires_grad_(True) for name, value in self.a.items()}
        other.b = {name: value.detach()[at].clone().requires_grad_(True) for name, value in self.b.items()}
        return other

    def joined(self, others: Sequence[AdapterStack]) -> AdapterStack:
        """Return a stack of this one's adapters and those of others, as they are now.

        Args:
            others: stacks of the same space and model.

        Returns:
            The stack, with leaves of its own.
        """
        every = [self, *others]
        joined = copy.copy(self)
        joined.size = sum(stack.size for stack in every)
        joined.a = {n: torch.cat([s.a[n].detach() for s in every]).requires_grad_(True) for n in self.a}
        joined.b = {n: torch.cat([s.b[n].detach() for s in every]).requires_grad_(True) for n in self.b}
        return joined

    @property
    def parameters(self) -> list[Tensor]:
        """Every A, then every B."""
        return [*self.a.values(), *self.b.values()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the adapters onto the model, and take them off again.

        Yields:
            Nothing.
        """
        modules = dict(self.module.named_modules())
        handles = []
        try:
            for matrix in self.space.matrices:
                hook = partial(self._add, matrix.name)
                handles.append(modules[matrix.name].register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(
        self, name: str, layer: nn.Module, args: tuple[Tensor, ...], options: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        self.reached.add(name)
        a, b = self.a[name], self.b[name]
        given = layers.given(args, options)
        layers.refuse_several(name, output)
        layers.refuse_shared(name, given, self.size)
        x = layers.patches(layer, given, self.size)
        moved = torch.bmm(torch.bmm(x, a.transpose(1, 2).to(x.dtype)), b.transpose(1, 2).to(x.dtype))
        return output + (self.space.alpha / self.space.rank) * layers.like_output(layer, moved, output)

    def arrays(self, position: int) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Return one adapter's factors.

        Args:
            position: which adapter.

        Returns:
            A (r, d_in) and B (d_out, r) by matrix name.
        """

        def taken(held: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
            return {name: value[position].detach().float().cpu().numpy().copy() for name, value in held.items()}

        return taken(self.a), taken(self.b)
