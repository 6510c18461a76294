"""The workbench: a base model made ready for one space. Loading it is what costs seconds, so it is shared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from repmatch.compiled import thread_count
from repmatch.curator import base_models, classification, targets
from repmatch.curator.classification import SequenceClassification
from repmatch.curator.engine import FactorEngine
from repmatch.curator.optimizers import instance_step
from repmatch.curator.quantised import make_ready
from repmatch.curator.settings import (
    DEFAULT_ALPHA,
    DEFAULT_MAX_LENGTH,
    DEFAULT_MAX_LENGTHS,
    DEFAULT_RANK,
    Settings,
)
from repmatch.curator.tasks import OwnModel, causal, images, masked, regression
from repmatch.curator.warm import merged, warm_adapter
from repmatch.datamodels import Adapter, Fields, Space, digest
from repmatch.errors import SpaceMismatchError, StoreError, UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from repmatch.store import Store

OWN = "own:"
# Tasks whose head has a row a label; a model for any other is the same whatever the labels.
_CLASSED = frozenset([classification.NAME, images.NAME])
# Padded tokens a batch on the CPU: measured best of 512 to 8192 for the embedded model (activations stay in the cache).
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 65536


def pick_device(name: str | None) -> str:
    """Turn a device option into a torch device.

    Args:
        name: "auto" or None, "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        The device's name; auto prefers cuda, then mps, then cpu.

    Raises:
        UsageError: the device is not on this machine.
    """
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    assert name is not None
    kind = name.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise UsageError(f"the device {name!r} is not usable on this machine; leave --device out or use --device cpu.")
    number = name.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name!r}: this machine has {torch.cuda.device_count()}, numbered from cuda:0. Name "
            "one of these, or leave --device out."
        )
    return name


@dataclass(frozen=True)
class Workbench:
    """A base model, its tokenizer and the space they make.

    Attributes:
        model: the base model's files, or the user's own module and task.
        space: the space.
        device: where to compute.
        batch_tokens: padded tokens a batch may hold.
        warm: the adapter that the space starts from, None for a cold start.
        fits_memory: whether the batch size may be changed to what the device's memory holds.
    """

    model: base_models.BaseModel | OwnModel
    space: Space
    device: str
    batch_tokens: int
    warm: Adapter | None = None
    fits_memory: bool = False

    @classmethod
    def build(cls, settings: Settings, form: str | None = None) -> Workbench:
        """Make the workbench that settings describe; the start is cold whatever they say of a warm one.

        Args:
            settings: base model, task, rank, targets and so on; None means the default.
            form: what the rows hold, "messages" for conversations.

        Returns:
            The workbench; but for a warm start the space's identity is final.
        """
        limit_threads()
        device = pick_device(settings.device)
        seed = settings.seed or 0
        model, parts = _own_parts(settings) if settings.own is not None else _parts(settings, form)
        space = Space(
            **parts,
            rank=settings.rank or DEFAULT_RANK,
            alpha=settings.alpha or DEFAULT_ALPHA,
            seed=seed,
            optimizer=instance_step(settings.optimizer, settings.learning_rate, settings.steps),
        )
        tokens = settings.batch_tokens or default_batch_tokens(device)
        return cls(model, space, device, tokens, fits_memory=settings.batch_tokens is None)

    @classmethod
    def of_space(cls, space: Space, settings: Settings, store: Store | None = None) -> Workbench:
        """Make the workbench of a space that a store already holds.

        Args:
            space: the stored space.
            settings: where to find the model now (None: where it was), device and batch size.
            store: where a warm start is kept; without it only the cold model can be had.

        Returns:
            The workbench of exactly that space.

        Raises:
            SpaceMismatchError: the model or tokenizer found is not the one of the space.
            UsageError: the space is of a user's own module, which was not given.
        """
        limit_threads()
        model: base_models.BaseModel | OwnModel
        if settings.own is not None:
            model = settings.own
            prints = {"model_fingerprint": model.fingerprint, "tokenizer_fingerprint": model.task_fingerprint}
        else:
            _refuse_own(space.model)
            model = base_models.find_model(settings.model if isinstance(settings.model, str) else space.model)
            prints = {"model_fingerprint": model.fingerprint, "tokenizer_fingerprint": _reader_print(model, space.task)}
        found = replace(space, **prints)  # type: ignore[arg-type]
        if found.id != space.id:
            raise SpaceMismatchError(
                f"the model at {model.name} is not the one this space was made with; point --model to the original.",
                space.differences(found),
            )
        device = pick_device(settings.device)
        warm = None if store is None or space.warm_start is None else warm_adapter(store, space.warm_start)
        return cls(model, space, device, settings.batch_tokens or default_batch_tokens(device), warm)

    def from_warm(self, warm: Adapter) -> Workbench:
        """Return the workbench of the same space, started from an adapter."""
        return replace(self, space=replace(self.space, warm_start=warm.id), warm=warm)

    def task(self, labels: Sequence[str], fields: Fields | None = None) -> Any:
        """Return the task for a dataset.

        Args:
            labels: its labels.
            fields: its columns; needed for conversations and images.

        Returns:
            A `repmatch.curator.tasks.Task`.
        """
        space = self.space
        if isinstance(self.model, OwnModel):
            own = copy.copy(self.model.task)
            own.labels = tuple(labels)
            return own
        if space.task == images.NAME:
            return images.ImageClassification(
                _pixels(self.model), labels, images.COLUMN if fields is None else fields.text_field
            )
        tokenizer = _tokenizer(self.model)
        if space.task == causal.NAME:
            columns = (fields.text_field, fields.text_pair_field) if fields and fields.form == "messages" else ()
            return causal.CausalLanguage(tokenizer, space.template, space.max_length, *columns)
        if space.task == masked.NAME:
            return masked.MaskedLanguage(tokenizer, space.max_length, space.seed)
        if space.task == regression.NAME:
            return regression.TextRegression(tokenizer, space.max_length)
        return SequenceClassification(tokenizer, labels, space.max_length)

    def module(self, labels: int) -> nn.Module:
        """Return the frozen base model with a head of so many labels, on the device; cold, whatever the space's start.

        Args:
            labels: number of labels; 0 or more where the task has none.

        Returns:
            The model, shared by all callers: leave it as it was.
        """
        if isinstance(self.model, OwnModel):
            own = make_ready(_layer_by_layer(self.model.module.eval().requires_grad_(False)))
            return own.to(self.device)
        count = labels if self.space.task in _CLASSED else 2
        return _module(self.model, self.space.task, count, self.space.seed).to(self.device)

    def start(self, labels: Sequence[str]) -> nn.Module:
        """Return the frozen model at the space's start: the base model, or with the warm start merged into it.

        Args:
            labels: the dataset's labels.

        Returns:
            The model on the device.

        Raises:
            StoreError: the space starts from an adapter that is not at hand.
        """
        cold = self.module(len(labels))
        if self.space.warm_start is None:
            return cold
        if self.warm is None:
            raise StoreError(
                f"the space starts from the adapter {self.space.warm_start}, which is not at hand; open the store that "
                "holds it."
            )
        return merged(cold, self.warm, labels)

    def engine(self, labels: int | Sequence[str], task: Any = None) -> FactorEngine:
        """Return the factor engine of the space's start.

        Args:
            labels: the dataset's labels; a number will do for a cold start.
            task: the task, where it is at hand; None: made of the labels.

        Returns:
            The engine.
        """
        names = [str(i) for i in range(labels)] if isinstance(labels, int) else list(labels)
        return FactorEngine(self.start(names), self.space, (task or self.task(names)).losses, self.device)


def _layer_by_layer(module: nn.Module) -> nn.Module:
    """Let torch's encoders call their layers and keep padded rows as they are.

    Once frozen they would pack rows of unlike length into a nested tensor and run each layer as one operation, past
    what adapts its parts.
    """
    for part in module.modules():
        if isinstance(part, torch.nn.TransformerEncoder):
            part.use_nested_tensor = False
        if isinstance(part, torch.nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # asked for by the one operation alone
    return module


def _parts(settings: Settings, form: str | None) -> tuple[base_models.BaseModel, dict[str, Any]]:
    """The base model and the fields of the space that come from it."""
    assert settings.model is None or isinstance(settings.model, str)
    _refuse_own(settings.model)
    model = base_models.find_model(settings.model)
    task = settings.kind.name
    # Two labels are enough to find the matrices: they do not depend on the head.
    module = _module(model, task, 2, settings.seed or 0)
    if task == images.NAME:
        template, length = _pixels(model).template, 0
    else:
        template = _template(task, settings.template, form)
        length = _max_length(settings.max_length, model, _tokenizer(model).model_max_length, task)
    return model, {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "tokenizer_fingerprint": _reader_print(model, task),
        "task": task,
        "template": template,
        "max_length": length,
        "matrices": targets.find_matrices(module, settings.targets, settings.layers),
    }


def _refuse_own(name: str | None) -> None:
    if name is not None and name.startswith(OWN):
        raise UsageError(
            f"this space was made with the module {name.removeprefix(OWN)!r} of the user's own, which only Python can "
            "give: repmatch.Curator(store, settings=repmatch.Settings(model=OwnModel(module, task)))."
        )


def _own_parts(settings: Settings) -> tuple[OwnModel, dict[str, Any]]:
    own = settings.own
    assert own is not None
    return own, {
        "model": OWN + own.name,
        "model_fingerprint": own.fingerprint,
        "tokenizer_fingerprint": own.task_fingerprint,
        "task": own.task.name,
        "template": own.task.template,
        "max_length": settings.max_length or 0,
        "matrices": targets.find_matrices(own.module, settings.targets, settings.layers),
    }


def _template(task: str, asked: str | None, form: str | None) -> str:
    if task == causal.NAME:
        chat = form == "messages" if asked is None else asked == "chat"
        if form == "messages" and not chat:
            raise UsageError("--template plain goes with a prompt and a completion; messages need the chat template.")
        return causal.CHAT if chat else causal.PLAIN
    if asked is not None:
        raise UsageError(f"--template goes with --task {causal.NAME}, not with {task}.")
    return masked.TEMPLATE if task == masked.NAME else classification.TEMPLATE


def _reader_print(model: base_models.BaseModel, task: str) -> str:
    """Fingerprint of what reads the rows: the tokenizer (and its chat template), or how pixels are read."""
    if task == images.NAME:
        return digest(_pixels(model).template, size=32)
    tokenizer = _tokenizer(model)
    found = base_models.tokenizer_fingerprint(tokenizer)
    if task == causal.NAME and tokenizer.chat_template:
        return digest([found, tokenizer.chat_template], size=32)
    return found


def limit_threads() -> None:
    """Let torch use the threads that were asked for, or the cores this process may run on, and no more."""
    torch.set_num_threads(thread_count())


def default_batch_tokens(device: str) -> int:
    """Return the padded tokens a batch holds unless told otherwise."""
    return CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS


def _max_length(asked: int | None, model: base_models.BaseModel, tokenizer_limit: int, task: str) -> int:
    limit = tokenizer_limit
    positions = model.config.get("max_position_embeddings") or model.config.get("n_positions")
    if positions:
        # RoBERTa and its kin number positions from the padding id on, so the first ones are never used.
        offset = int(model.config.get("pad_token_id") or 0) + 1 if "roberta" in model.config["model_type"] else 0
        limit = min(limit, int(positions) - offset)
    if asked is None:
        return min(DEFAULT_MAX_LENGTHS.get(task, DEFAULT_MAX_LENGTH), limit)
    if not 3 <= asked <= limit:
        raise UsageError(f"--max-length {asked} is out of range; {model.name} reads 3 to {limit} tokens.")
    return asked


@lru_cache(maxsize=4)
def _tokenizer(model: base_models.BaseModel) -> PreTrainedTokenizerBase:
    return base_models.load_tokenizer(model)


@lru_cache(maxsize=2)
def _module(model: base_models.BaseModel, task: str, labels: int, seed: int) -> nn.Module:
    module: Any = base_models.load_module(model, task, labels, seed)
    if task != images.NAME and getattr(module.config, "pad_token_id", None) is None:
        module.config.pad_token_id = _tokenizer(model).pad_token_id  # a decoder's head reads the last token before it
    return make_ready(module)


@lru_cache(maxsize=4)
def _pixels(model: base_models.BaseModel) -> images.Pixels:
    path = model.folder / "preprocessor_config.json"
    processor = base_models.json_file(path) if path.exists() else {}
    return images.Pixels.of_model(model.config, processor)
