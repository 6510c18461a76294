"""A device that is none: its tensors are computed on the CPU but say that they lie elsewhere, and refuse to be mixed.

Run as a script it computes factors there and prints what was seen, a JSON object a line. It needs a process of its own:
the backend stays registered, and torch's thread for its backward pass has no orderly end.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
PLACE = f"{NAME}:0"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, Module())


class Away(torch.Tensor):
    """A tensor on the device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls: type[Away], raw: torch.Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=PLACE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes tensors on the device, and counts the operations there."""

    double: ClassVar = True
    seen: ClassVar[collections.Counter[str]] = collections.Counter()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    @classmethod
    def run(cls, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = [x for x in given if isinstance(x, Away)]
        here = [x for x in given if not isinstance(x, Away) and x.dim()]
        if away and here and function not in COPIES:
            raise RuntimeError(f"{function} is given tensors of two devices")
        asked = kwargs.get("device")
        result_away = bool(away) if asked is None else torch.device(asked).type == NAME
        if function is COPIES[0] and result_away != isinstance(args[0], Away):
            cls.seen["to the device" if result_away else "from the device"] += 1
        args, kwargs = tree_map(_raw, (args, kwargs))
        found = function(*args, **kwargs | ({} if asked is None else {"device": "cpu"}))
        if function is COPIES[1]:
            return given[0]
        if not result_away:
            return found
        cls.seen[str(function)] += 1
        if not cls.double and any(x.dtype is torch.float64 for x in tree_leaves(found) if isinstance(x, torch.Tensor)):
            raise TypeError("the device has no float64")
        known = {id(x.raw): x for x in away} if function._schema.is_mutable else {}
        return tree_map(lambda x: known[id(x)] if id(x) in known else _away(x), found)


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Away) else x


def _away(x: Any) -> Any:
    return Away(x) if isinstance(x, torch.Tensor) else x


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a frozen module on the device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Away(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else Away(buffer)
    return module


def compute(model: Path, **options: Any) -> dict[str, Any]:
    """Compute a few factors on the device and on the CPU."""
    from tiny_models import sentences

    from repmatch.curator import precision, trial
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.settings import Settings
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Row

    bench = Workbench.build(Settings(model=str(model), device="cpu", **options), "completion")
    task, plain = bench.task(("no", "yes")), bench.engine(("no", "yes"))
    pair = bench.space.task == "causal-lm"
    rows = [
        Row(str(i), "{}", text, text if pair else None, ("no", "yes")[i % 2], "", "", "", i)
        for i, text in enumerate(sentences(6))
    ]
    examples = task.encode(rows)
    exact = plain.compute(task.collate(examples))
    module: Any = moved(plain.module)
    module.config.use_cache = False  # torch.tensor(..., device=...) of the cache passes modes by
    with Device():
        engine = FactorEngine(module, bench.space, task.losses, PLACE)
        trial.check(engine, task, examples)
        Device.seen.clear()
        found = engine.compute(task.collate(examples))
    return {
        "options": {name: str(value) for name, value in options.items()},
        "agreement": float(precision.agreement(exact, found, plain.layout).min()),
        "loss": float(abs(exact.losses - found.losses).max()),
        "seen": dict(Device.seen),
    }


def main(double: bool) -> None:
    """Tell what several spaces do on the device; without float64 rank 1 alone is tried."""
    from tiny_models import checkpoint
    from tiny_more import causal_checkpoint

    Device.double = double
    with tempfile.TemporaryDirectory() as folder:
        bert, llama = checkpoint(Path(folder) / "bert"), causal_checkpoint(Path(folder) / "causal", "llama")
        cases: list[tuple[Path, dict[str, Any]]] = [(bert, {}), (llama, {"task": "causal-lm"})]
        if double:
            cases += [(bert, {"rank": 3}), (bert, {"steps": 2}), (bert, {"rank": 2, "steps": 2})]
        for model, options in cases:
            sys.stdout.write(f"SEEN {json.dumps(compute(model, **options))}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:] != ["no-float64"])
    os._exit(0)
