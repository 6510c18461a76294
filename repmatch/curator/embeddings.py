"""Mean-pooled embeddings of the base model: what a text is about. They need no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import UsageError
from repmatch.store.cache import CachedRows, gathered

if TYPE_CHECKING:
    from repmatch.curator.classification import Example
    from repmatch.curator.curator import Curator
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Space

CHUNK = 4096  # rows that are embedded and kept at a time


def embedder(curator: Curator, dataset: str) -> Callable[[tuple[str, ...]], NDArray[np.float32]]:
    """Return a function that embeds instances of a dataset with its base model.

    Args:
        curator: the curator; its settings say where to compute.
        dataset: its name.

    Returns:
        Maps n ids to (n, d) float32 unit rows.
    """
    return partial(embeddings, curator, dataset)


def embeddings(curator: Curator, dataset: str, ids: Sequence[str]) -> NDArray[np.float32]:
    """Return the embeddings of instances, from the store where they were asked for before.

    The first call embeds the whole dataset and keeps the rows in the store's `cache` folder; a call that was
    interrupted goes on where it was. They are made by the base model as it came, whatever the start of the space.

    Args:
        curator: the curator; its settings say where to compute.
        dataset: its name.
        ids: n ids of it.

    Returns:
        (n, d) float32 rows of unit length; the whole dataset in its order is a map of the file, not a copy.

    Raises:
        UnknownNameError: no such dataset.
        UsageError: the model has no hidden states to take a mean of.
    """
    store = curator.store
    space, everything = curator.trainer.space_of(dataset), store.ids(dataset)
    cached = CachedRows(store.path, dataset, [_reads(space), store.fingerprint(dataset)])
    rows = cached.read(len(everything))
    if rows is None:
        rows = _computed(curator, dataset, space, everything, cached)
    if list(ids) == everything:
        return rows
    place = {name: at for at, name in enumerate(everything)}
    picked: NDArray[np.float32] = rows[[place[name] for name in ids]]
    return picked


def _computed(
    curator: Curator, dataset: str, space: Space, ids: Sequence[str], cached: CachedRows
) -> NDArray[np.float32]:
    from repmatch.curator.workbench import Workbench

    store, known = curator.store, curator.store.dataset(dataset)
    bench = Workbench.of_space(space, curator.settings)
    task = bench.task(known.labels, known.fields)

    def make(done: int) -> Iterator[NDArray[np.float32]]:
        for lo in range(done, len(ids), CHUNK):
            some = ids[lo : lo + CHUNK]
            yield embed(bench, known.labels, task, task.encode(list(store.tasks(dataset, ids=some))))
            if curator.progress is not None:
                curator.progress(f"embedding {dataset}", lo + len(some), len(ids))

    width = _width(bench, known.labels)
    return gathered(width, make) if store.mode == "r" else cached.fill(len(ids), width, make)


def _reads(space: Space) -> list[object]:
    """Return what of a space decides embeddings."""
    return [space.model_fingerprint, space.tokenizer_fingerprint, space.task, space.template, space.max_length]


def _width(bench: Workbench, labels: Sequence[str]) -> int:
    module: Any = bench.module(len(labels))
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    if not hasattr(module, "base_model") or not isinstance(width, int):
        raise UsageError(
            f"embeddings are the mean of a transformer's hidden states, and {bench.space.model} has none; leave out "
            "--kernel and what is named embeddings or joined."
        )
    return width


def embed(bench: Workbench, labels: Sequence[str], task: Any, examples: Sequence[Example]) -> NDArray[np.float32]:
    """Return the mean of each instance's last hidden states over its tokens, as unit rows.

    Args:
        bench: the base model.
        labels: every label.
        task: the dataset's `repmatch.curator.tasks.Task`.
        examples: n instances, tokenised.

    Returns:
        (n, d) float32.

    Raises:
        UsageError: the model has no hidden states to take a mean of.
    """
    import torch

    from repmatch.curator.batches import batches_by_tokens

    out = np.zeros((len(examples), _width(bench, labels)), np.float32)
    module: Any = bench.module(len(labels))
    device = next(module.parameters()).device
    with torch.inference_mode():
        for at in batches_by_tokens([example.tokens for example in examples], bench.batch_tokens):
            batch = {name: value.to(device) for name, value in task.collate([examples[i] for i in at]).items()}
            del batch["labels"]
            hidden = module.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float() if "attention_mask" in batch else torch.ones_like(hidden)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            out[at] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
    return out
