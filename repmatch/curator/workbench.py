"""The workbench: a base model made ready for one space. Loading it is what costs seconds, so it is shared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from repmatch.curator import base_models, classification, targets
from repmatch.curator.classification import SequenceClassification
from repmatch.curator.engine import FactorEngine
from repmatch.curator.settings import DEFAULT_ALPHA, DEFAULT_MAX_LENGTH, DEFAULT_RANK, Settings
from repmatch.datamodels import Space
from repmatch.errors import SpaceMismatchError, UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Padded tokens a batch on the CPU: measured best of 512 to 8192 for the embedded model (activations stay in the cache).
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 65536
# The AdamW step of an instance adapter: the reference procedure's learning rate, torch's eps.
INSTANCE_STEP = {"name": "adamw", "lr": 1e-3, "eps": 1e-8}


def pick_device(name: str | None) -> str:
    """Turn a device option into a torch device.

    Args:
        name: "auto" or None, "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        The device's name; auto prefers cuda, then mps, then cpu.

    Raises:
        UsageError: the device is unknown or not on this machine.
    """
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    assert name is not None
    kind = name.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise UsageError(f"the device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps.")
    if not there[kind]:
        raise UsageError(f"the device {name!r} is not usable on this machine; leave --device out or use --device cpu.")
    return name


@dataclass(frozen=True)
class Workbench:
    """A base model, its tokenizer and the space they make.

    Attributes:
        model: the base model's files.
        space: the space.
        device: where to compute.
        batch_tokens: padded tokens a batch may hold.
    """

    model: base_models.BaseModel
    space: Space
    device: str
    batch_tokens: int

    @classmethod
    def build(cls, settings: Settings) -> Workbench:
        """Make the workbench that settings describe.

        Args:
            settings: base model, rank, targets and so on; None means the default.

        Returns:
            The workbench; the space's identity is final.
        """
        limit_threads()
        model = base_models.find_model(settings.model)
        tokenizer = _tokenizer(model)
        # Two labels are enough to find the matrices: they do not depend on the head.
        seed = settings.seed or 0
        module = _classifier(model, 2, seed)
        space = Space(
            model=model.name,
            model_fingerprint=model.fingerprint,
            tokenizer_fingerprint=base_models.tokenizer_fingerprint(tokenizer),
            task=classification.NAME,
            template=classification.TEMPLATE,
            max_length=_max_length(settings.max_length, model, tokenizer.model_max_length),
            rank=settings.rank or DEFAULT_RANK,
            alpha=settings.alpha or DEFAULT_ALPHA,
            seed=seed,
            matrices=targets.find_matrices(module, settings.targets),
            optimizer=INSTANCE_STEP,
        )
        device = pick_device(settings.device)
        return cls(model, space, device, settings.batch_tokens or default_batch_tokens(device))

    @classmethod
    def of_space(cls, space: Space, settings: Settings) -> Workbench:
        """Make the workbench of a space that a store already holds.

        Args:
            space: the stored space.
            settings: where to find the model now (None: where it was), device and batch size.

        Returns:
            The workbench of exactly that space.

        Raises:
            SpaceMismatchError: the model or tokenizer found is not the one of the space.
        """
        limit_threads()
        model = base_models.find_model(settings.model or space.model)
        found = replace(
            space,
            model_fingerprint=model.fingerprint,
            tokenizer_fingerprint=base_models.tokenizer_fingerprint(_tokenizer(model)),
        )
        if found.id != space.id:
            raise SpaceMismatchError(
                f"the model at {model.name} is not the one this space was made with; point --model to the original.",
                space.differences(found),
            )
        device = pick_device(settings.device)
        return cls(model, space, device, settings.batch_tokens or default_batch_tokens(device))

    def task(self, labels: Sequence[str]) -> SequenceClassification:
        """Return the task for a dataset's labels."""
        return SequenceClassification(_tokenizer(self.model), labels, self.space.max_length)

    def module(self, labels: int) -> nn.Module:
        """Return the frozen model with a head of so many labels, on the device."""
        return _classifier(self.model, labels, self.space.seed).to(self.device)

    def engine(self, labels: int) -> FactorEngine:
        """Return the factor engine for a head of so many labels."""
        return FactorEngine(self.module(labels), self.space, classification.losses, self.device)


def limit_threads() -> None:
    """Let torch use the cores this process may run on, and no more."""
    torch.set_num_threads(
        max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )


def default_batch_tokens(device: str) -> int:
    """Return the padded tokens a batch holds unless told otherwise."""
    return CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS


def _max_length(asked: int | None, model: base_models.BaseModel, tokenizer_limit: int) -> int:
    limit = tokenizer_limit
    positions = model.config.get("max_position_embeddings")
    if positions:
        # RoBERTa and its kin number positions from the padding id on, so the first ones are never used.
        offset = int(model.config.get("pad_token_id") or 0) + 1 if "roberta" in model.config["model_type"] else 0
        limit = min(limit, int(positions) - offset)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit)
    if not 3 <= asked <= limit:
        raise UsageError(f"--max-length {asked} is out of range; {model.name} reads 3 to {limit} tokens.")
    return asked


@lru_cache(maxsize=4)
def _tokenizer(model: base_models.BaseModel) -> PreTrainedTokenizerBase:
    return base_models.load_tokenizer(model)


@lru_cache(maxsize=2)
def _classifier(model: base_models.BaseModel, labels: int, seed: int) -> nn.Module:
    return base_models.load_classifier(model, labels, seed)
