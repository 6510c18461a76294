"""What is here: versions, devices, and what a store holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.curator.export import versions
from repmatch.errors import StoreNotFoundError
from repmatch.hardware import physical_memory
from repmatch.store import open as open_store

if TYPE_CHECKING:
    from repmatch.output import Output


def devices() -> dict[str, Any]:
    """Describe the machine without loading torch.

    Returns:
        Cores this process may use, bytes of memory, and whether a CUDA driver is present.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cores": cores, "memory_bytes": physical_memory(), "cuda_driver": Path("/dev/nvidiactl").exists()}


def overview(path: Path) -> dict[str, Any]:
    """Describe this installation and the store at a path.

    Args:
        path: folder of the store; where there is none, `store` is None.

    Returns:
        Plain JSON values: versions, devices, store.
    """
    found: dict[str, Any] = {"versions": versions(), "devices": devices(), "path": str(path), "store": None}
    try:
        with open_store(path, mode="r") as store:
            found["store"] = store.info()
    except StoreNotFoundError:
        pass
    return found


def render(found: dict[str, Any], output: Output) -> None:
    """Write an overview as text.

    Args:
        found: from `overview`.
        output: where to.
    """
    names = found["versions"]
    output.line(f"repmatch {names['repmatch']}, Python {names['python']}")
    output.line(", ".join(f"{k} {v}" for k, v in names.items() if k not in ("repmatch", "python", "platform")))
    machine = found["devices"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    output.line(f"{machine['cores']} cores{memory}{', a CUDA driver' if machine['cuda_driver'] else ''}")
    store = found["store"]
    if store is None:
        output.line(f"no store at {found['path']}")
        output.hint("make one with: repmatch ingest FILE --dataset NAME")
        return
    output.line("")
    output.line(f"store {store['path']}: {store['bytes']['total'] / 1e6:.1f} MB, schema {store['schema']}")
    if store["bytes_per_instance"]:
        output.line(f"{store['bytes_per_instance']:,.0f} bytes an instance, rows and catalog included")
    if store["quarantined"]:
        output.line(f"{store['quarantined']} rows quarantined")
    if store["encodings"]:
        output.line("")
        output.table(
            ["encoding", "factors", "bytes each", "MB", "MB dead"],
            [
                (e["encoding"], e["factors"], e["row_bytes"], f"{e['bytes'] / 1e6:.1f}", f"{e['dead_bytes'] / 1e6:.1f}")
                for e in store["encodings"]
            ],
        )
    used = [(name, t["rows"], f"{t['bytes'] / 1e6:.1f}") for name, t in store["tables"].items() if t["rows"]]
    if used:
        output.line("")
        output.table(["table", "rows", "MB"], used)
    if store["datasets"]:
        output.line("")
        output.table(
            ["dataset", "rows", "factors", "labels", "encoding", "space"],
            [
                (d["name"], d["rows"], d["factors"], len(d["labels"]), d["encoding"], (d["space_id"] or "")[:8])
                for d in store["datasets"]
            ],
        )
    if store["spaces"]:
        output.line("")
        output.table(*_spaces(store["spaces"]))
    if store["coresets"]:
        output.line("")
        output.table(
            ["coreset", "dataset", "strategy", "picks"],
            [(c["name"], c["dataset"], c["strategy"], c["picks"]) for c in store["coresets"]],
        )


# A store may be another's and hold anything: nothing here asks more of a value than that it can be written.
_Column = tuple[str, Callable[[Mapping[str, Any]], object]]
_SPACE: tuple[_Column, ...] = (
    ("model", lambda s: s["model"]),
    ("task", lambda s: s["task"]),
    ("rank", lambda s: s["rank"]),
    ("matrices", lambda s: len(s["matrices"])),
    ("max length", lambda s: s["max_length"]),
    ("seed", lambda s: s["seed"]),
    ("step", lambda s: _step(s["optimizer"])),
    ("start", lambda s: "cold" if s["warm_start"] is None else f"warm {str(s['warm_start'])[:8]}"),
)
# Shown where the others are the same for two spaces.
_RARE: tuple[_Column, ...] = (
    ("alpha", lambda s: s["alpha"]),
    ("template", lambda s: s["template"]),
    ("weights", lambda s: str(s["model_fingerprint"])[:8]),
    ("tokenizer", lambda s: str(s["tokenizer_fingerprint"])[:8]),
    ("names", lambda s: ",".join(map(str, s["matrices"]))),
)


def _spaces(spaces: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """The header and rows of a table in which no two spaces look alike."""
    columns = list(_SPACE)
    if len({str([cell(s) for _, cell in columns]) for s in spaces}) < len(spaces):
        columns += [(name, cell) for name, cell in _RARE if len({str(cell(s)) for s in spaces}) > 1]
    rows = [[s["id"][:8], *(cell(s) for _, cell in columns)] for s in spaces]
    return ["space", *(name for name, _ in columns)], rows


def _step(optimizer: Any) -> str:
    if not isinstance(optimizer, Mapping):
        return str(optimizer)
    steps = optimizer.get("steps", 1)
    return f"{optimizer.get('name')} {optimizer.get('lr')}" + ("" if steps == 1 else f" x{steps}")
