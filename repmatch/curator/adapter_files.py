"""Subset adapters out of the store as peft checkpoints, and LoRA checkpoints into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.curator.card import prose
from repmatch.curator.destination import check_outside
from repmatch.curator.export import versions
from repmatch.curator.lora import WEIGHTS, Lora, as_adapter, is_path, of_adapter, read_lora
from repmatch.datamodels import Adapter, Space
from repmatch.errors import InputError, RepMatchError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from repmatch.curator.subsets import Trainer
    from repmatch.store import Store

RECORD = "repmatch.json"
_WRITTEN = {RECORD, WEIGHTS, "adapter_config.json", "README.md"}
_EMBEDDED_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class ExportedAdapter:
    """A peft checkpoint that was written.

    Attributes:
        folder: where.
        base: the base model to load first.
        labels: the labels, in the order of the head's rows.
        saved_modules: whole modules that the checkpoint brings beside LoRA: the head, and a pooler.
        bytes: size of the weights.
    """

    folder: Path
    base: str
    labels: tuple[str, ...]
    saved_modules: tuple[str, ...]
    bytes: int


def export_adapter(trainer: Trainer, name: str, folder: Path, *, replace: bool = False) -> ExportedAdapter:
    """Write a subset adapter as a peft checkpoint, trained first where it is not in the store.

    The head that scores are made with is drawn from the space's seed and is in no published checkpoint, so it goes into
    the file too (peft's `modules_to_save`), and so does the pooler, which some checkpoints lack. Where the space has a
    warm start, its factors stand beside the subset's in one adapter of the summed rank, with the trained head.

    Args:
        trainer: gives the adapter.
        name: a dataset, subset, coreset or DATASET[SQL].
        folder: the folder to write; it appears whole or not at all.
        replace: whether an existing folder may be replaced, which must hold an exported adapter and nothing else.

    Returns:
        What was written.

    Raises:
        UsageError: the folder is there already, its parent is not, it lies in a store, or the adapter was imported.
        RepMatchError: it cannot be written.
    """
    if _imported_of(trainer.store, name) is not None:
        raise UsageError(f"{name!r} was imported and has no head to go with it; use the checkpoint that it came from.")
    if folder.exists() and not (replace and _is_ours(folder)):
        more = "" if not replace else " and does not hold what this command writes and nothing else"
        raise UsageError(f"{folder} is there already{more}; name another folder with -o.")
    check_outside(folder, trainer.store)
    if not folder.parent.is_dir():
        raise UsageError(f"there is no folder {folder.parent}; make it first: mkdir -p {folder.parent}")
    dataset = trainer.store.resolve(name).dataset
    space, labels = trainer.space_of(dataset), trainer.store.dataset(dataset).labels
    adapter = trainer.adapter(name)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        written = _write(trainer, adapter, space, labels, part)
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)  # noqa: PTH104 -- Path.rename would do the same
    except OSError as error:
        raise RepMatchError(
            f"{folder} cannot be written: {error.strerror or error}; choose another place with -o."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ExportedAdapter(folder, hub_name(space), labels, written, (folder / WEIGHTS).stat().st_size)


def _is_ours(folder: Path) -> bool:
    if folder.is_symlink() or not ((folder / RECORD).is_file() and (folder / WEIGHTS).is_file()):
        return False
    return {entry.name for entry in folder.iterdir()} <= _WRITTEN


def hub_name(space: Space) -> str:
    """Return the name under which others find a space's base model.

    Args:
        space: the space.

    Returns:
        The model's name; for the packaged one that of the same weights on the hub.
    """
    return _EMBEDDED_HUB_NAME if space.model == "embedded" else space.model


def _write(trainer: Trainer, adapter: Adapter, space: Space, labels: Sequence[str], folder: Path) -> tuple[str, ...]:
    from repmatch.curator.workbench import Workbench

    bench = Workbench.of_space(space, trainer.settings, trainer.store)
    module = bench.start(labels)
    saved = saved_modules(module)
    whole, shape = (adapter, space) if bench.warm is None else _on_top(adapter, space, bench.warm)
    _save_with_peft(module, whole, shape, saved, folder)
    about = {
        "format": "repmatch-adapter-1",
        "subset": adapter.subset,
        "labels": list(labels),
        "adapter": adapter.id,
        "space": {"id": space.id, "model": space.model, **space.identity},
        "recipe": dict(adapter.recipe),
        "record": dict(adapter.record),
        "versions": versions(),
    }
    (folder / RECORD).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(adapter, space, labels), encoding="utf-8")
    return saved


def _on_top(adapter: Adapter, space: Space, warm: Adapter) -> tuple[Adapter, Space]:
    """Return an adapter that does to the cold base what another does to the base with a warm start merged into it.

    Side by side, ΔW + ΔW' = [s·B | s'·B'] [A; A'], with s = alpha / r of each.
    """
    scale, own = space.alpha / space.rank, float(warm.recipe["alpha"]) / int(warm.recipe["rank"])
    a = {name: np.concatenate((value, warm.a[name])) for name, value in adapter.a.items()}
    b = {name: np.concatenate((scale * value, own * warm.b[name]), axis=1) for name, value in adapter.b.items()}
    rank = space.rank + int(warm.recipe["rank"])
    return replaced(adapter, a=a, b=b), replaced(space, rank=rank, alpha=float(rank))


def saved_modules(module: nn.Module) -> tuple[str, ...]:
    """Name the modules whose weights a base checkpoint may lack: everything outside the base model, and its pooler.

    Args:
        module: a transformers sequence classifier.

    Returns:
        Names as peft's `modules_to_save` wants them.
    """
    base = str(getattr(module, "base_model_prefix", ""))
    names = [name for name, child in module.named_children() if name != base and any(True for _ in child.parameters())]
    body = getattr(module, base, None)
    if getattr(body, "pooler", None) is not None:
        names.append(f"{base}.pooler")
    return tuple(names)


def _save_with_peft(module: nn.Module, adapter: Adapter, space: Space, saved: tuple[str, ...], folder: Path) -> None:
    """Let peft write its own format, from a model that holds the adapter, and take its layers off again."""
    import copy
    import warnings

    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    alpha: Any = space.alpha  # peft divides by it, whole or not, though it says int
    config = LoraConfig(
        r=space.rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[m.name for m in space.matrices],
        bias="none",
        task_type=TaskType.SEQ_CLS,
        modules_to_save=list(saved),
    )
    own = copy.deepcopy(module)  # peft wraps the head in place; the workbench's model is shared
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(own, config)
        layers = dict(own.named_modules())
        with torch.no_grad():
            for name in adapter.a:
                for side, values in (("lora_A", adapter.a[name]), ("lora_B", adapter.b[name])):
                    getattr(layers[name], side)["default"].weight.copy_(torch.from_numpy(values.copy()))
        wrapped.peft_config["default"].base_model_name_or_path = hub_name(space)
        wrapped.save_pretrained(str(folder), safe_serialization=True)


def _card(adapter: Adapter, space: Space, labels: Sequence[str]) -> str:
    base = hub_name(space)
    shown = json.dumps(list(labels), ensure_ascii=False)
    template = (
        "---\nbase_model: {quoted}\nlibrary_name: peft\ntags: [lora, repmatch]\n---\n\n# LoRA adapter of {subset}\n\n"
        "Trained by repmatch on {instances} instances in {steps} steps, base and head frozen. The head is {head}; "
        "it is in this checkpoint, as is the pooler where the model has one. "
        "Tokens kept: {length}. Labels, in the order of the logits: {listed}.\n\n```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        "base = {quoted}  # the checkpoint, or a folder with it\nlabels = {labels}\n"
        "model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))\n"
        'model = PeftModel.from_pretrained(model, ".").eval()  # this folder\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n```\n"
    )
    record = adapter.record
    return template.format(
        quoted=json.dumps(base),
        subset=prose(adapter.subset),
        instances=record.get("instances", "?"),
        steps=record.get("steps", "?"),
        head=(
            f"the random one of the seed {space.seed}"
            if space.warm_start is None
            else "that of a warm start, whose factors are part of this adapter"
        ),
        length=space.max_length,
        labels=shown,
        listed=", ".join(prose(label) for label in labels),
    )


def import_adapter(store: Store, path: str | Path, name: str, *, dataset: str | None = None) -> Adapter:
    """Keep a LoRA checkpoint in the store under a name, so that instances are scored against it.

    Args:
        store: the store.
        path: a folder or a safetensors file.
        name: the name to keep it under; no dataset, subset or coreset may have it.
        dataset: a dataset whose base model it belongs to: its matrices' names are matched with the dataset's.

    Returns:
        The adapter as it is kept.

    Raises:
        UsageError: the name is taken or not usable.
        InputError: the checkpoint cannot be read, or fits no matrix of the dataset.
    """
    from repmatch.curator.ingest import check_name

    check_name(name)
    try:
        taken = store.resolve(name)
    except UnknownNameError:
        taken = None
    if taken is not None:
        raise UsageError(f"{name!r} is a name of {taken.dataset!r}'s already; choose another with --name.")
    space = None
    if dataset is not None:
        space_id = store.dataset(dataset).space_id
        space = None if space_id is None else store.space(space_id)
    adapter = as_adapter(read_lora(path), name, space)
    if space is not None:
        fitting(adapter, space)
    old = _imported_of(store, name)
    if old is not None and old.id != adapter.id:
        raise UsageError(f"{name!r} is another imported adapter already; choose another name with --name.")
    store.save_adapter(adapter)
    return adapter


def fitting(adapter: Adapter, space: Space) -> list[int]:
    """Say which matrices of a space an imported adapter adapts.

    Args:
        adapter: from `as_adapter`.
        space: the space.

    Returns:
        Positions in `space.matrices`, one or more.

    Raises:
        InputError: none, or a matrix of that name has another size.
    """
    found = []
    for i, matrix in enumerate(space.matrices):
        if matrix.name in adapter.b:
            size = (len(adapter.b[matrix.name]), adapter.a[matrix.name].shape[1])
            if size != (matrix.d_out, matrix.d_in):
                raise InputError(
                    f"{matrix.name!r} is (d_out, d_in) = {(matrix.d_out, matrix.d_in)} here and {size} in "
                    f"{adapter.subset}: it belongs to another base model."
                )
            found.append(i)
    if not found:
        raise InputError(
            f"{adapter.subset} adapts none of the matrices of this space ({space.matrices[0].name!r}, ...); it adapts "
            f"{next(iter(adapter.b))!r}, ... Ingest with --targets that it has, or use its own base model."
        )
    return found


def _imported_of(store: Store, name: str) -> Adapter | None:
    """Return the imported adapter of a name, the newest of them; a dataset, subset or coreset of that name wins."""
    rows = [row for row in store.adapters().to_dicts() if row["subset"] == name and row["space_id"] == "imported"]
    if not rows:
        return None
    with suppress(UnknownNameError):
        store.resolve(name)
        return None
    return store.adapter(rows[-1]["id"])


def foreign_adapter(store: Store, name: str, space: Space) -> Adapter | None:
    """Return the adapter that a name means if it is no subset of the store: a checkpoint's path, or an imported one.

    Args:
        store: the store; a checkpoint is kept in it.
        name: what the user wrote.
        space: the space whose instances are scored.

    Returns:
        The adapter with matrices named as in the space, or None.
    """
    if is_path(name):
        adapter = as_adapter(read_lora(name), name, space)
        fitting(adapter, space)
        store.save_adapter(adapter)
        return adapter
    return _imported_of(store, name)


def is_foreign(store: Store, name: str) -> bool:
    """Whether a name means an adapter from outside: a checkpoint's path, or an imported one that no subset hides.

    Args:
        store: the store.
        name: what the user wrote.

    Returns:
        True or False.
    """
    return is_path(name) or _imported_of(store, name) is not None


def lora_of(trainer: Trainer, name: str) -> Lora:
    """Return what a name means for comparing adapters: a checkpoint, an imported adapter, or a subset's own.

    Args:
        trainer: trains a subset's adapter where it is not in the store.
        name: a path, an imported adapter's name, a dataset, subset, coreset or DATASET[SQL].

    Returns:
        The adapter.
    """
    if is_path(name):
        return read_lora(name)
    imported = _imported_of(trainer.store, name)
    if imported is not None:
        return of_adapter(imported, None, name)
    dataset = trainer.store.resolve(name).dataset
    return of_adapter(trainer.adapter(name), trainer.space_of(dataset).alpha, name)
