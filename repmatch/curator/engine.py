"""The factor engine: instance adapters of a whole batch from one forward and one backward pass.

While B = 0 the adapters do not change the forward pass, so one pass over a batch serves every instance in it. With x_t
the input and δ_t the loss gradient at the output of an adapted matrix, ∂L/∂B = (alpha / r) Σ_t δ_t (A x_t)ᵀ, and the
first AdamW step is B₁ = −lr · g / (|g| + eps), elementwise: m̂ = g and v̂ = g² after the bias correction. A's gradient is
zero while B = 0, so A only shrinks by the weight decay and its direction stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmatch.curator import start
from repmatch.datamodels import Layout, Space
from repmatch.errors import ModelError

# A singular value below this share of the largest one counts as zero: its direction is rounding noise. It happens:
# the loss reaches the last layer's query through the first token alone, so that gradient has rank one, and what the
# step's eps adds to it is of this size.
_RANK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class BatchFactors:
    """Factors of one batch, in the batch's order; see `repmatch.datamodels.FactorBatch` for the fields."""

    values: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    norms: NDArray[np.float32]
    losses: NDArray[np.float32]


class FactorEngine:
    """Computes instance factors of one space with one frozen model.

    Args:
        module: the frozen model at the shared start, in evaluation mode.
        space: the space; its matrices name modules of `module`.
        loss: maps (module, inputs) to the loss of each instance, (n,) float32.
        device: where to compute.
    """

    def __init__(
        self,
        module: nn.Module,
        space: Space,
        loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
        device: str = "cpu",
    ) -> None:
        self.module = module.to(device)
        self.space = space
        self.device = torch.device(device)
        self._loss = loss
        self._scaling = space.alpha / space.rank
        a = {m.name: start.draw_a(space.seed, m.name, space.rank, m.d_in) for m in space.matrices}
        self._a = {name: torch.from_numpy(value).to(self.device) for name, value in a.items()}
        # ΔW = B·A = (B·Rᵀ)·Qᵀ with Aᵀ = Q·R: B·Rᵀ has the left singular vectors and values of ΔW.
        self._rt = {
            name: torch.linalg.qr(value.T.double().cpu()).R.T.to(self.device) for name, value in self._a.items()
        }
        self._gradients: dict[str, Tensor] = {}

    @property
    def layout(self) -> Layout:
        """How the factors lie in a flat row."""
        return self.space.layout

    def gradients(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Compute ∂L/∂B of each instance at the shared start.

        Args:
            inputs: what the model takes, first dimension n.

        Returns:
            Matrix name -> (n, d_out, r) float32, and the losses (n,) float32.
        """
        self._gradients = {}
        moved = {k: v.to(self.device) for k, v in inputs.items()}
        with torch.enable_grad(), self._hooks():
            losses = self._loss(self.module, moved)
            if losses.requires_grad:
                # The sum, not the mean: each instance's gradient must be that of a batch of one.
                torch.autograd.backward(losses.sum())
        rank, count = self.space.rank, len(losses)
        for matrix in self.space.matrices:
            if matrix.name not in self._gradients:
                self._gradients[matrix.name] = torch.zeros(count, matrix.d_out, rank, device=self.device)
        gradients, self._gradients = self._gradients, {}
        return gradients, losses.detach().float()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        modules = dict(self.module.named_modules())
        handles = []
        try:
            for matrix in self.space.matrices:
                hook = partial(self._watch, matrix.name)
                handles.append(modules[matrix.name].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        projected = (args[0].detach() @ self._a[name].T) * self._scaling
        if not output.requires_grad:
            # Below the first adapted matrix nothing needs a gradient, so backward ends here.
            output = output.detach().requires_grad_(True)
        output.register_hook(partial(self._collect, name, projected))  # type: ignore[no-untyped-call]
        return output

    def _collect(self, name: str, projected: Tensor, delta: Tensor) -> None:
        count = delta.shape[0]
        delta = delta.reshape(count, -1, delta.shape[-1])
        part = delta.transpose(1, 2) @ projected.reshape(count, -1, projected.shape[-1])
        # A matrix used several times in one pass has one gradient: the sum.
        self._gradients[name] = self._gradients[name] + part if name in self._gradients else part

    def compute(self, inputs: Mapping[str, Tensor]) -> BatchFactors:
        """Compute the instance factors of a batch.

        Args:
            inputs: what the model takes, first dimension n.

        Returns:
            The factors, in the batch's order. A loss that is not finite gives factors that are not finite.
        """
        gradients, losses = self.gradients(inputs)
        steps = {name: first_step(g, self.space.optimizer) for name, g in gradients.items()}
        values: list[Tensor] = []
        cores: list[Tensor] = []
        for matrix in self.space.matrices:
            if self.space.rank == 1:
                values.append(unit_rows(steps[matrix.name][:, :, 0])[0])
            else:
                columns, core = left_singular(steps[matrix.name].double() @ self._rt[matrix.name])
                values.append(columns.flatten(1).float())
                cores.append(core.float())
        norms = torch.stack([unit_rows(gradients[m.name].flatten(1))[1] for m in self.space.matrices], dim=1)
        return BatchFactors(
            values=torch.cat(values, dim=1).cpu().numpy(),
            cores=torch.stack(cores, dim=1).cpu().numpy() if cores else None,
            norms=norms.cpu().numpy(),
            losses=losses.cpu().numpy(),
        )


def first_step(gradient: Tensor, optimizer: Mapping[str, Any]) -> Tensor:
    """Return B after the optimiser's first step from B = 0.

    AdamW (Loshchilov and Hutter 2019): after the bias correction of the first step m̂ = g and v̂ = g², and weight decay
    does nothing to B = 0.

    Args:
        gradient: ∂L/∂B, any shape.
        optimizer: "name", "lr", "eps".

    Returns:
        B₁, same shape.

    Raises:
        ModelError: the optimiser is none that is known.
    """
    if optimizer["name"] != "adamw":
        raise ModelError(f"the instance step {optimizer['name']!r} is unknown; expected 'adamw'.")
    return -float(optimizer["lr"]) * gradient / (gradient.abs() + float(optimizer["eps"]))


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into directions and norms; squares of very small or large numbers leave the range of float32.

    Args:
        x: (n, d).

    Returns:
        (n, d) unit rows (zeros where the row is zero), and (n,) norms.
    """
    tiny = torch.finfo(x.dtype).tiny
    peak = x.abs().amax(dim=1, keepdim=True)
    scaled = x / peak.clamp_min(tiny)
    norm = scaled.norm(dim=1, keepdim=True)
    return scaled / norm.clamp_min(tiny), (norm * peak.clamp_min(tiny))[:, 0]


def left_singular(m: Tensor) -> tuple[Tensor, Tensor]:
    """Split matrices into left singular vectors and the rest, through the small Gram matrix.

    Args:
        m: (n, d, r) float64.

    Returns:
        (n, d, r) orthonormal columns in order of falling singular value (zero columns where the singular value is
        zero), and (n, r, r) with columns @ core = m / |m|. A matrix that is not finite gives NaN.
    """
    # One NaN would make the decomposition of the whole batch fail.
    broken = ~m.flatten(1).isfinite().all(dim=1)[:, None, None]
    m = m.masked_fill(broken, 0.0)
    m = m / m.flatten(1).norm(dim=1).clamp_min(torch.finfo(m.dtype).tiny)[:, None, None]
    values, vectors = torch.linalg.eigh(m.transpose(1, 2) @ m)
    singular = values.flip(1).clamp_min(0).sqrt()
    vectors = vectors.flip(2)
    keep = singular > _RANK_TOLERANCE * singular[:, :1].clamp_min(torch.finfo(m.dtype).tiny)
    columns = (m @ vectors) * torch.where(keep, 1 / singular.clamp_min(1e-30), torch.zeros_like(singular))[:, None, :]
    # One more QR keeps nearly parallel columns orthonormal; its R is the identity up to signs and rounding.
    q, r = torch.linalg.qr(columns)
    columns = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None, :]
    columns = columns * keep[:, None, :]
    core = columns.transpose(1, 2) @ m
    return columns.masked_fill(broken, torch.nan), core.masked_fill(broken, torch.nan)


def batches_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group instances of similar length into batches of at most `limit` padded tokens.

    Args:
        lengths: tokens of each instance.
        limit: padded tokens a batch may hold; a longer instance is a batch of its own.

    Returns:
        Positions in `lengths`, batch after batch, shortest first; ties by position.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[i] * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
