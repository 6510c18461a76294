"""The factor engine: instance adapters of a whole batch from one forward and one backward pass.

While B = 0 the adapters do not change the forward pass, so one pass over a batch serves every instance in it. With x_t
the input and δ_t the loss gradient at the output of an adapted matrix, ∂L/∂B = (alpha / r) Σ_t δ_t (A x_t)ᵀ, and the
first AdamW step is B₁ = −lr · g / (|g| + eps), elementwise: m̂ = g and v̂ = g² after the bias correction. A's gradient is
zero while B = 0, so A only shrinks by the weight decay and its direction stays.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmatch.curator import apart, layers, optimizers, start
from repmatch.curator.apart import Way
from repmatch.curator.directions import left_singular, thin_qr, unit_rows
from repmatch.curator.linear import by_onednn
from repmatch.curator.optimizers import first_step
from repmatch.curator.precision import Precision, computing, is_out_of_memory
from repmatch.curator.shortcuts import LastLayer, Shortcut
from repmatch.curator.split import Split
from repmatch.curator.stack import AdapterStack
from repmatch.datamodels import Layout, Space
from repmatch.errors import ModelError, SharedUseError

__all__ = ["BatchFactors", "FactorEngine", "first_step", "left_singular", "unit_rows"]

logger = logging.getLogger(__name__)

# Rounding moves no loss by more than this, in any precision.
_MOVED = 0.05

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class BatchFactors:
    """Factors of one batch, in the batch's order; see `repmatch.datamodels.FactorBatch` for the fields."""

    values: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    norms: NDArray[np.float32]
    losses: NDArray[np.float32]


class FactorEngine:
    """Computes instance factors of one space with one frozen model.

    Attributes:
        precision: what the model computes in; gradients are collected in float32 whatever it is.
        reached: names of the adapted layers that a forward pass has run so far.
        way: how batches are computed, as far as it has been found out.
        batch_first: whether the adapted layers have the instances in their first dimension, as far as was found out.

    Args:
        module: the frozen model at the shared start, in evaluation mode.
        space: the space; its matrices name modules of `module`.
        loss: maps (module, inputs) to the loss of each instance, (n,) float32.
        device: where to compute.
    """

    def __init__(self, module: nn.Module, space: Space, loss: Loss, device: str = "cpu") -> None:
        self.module = module.to(device)
        self.space = space
        self.device = torch.device(device)
        self.precision: Precision = "float32"
        self._loss = loss
        self._scaling = space.alpha / space.rank
        a = {m.name: start.draw_a(space.seed, m.name, space.rank, m.d_in) for m in space.matrices}
        self._a = {name: torch.from_numpy(value).to(self.device) for name, value in a.items()}
        # ΔW = B·A = (B·Rᵀ)·Qᵀ with Aᵀ = Q·R: B·Rᵀ has the left singular vectors and values of ΔW.
        several = a.items() if space.rank > 1 else ()
        split = {name: torch.linalg.qr(torch.from_numpy(value.T).double()) for name, value in several}
        self._basis = {name: qr.Q.to(self._wide) for name, qr in split.items()}
        self._rt = {name: qr.R.T.to(self._wide) for name, qr in split.items()}
        self.reached: set[str] = set()
        self._gradients: dict[str, Tensor] = {}
        self._count = 0
        self.way = Way.TOGETHER
        self.batch_first = True
        self._way_found = False
        self._last_layer = LastLayer.of(module)
        self._shortcut: Shortcut | None = None
        self._split: Split | None = None

    @property
    def layout(self) -> Layout:
        """How the factors lie in a flat row."""
        return self.space.layout

    def twin(self) -> FactorEngine:
        """Return an engine that can compute in another thread at the same time; every weight is shared."""
        other = copy.copy(self)
        memo: dict[int, object] = {id(tensor): tensor for tensor in [*self.module.parameters(), *self.module.buffers()]}
        other.module = copy.deepcopy(self.module, memo)
        other._last_layer = LastLayer.of(other.module)
        other._gradients = {}
        other._split = None
        return other

    def gradients(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Compute ∂L/∂B of each instance at the shared start.

        Args:
            inputs: what the model takes, first dimension n.

        Returns:
            Matrix name -> (n, d_out, r) float32, and the losses (n,) float32.

        Raises:
            ModelError: the losses are not one number for each instance.
        """
        moved = {k: v.to(self.device) for k, v in inputs.items()}
        self.try_shortcut(moved)
        self.find_way(moved)
        return self._by_way(self._gradients_of, self._gradients_apart, _joined_gradients, moved)

    def _by_way(
        self,
        together: Callable[[Mapping[str, Tensor]], Found],
        by_itself: Callable[[Mapping[str, Tensor]], Found],
        joined: Callable[[Sequence[Found]], Found],
        inputs: Mapping[str, Tensor],
    ) -> Found:
        """Compute a batch in the fastest way that its model allows."""
        count = len(next(iter(inputs.values())))
        if count == 1 or (self.way is Way.TOGETHER and self._way_found):
            return together(inputs)
        if self.way is Way.APART:
            try:
                return by_itself(inputs)
            except (RuntimeError, ValueError, TypeError) as error:  # whatever vmap cannot follow, by several names
                if is_out_of_memory(error):
                    raise
                self.way = Way.ONE_BY_ONE
                logger.warning(
                    "the instances of this model cannot be computed together: they are computed one by one, which is "
                    "slow (%s)",
                    str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                )
        return joined([together({k: v[at : at + 1] for k, v in inputs.items()}) for at in range(count)])

    def find_way(self, inputs: Mapping[str, Tensor]) -> None:
        """Find out on the first batch whether instances can be told apart in it: two are tried alone and together.

        Where no two have a finite loss, or those tried have no gradient, that is left for the next batch, and this one
        is computed one by one.

        Args:
            inputs: a batch.
        """
        count = len(next(iter(inputs.values())))
        if self._way_found or count < 2:
            return
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        chosen = [0, count - 1]  # batches are in order of length
        alone = self._each(moved, chosen)
        if not all(_is_finite(found) for found in alone):
            with torch.no_grad(), self._forward():
                chosen = torch.isfinite(self._losses(moved)).nonzero().flatten().tolist()
            chosen = [chosen[0], chosen[-1]] if len(chosen) > 1 else []
            alone = self._each(moved, chosen)
            if not alone or not all(_is_finite(found) for found in alone):
                return
        pair = {name: torch.cat([value[at : at + 1] for at in chosen]) for name, value in moved.items()}
        try:
            together, losses = self._gradients_of(pair)
        except SharedUseError:
            self.way, self._way_found = Way.APART, True
            return
        if not torch.allclose(losses, torch.cat([loss for _, loss in alone]), rtol=_MOVED, atol=_MOVED):
            self._way_found = True  # the instances see each other, which no way of computing mends
            return
        if not any(bool(value.any()) for gradients, _ in alone for value in gradients.values()):
            return
        self._way_found = True
        for at, (found, _) in enumerate(alone):
            if apart.different(found, together, at, rough=self.is_rough):
                self.way, self.batch_first = Way.APART, False

    def _each(self, inputs: Mapping[str, Tensor], chosen: Sequence[int]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Compute some instances of a batch alone."""
        return [self._gradients_of({name: value[at : at + 1] for name, value in inputs.items()}) for at in chosen]

    @property
    def is_rough(self) -> bool:
        """Whether something is computed in less than float32, or some weights are quantised."""
        rough = any(not p.is_floating_point() or p.element_size() < 4 for p in self.module.parameters())
        return rough or self.precision != "float32"

    def take_way(self, other: FactorEngine) -> None:
        """Compute batches as another engine of the same model does.

        Args:
            other: the engine.
        """
        self.way, self.batch_first, self._way_found = other.way, other.batch_first, other._way_found

    def _gradients_apart(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        count = len(next(iter(inputs.values())))
        stack = AdapterStack(self.module, self.space, [self.space.seed] * count, self.device)
        _, gradients, losses = self._apart(stack, inputs)
        return {name: value.float() for name, value in gradients.items()}, losses

    def _apart(
        self, stack: AdapterStack, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        with self._forward(vmapped=True), apart.unchanged(self.module):
            found = apart.gradients(stack, self._losses, inputs)
        self.reached |= stack.reached
        return found

    def _gradients_of(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        self._gradients = {}
        self._count = len(next(iter(inputs.values())))
        with torch.enable_grad(), self._hooks(), self._forward():
            losses = self._losses(inputs)
            self._backward(losses)
        rank, count = self.space.rank, len(losses)
        for matrix in self.space.matrices:
            if matrix.name not in self._gradients:
                self._gradients[matrix.name] = torch.zeros(count, matrix.d_out, rank, device=self.device)
        gradients, self._gradients = self._gradients, {}
        return gradients, losses.detach().float()

    def _backward(self, losses: Tensor) -> None:
        """Go back without autocast: products are of the type that they were of, because their inputs are.

        On an accelerator the backward pass runs in a thread of its own, where autocast knows nothing of bfloat16 and
        would go on in its default, float16, whose range gradients leave.
        """
        if losses.requires_grad:
            with torch.autocast(self.device.type, enabled=False):
                # The sum, not the mean: each instance's gradient must be that of a batch of one.
                torch.autograd.backward(losses.sum())

    def _losses(self, inputs: Mapping[str, Tensor]) -> Tensor:
        losses = self._loss(self.module, inputs)
        count = len(next(iter(inputs.values())))
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ModelError(
                f"the task's losses are {got} for a batch of {count}; expected ({count},), one number each. Take "
                "no mean over the batch (reduction='none' in torch.nn.functional), and leave no other dimension."
            )
        return losses

    @contextmanager
    def _forward(self, vmapped: bool = False) -> Iterator[None]:
        """Compute in the engine's precision, and leave out what the loss cannot see.

        Under vmap nothing is computed in bfloat16: backward would run inside of autocast (see `_backward`).
        """
        with ExitStack() as stack:
            halves = self.precision in ("bf16", "bf16x3")
            stack.enter_context(computing("float32" if vmapped and halves else self.precision, self.device))
            if not vmapped:
                self._split = (self._split or Split()) if self.precision == "bf16x3" else None
                if self._split is not None:
                    stack.enter_context(self._split.attached(self.module))
                stack.enter_context(by_onednn(self.module))
            if self._last_layer is not None:
                stack.enter_context(self._last_layer.cut(self._shortcut))
            yield

    def try_shortcut(self, inputs: Mapping[str, Tensor]) -> Shortcut:
        """Find out on the first batch what of the last layer can be left out without another loss.

        Args:
            inputs: a batch.

        Returns:
            What can; nothing as long as no loss was finite.
        """
        if self._last_layer is not None and self._shortcut is None:
            few = {name: value[:2].to(self.device) for name, value in inputs.items()}
            with computing("float32", self.device):
                self._shortcut = self._last_layer.try_out(self.module, self._loss, few)
        return self._shortcut or Shortcut.NONE

    def take_shortcut(self, shortcut: Shortcut) -> None:
        """Leave out what another engine of the same model has found out.

        Args:
            shortcut: from its `try_shortcut`.
        """
        self._shortcut = shortcut

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        modules = dict(self.module.named_modules())
        handles = []
        try:
            for matrix in self.space.matrices:
                hook = partial(self._watch, matrix.name)
                handles.append(modules[matrix.name].register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(
        self, name: str, layer: nn.Module, args: tuple[Tensor, ...], options: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        self.reached.add(name)
        given = layers.given(args, options)
        layers.refuse_several(name, output)
        layers.refuse_shared(name, given, self._count)
        if not torch.is_grad_enabled():
            return output
        with self._full_precision():
            projected = layers.project(layer, given.detach().float(), self._a[name]) * self._scaling
        if not output.requires_grad:
            # Below the first adapted matrix nothing needs a gradient, so backward ends here. The copy is no leaf: a
            # model may go on to change it in place.
            output = output.detach().requires_grad_(True).clone()
        output.register_hook(partial(self._collect, name, layer, projected))  # type: ignore[no-untyped-call]
        return output

    def _collect(self, name: str, layer: nn.Module, projected: Tensor, delta: Tensor) -> None:
        if delta.shape[0] % self._count:
            self.batch_first = False
            raise SharedUseError(
                f"the layer {name!r} gives {tuple(delta.shape)} for a batch of {self._count}; expected the instances "
                "in the first dimension. Adapt another layer with --targets, or let the module keep the batch first."
            )
        delta = layers.positions(layer, delta, self._count)
        projected = projected.reshape(self._count, -1, projected.shape[-1])
        with self._full_precision():
            part = delta.transpose(1, 2).float() @ projected
        # A matrix used several times in one pass has one gradient: the sum.
        self._gradients[name] = self._gradients[name] + part if name in self._gradients else part

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Gradients are collected in float32 whatever the model computes in."""
        with torch.autocast(self.device.type, enabled=False):
            if self.precision != "tf32":
                yield
                return
            with computing("float32", self.device):
                yield

    def compute(self, inputs: Mapping[str, Tensor]) -> BatchFactors:
        """Compute the instance factors of a batch.

        Args:
            inputs: what the model takes, first dimension n.

        Returns:
            The factors, in the batch's order. A loss that is not finite gives factors that are not finite.
        """
        if int(self.space.optimizer.get("steps", 1)) > 1:
            return self._after_steps(inputs)
        gradients, losses = self.gradients(inputs)
        steps = {name: first_step(g, self.space.optimizer) for name, g in gradients.items()}
        values: list[Tensor] = []
        cores: list[Tensor] = []
        for matrix in self.space.matrices:
            if self.space.rank == 1:
                values.append(unit_rows(steps[matrix.name][:, :, 0])[0])
            else:
                columns, core = left_singular(_double(steps[matrix.name]) @ self._rt[matrix.name])
                values.append(columns.flatten(1).float())
                cores.append(core.float())
        norms = torch.stack([unit_rows(gradients[m.name].flatten(1))[1] for m in self.space.matrices], dim=1)
        return _gathered(values, cores, norms, losses)

    @property
    def _wide(self) -> torch.device:
        """Where double precision is."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def train(self, inputs: Mapping[str, Tensor]) -> tuple[AdapterStack, dict[str, Tensor], Tensor]:
        """Train an adapter on each instance of a batch, all at once, for as many steps as the space says.

        Args:
            inputs: what the model takes, first dimension n.

        Returns:
            The adapters; ∂L/∂B at the start, matrix name -> (n, d_out, r); and the losses there, (n,) float32.
        """
        moved = {k: v.to(self.device) for k, v in inputs.items()}
        self.try_shortcut(moved)
        self.find_way(moved)
        return self._by_way(
            partial(self._trained, self._learn), partial(self._trained, self._learn_apart), _joined_stacks, moved
        )

    def _trained(
        self, learn: Callable[[AdapterStack, Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
    ) -> tuple[AdapterStack, dict[str, Tensor], Tensor]:
        count = len(next(iter(inputs.values())))
        stack = AdapterStack(self.module, self.space, [self.space.seed] * count, self.device)
        optimizer = optimizers.build(stack.parameters, self.space.optimizer)
        gradients: dict[str, Tensor] = {}
        first = torch.zeros(count)
        for step in range(int(self.space.optimizer.get("steps", 1))):
            optimizer.zero_grad(set_to_none=True)
            losses = learn(stack, inputs)
            if step == 0:
                first = losses
                gradients = {n: torch.zeros_like(b) if b.grad is None else b.grad for n, b in stack.b.items()}
            optimizer.step()
        return stack, gradients, first

    def _learn(self, stack: AdapterStack, inputs: Mapping[str, Tensor]) -> Tensor:
        """Fill in the gradients of a step, and return the losses before it."""
        with torch.enable_grad(), stack.attached(), self._forward():
            losses = self._losses(inputs)
            self._backward(losses)
        return losses.detach().float()

    def _learn_apart(self, stack: AdapterStack, inputs: Mapping[str, Tensor]) -> Tensor:
        of_a, of_b, losses = self._apart(stack, inputs)
        for held, found in ((stack.a, of_a), (stack.b, of_b)):
            for name, leaf in held.items():
                leaf.grad = found[name].contiguous()
        return losses

    def _after_steps(self, inputs: Mapping[str, Tensor]) -> BatchFactors:
        stack, gradients, losses = self.train(inputs)
        values, cores, norms = [], [], []
        for matrix in self.space.matrices:
            a, b = stack.a[matrix.name].detach(), stack.b[matrix.name].detach()
            start_a = self._a[matrix.name]
            norm = unit_rows(gradients[matrix.name].flatten(1))[1]
            # A matrix may get its first gradient from the second step on; 0 marks a factor that is zero.
            norms.append(torch.where(norm > 0, norm, unit_rows(b.flatten(1))[1]))
            if self.space.rank == 1:
                sign = torch.sign((a[:, 0] * start_a[0]).sum(dim=1, keepdim=True))
                values.append(unit_rows(b[:, :, 0])[0] * sign)
                continue
            a, b = _double(a), _double(b)
            whole = b @ thin_qr(a.transpose(1, 2))[1].transpose(1, 2)
            columns, _ = left_singular(whole)
            size = whole.flatten(1).norm(dim=1)
            # ΔW in the basis that all instances share, the span of the start's A; what left it is not kept.
            core = columns.transpose(1, 2) @ b @ (a @ self._basis[matrix.name])
            cores.append((core / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None, None]).float())
            values.append(columns.flatten(1).float())
        return _gathered(values, cores, torch.stack(norms, dim=1), losses)


def _is_finite(found: tuple[dict[str, Tensor], Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in (*found[0].values(), found[1]))


def _joined_gradients(found: Sequence[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    gradients = {name: torch.cat([one[name] for one, _ in found]) for name in found[0][0]}
    return gradients, torch.cat([losses for _, losses in found])


def _joined_stacks(
    found: Sequence[tuple[AdapterStack, dict[str, Tensor], Tensor]],
) -> tuple[AdapterStack, dict[str, Tensor], Tensor]:
    stack = found[0][0].joined([other for other, _, _ in found[1:]])
    return stack, *_joined_gradients([(gradients, losses) for _, gradients, losses in found])


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def _gathered(values: Sequence[Tensor], cores: Sequence[Tensor], norms: Tensor, losses: Tensor) -> BatchFactors:
    return BatchFactors(
        values=_on_host(torch.cat(list(values), dim=1)),
        cores=_on_host(torch.stack(list(cores), dim=1)) if cores else None,
        norms=_on_host(norms),
        losses=_on_host(losses),
    )


def _on_host(x: Tensor) -> NDArray[np.float32]:
    """Return an array; from CUDA by pinned memory, which is copied to at the bus' full rate and kept by torch."""
    if x.device.type != "cuda":
        return x.cpu().numpy()
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    held.copy_(x)  # waits for the device
    return held.numpy()
