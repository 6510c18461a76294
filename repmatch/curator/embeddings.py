"""Mean-pooled embeddings of the base model: the baseline that needs no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from repmatch.curator.engine import batches_by_tokens

if TYPE_CHECKING:
    from repmatch.curator.classification import Example
    from repmatch.curator.curator import Curator
    from repmatch.curator.workbench import Workbench


def embedder(curator: Curator, dataset: str) -> Callable[[tuple[str, ...]], NDArray[np.float32]]:
    """Return a function that embeds instances of a dataset with its base model.

    Args:
        curator: the curator; its settings say where to compute.
        dataset: its name.

    Returns:
        Maps n ids to (n, d) float32 unit rows.
    """
    from repmatch.curator.workbench import Workbench

    def make(ids: tuple[str, ...]) -> NDArray[np.float32]:
        bench = Workbench.of_space(curator.trainer.space_of(dataset), curator.settings)
        known = curator.store.dataset(dataset)
        rows = list(curator.store.tasks(dataset, ids=list(ids)))
        return embed(bench, known.labels, bench.task(known.labels, known.fields).encode(rows))

    return make


def embed(bench: Workbench, labels: Sequence[str], examples: Sequence[Example]) -> NDArray[np.float32]:
    """Return the mean of each instance's last hidden states over its tokens, as unit rows.

    Args:
        bench: the base model.
        labels: every label.
        examples: n instances, tokenised.

    Returns:
        (n, d) float32.
    """
    module: Any = bench.module(len(labels))
    task = bench.task(labels)
    device = next(module.parameters()).device
    out = np.zeros((len(examples), int(module.config.hidden_size)), np.float32)
    with torch.inference_mode():
        for at in batches_by_tokens([example.tokens for example in examples], bench.batch_tokens):
            batch = {name: value.to(device) for name, value in task.collate([examples[i] for i in at]).items()}
            del batch["labels"]
            hidden = module.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            out[at] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
    return out
