"""LoRA adapters from anywhere, layer by layer: safetensors files by numpy alone, and adapters of a store.

The names that training tools give to A and B: peft's `NAME.lora_A.weight` (`NAME.lora_A.default.weight`,
`NAME.lora_embedding_A`), kohya's and diffusers' `lora_down`, `lora.down` and `lora_linear_layer.down` with `up`, and
MLX' `lora_a`, which it keeps transposed. Pickled checkpoints are never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.tensorfile import TensorFile
from repmatch.datamodels import Adapter, Space
from repmatch.errors import InputError
from repmatch.printable import shorten

Floats = NDArray[np.float32]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_OTHER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapters.safetensors")
_PREFIX = "base_model.model."
# (pattern of a tensor's name, word for A, kept transposed)
_NAMES = (
    (re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight"), "A", False),
    (re.compile(r"(?P<name>.+)\.lora_embedding_(?P<side>[AB])(\.[^.]+)?"), "A", False),
    (
        re.compile(r"(?P<name>.+?)(\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<side>down|up)\.weight"),
        "down",
        False,
    ),
    (re.compile(r"(?P<name>.+)\.lora_(?P<side>[ab])"), "a", True),
)

MAX_ALPHA = 1e9
_REPEATS = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{?]|\\\d|\(\?")


@dataclass(frozen=True)
class LoraLayer:
    """One adapted matrix of a LoRA adapter: ΔW = scale · B·A.

    Attributes:
        name: the module's dotted name in the base model.
        d_out: rows of B.
        d_in: columns of A.
        rank: columns of B.
        scale: alpha / rank, or alpha / √rank.
        load: returns A (rank, d_in) and B (d_out, rank), both float32.
    """

    name: str
    d_out: int
    d_in: int
    rank: int
    scale: float
    load: Callable[[], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter as far as comparing needs it.

    Attributes:
        name: how the user named it.
        layers: name of a matrix -> its layer, in the file's order.
        base: the base model that it names, or None.
        config: what its adapter_config.json says; empty without one.
        notes: what a comparison cannot see, one sentence each.
    """

    name: str
    layers: Mapping[str, LoraLayer]
    base: str | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def is_path(name: str) -> bool:
    """Whether a name means a LoRA checkpoint on disk and not something in a store.

    Args:
        name: what the user wrote.

    Returns:
        True for a path with a slash or a file's ending, and for a folder here that holds an adapter. A condition in
        brackets, as in `DATASET[SQL]`, belongs to the store.
    """
    if name.endswith("]") and not Path(name).exists():
        return False
    return "/" in name or name.endswith(".safetensors") or any((Path(name) / f).is_file() for f in (WEIGHTS, CONFIG))


def read_lora(path: str | Path) -> Lora:
    """Open a LoRA checkpoint; its tensors are read when they are needed.

    Args:
        path: a folder as `save_pretrained` writes it, or a safetensors file (a config beside it is read).

    Returns:
        The adapter.

    Raises:
        InputError: there is none, it is pickled, of another kind than LoRA, its config holds nonsense, or its tensors
            don't fit together.
    """
    weights = _weights_file(Path(path))
    config = _config(weights.parent / CONFIG)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{weights.parent / CONFIG} describes a {kind} adapter; only LoRA adapters can be read.")
    _check_config(weights.parent / CONFIG, config)
    file = TensorFile(weights)
    pairs, alphas, magnitudes = _pairs(file)
    if not pairs:
        shown = ", ".join(list(file.names)[:3])
        raise InputError(
            f"{weights} holds no LoRA factors: no tensor is named like NAME.lora_A.weight and NAME.lora_B.weight or "
            f"NAME.lora_down.weight and NAME.lora_up.weight (it holds {shown or 'nothing'})."
        )
    layers = {name: _layer(file, name, pair, config, alphas) for name, pair in pairs.items()}
    notes = []
    if magnitudes or config.get("use_dora"):
        notes.append(f"{path} is a DoRA adapter: its magnitudes are left out, B·A is compared.")
    return Lora(str(path), layers, config.get("base_model_name_or_path") or None, config, tuple(notes))


def of_adapter(adapter: Adapter, alpha: float | None, name: str | None = None) -> Lora:
    """Turn a stored subset adapter into the same form.

    Args:
        adapter: the adapter.
        alpha: LoRA alpha; None: B holds the scale already, as in an imported adapter.
        name: another name than the subset's.

    Returns:
        The adapter, layers in its order.
    """

    def layer(matrix: str) -> LoraLayer:
        a, b = adapter.a[matrix], adapter.b[matrix]
        scale = 1.0 if alpha is None else alpha / len(a)
        return LoraLayer(matrix, len(b), a.shape[1], len(a), scale, lambda: (a, b))

    return Lora(name or adapter.subset, {matrix: layer(matrix) for matrix in adapter.a})


def as_adapter(lora: Lora, name: str, space: Space | None = None) -> Adapter:
    """Turn a checkpoint into an adapter that a store keeps: scale goes into B, so that ΔW = B·A.

    Args:
        lora: the checkpoint.
        name: the name to keep it under.
        space: where given, layers are renamed to this space's matrices where they are the same but for leading parts.

    Returns:
        The adapter; its id is the digest of its tensors, its recipe says that it was imported.

    Raises:
        InputError: a value is not finite.
    """
    renamed = {} if space is None else common_names(list(lora.layers), list(space.layout.names))
    total = hashlib.blake2b(digest_size=16)
    a: dict[str, Floats] = {}
    b: dict[str, Floats] = {}
    for own, layer in lora.layers.items():
        down, up = layer.load()
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise InputError(f"{lora.name}: the factors of {own!r} hold NaN or infinity; the adapter is not usable.")
        kept = renamed.get(own, own)
        a[kept], b[kept] = down, (up * np.float32(layer.scale)).astype(np.float32)
        total.update(kept.encode())
        total.update(a[kept].tobytes())
        total.update(b[kept].tobytes())
    recipe = {"imported": lora.name, "base": lora.base, "config": dict(lora.config or {})}
    ranks = sorted({layer.rank for layer in lora.layers.values()})
    record = {"layers": len(a), "ranks": ranks, "notes": list(lora.notes)}
    return Adapter(total.hexdigest(), "imported", name, "", recipe, record, a, b)


def common_names(mine: list[str], theirs: list[str]) -> dict[str, str]:
    """Match the names of two adapters' matrices; where none are equal, leading parts are dropped until most fit.

    `bert.encoder.layer.0...` and `encoder.layer.0...` name the same matrix of the same base, wrapped differently.

    Args:
        mine: names of one.
        theirs: names of the other.

    Returns:
        Name in the one -> name in the other, for those that both have.
    """
    for drop in range(5):
        best: dict[str, str] = {}
        # One side at a time: dropping on both would take an encoder's matrix for the decoder's.
        for left, right in ((_dropped(mine, drop), _dropped(theirs, 0)), (_dropped(mine, 0), _dropped(theirs, drop))):
            found = {left[key]: right[key] for key in left if key in right}
            best = found if len(found) > len(best) else best
        if best:
            return best
    return {}


def _dropped(names: list[str], count: int) -> dict[str, str]:
    """Map names without their first `count` parts to the whole ones; those that are no longer unique are left out."""
    out: dict[str, str] = {}
    twice = set()
    for name in names:
        parts = name.split(".")
        short = ".".join(parts[count:])
        if count and len(parts) - count < 2:
            continue
        twice |= {short} & set(out)
        out[short] = name
    return {short: name for short, name in out.items() if short not in twice}


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(
                f"{path} is no safetensors file; pickled weights can run code and are not read. Load it once with peft "
                "and save_pretrained() it as safetensors."
            )
        return path
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}; expected a LoRA checkpoint (safetensors).")
    for name in (WEIGHTS, *_OTHER_WEIGHTS):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path} holds several safetensors files and no {WEIGHTS}; name the one to read.")
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    hint = (
        f"; {pickled[0]} is pickled, which can run code and is not read: save it again as safetensors"
        if pickled
        else ""
    )
    raise InputError(f"the folder {path} holds no {WEIGHTS}{hint}.")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); remove or repair it.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object; remove or repair it.")
    return found


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse values of a config that would be passed over or taken for others; what is missing has a default."""
    rank, alpha, root = config.get("r", 1), config.get("lora_alpha", 1), config.get("use_rslora", False)
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    for key, value, fits, expected in (
        ("r", rank, whole, "a whole number from 1"),
        ("lora_alpha", alpha, _is_alpha(alpha), "a number below 1e9"),
        ("use_rslora", root, root is None or isinstance(root, bool), "true or false"),
    ):
        if not fits:
            raise InputError(
                f"{path}: {key!r} is {shorten(repr(value))}; expected {expected}. Write what it was trained with."
            )


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ALPHA


_Pair = dict[str, tuple[str, bool]]  # side "A" or "B" -> tensor's name, whether it is kept transposed


def _pairs(file: TensorFile) -> tuple[dict[str, _Pair], dict[str, str], list[str]]:
    pairs: dict[str, _Pair] = {}
    alphas: dict[str, str] = {}
    magnitudes = []
    for tensor in file.names:
        if tensor.endswith(".alpha"):
            alphas[_clean(tensor.removesuffix(".alpha"))] = tensor
        elif ".lora_magnitude_vector" in tensor:
            magnitudes.append(tensor)
        for pattern, first, transposed in _NAMES:
            found = pattern.fullmatch(tensor)
            if found:
                side = "A" if found["side"] == first else "B"
                pairs.setdefault(_clean(found["name"]), {})[side] = (tensor, transposed)
                break
    return pairs, alphas, magnitudes


def _clean(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _layer(file: TensorFile, name: str, pair: _Pair, config: Mapping[str, Any], alphas: Mapping[str, str]) -> LoraLayer:
    if set(pair) != {"A", "B"}:
        there, missing = ("A", "B") if "A" in pair else ("B", "A")
        raise InputError(
            f"{file.path}: {name!r} has {pair[there][0]!r} but no {missing}; the checkpoint is incomplete."
        )
    shapes = {side: _flat(file.shape(tensor), turned) for side, (tensor, turned) in pair.items()}
    (rank, d_in), (d_out, other) = shapes["A"], shapes["B"]
    if rank != other or 0 in (rank, d_in, d_out):
        raise InputError(
            f"{file.path}: A {shapes['A']} and B {shapes['B']} of {name!r} don't multiply; expected "
            "(r, d_in) and (d_out, r)."
        )
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if alpha is None:
        own = file.tensor(alphas[name]).reshape(-1) if name in alphas else np.array([rank], np.float32)
        alpha = float(own[0]) if own.size else None
    if alpha is None or not _is_alpha(alpha):
        raise InputError(
            f"{file.path}: alpha of {name!r} is {shorten(repr(alpha))}; expected a number. Repair its config."
        )
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def load() -> tuple[Floats, Floats]:
        out = {}
        for side, (tensor, turned) in pair.items():
            values = file.tensor(tensor)
            flat = values.T if turned else values.reshape(shapes[side])
            out[side] = np.ascontiguousarray(flat, np.float32)
        return out["A"], out["B"]

    return LoraLayer(name, d_out, d_in, rank, scale, load)


def _flat(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Return a factor's shape as a matrix; a convolution's A is (r, channels, h, w), its B (d_out, r, 1, 1)."""
    if len(shape) < 2:
        return (0, 0)
    if transposed:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _pattern(patterns: Any, name: str, default: Any) -> Any:
    """Look a matrix up in peft's `alpha_pattern`: keys are endings of names or regular expressions."""
    if not isinstance(patterns or {}, dict):
        raise InputError(f"alpha_pattern of {CONFIG} is a {type(patterns).__name__}; expected an object. Repair it.")
    for key, value in (patterns or {}).items():
        try:
            # Patterns come from the checkpoint: one that goes back and forth over a name without end is not tried.
            if len(key) > 300 or len(name) > 300 or len(_REPEATS.findall(key)) > 2 or _REPEATED_GROUP.search(key):
                raise re.error("too many repetitions")
            found = re.fullmatch(rf"(.*\.)?({key})", name)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"alpha_pattern of {CONFIG} has the key {shorten(repr(key))}, which is no simple pattern ({error}); "
                "expected endings of names, or regular expressions with at most two repetitions. Write them out."
            ) from error
        if found and value is None:
            raise InputError(
                f"alpha_pattern of {CONFIG} has null for {shorten(repr(key))}; expected a number. Repair it."
            )
        if found:
            return value
    return default
