"""The reference procedure of the paper, literally: the slow oracle that the engine is tested against.

For every instance: reload the shared start, batch of one, one AdamW step on peft's own LoRA layers, ΔW, full SVD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator import start
from repmatch.datamodels import Space


def peft_start(module: nn.Module, space: Space) -> nn.Module:
    """Wrap a copy of the model with peft's LoRA layers at the space's start."""
    config = LoraConfig(
        r=space.rank, lora_alpha=space.alpha, lora_dropout=0.0, target_modules=[m.name for m in space.matrices]
    )
    wrapped = get_peft_model(copy.deepcopy(module), config)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
        for matrix in space.matrices:
            if f".{matrix.name}.lora_A" in name:
                a = torch.from_numpy(start.draw_a(space.seed, matrix.name, space.rank, matrix.d_in))
                parameter.data.copy_(a.reshape(parameter.shape))
    return wrapped.eval()


def literal_deltas(
    module: nn.Module, space: Space, batches: Sequence[Mapping[str, Tensor]]
) -> list[list[NDArray[np.float64]]]:
    """Return ΔW (d_out, d_in) per matrix for each batch of one, after one AdamW step from the start."""
    wrapped = peft_start(module, space)
    state = {name: value.clone() for name, value in wrapped.state_dict().items()}
    out = []
    for batch in batches:
        wrapped.load_state_dict(state)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=space.optimizer["lr"], eps=space.optimizer["eps"])
        optimizer.zero_grad()
        logits = wrapped(**{k: v for k, v in batch.items() if k != "labels"}).logits
        functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
        deltas = []
        modules = dict(wrapped.base_model.model.named_modules())
        for matrix in space.matrices:
            layer = modules[matrix.name]
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            deltas.append((layer.scaling["default"] * (b.double() @ a.double())).detach().numpy())
        out.append(deltas)
    return out


def literal_phi(delta_1: NDArray[np.float64], delta_2: NDArray[np.float64], i: int, j: int) -> float:
    """φ(i, j) of two ΔW by full d x d SVDs (Hu et al. 2021, section 7.2)."""
    u1, u2 = np.linalg.svd(delta_1)[0], np.linalg.svd(delta_2)[0]
    return float(np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2 / min(i, j))


def literal_adapters(
    module: nn.Module,
    space: Space,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
) -> list[dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Return A and B as matrices after the space's steps by peft and torch's optimiser, one instance at a time."""
    optimizers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    step = space.optimizer
    out = []
    for batch in batches:
        wrapped = peft_start(module, space)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = optimizers[step["name"]](trained, **{k: step[k] for k in ("lr", "eps") if k in step})
        for _ in range(step.get("steps", 1)):
            optimizer.zero_grad()
            loss(wrapped, batch).sum().backward()
            optimizer.step()
        layers = dict(wrapped.base_model.model.named_modules())
        found = {}
        for matrix in space.matrices:
            a, b = (layers[matrix.name].lora_A["default"].weight, layers[matrix.name].lora_B["default"].weight)
            found[matrix.name] = tuple(w.detach().double().reshape(len(w), -1).numpy() for w in (a, b))
        out.append(found)
    return out
