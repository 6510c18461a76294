"""Subset adapters as safetensors files that describe themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from repmatch.datamodels import Adapter
from repmatch.errors import StoreCorruptError
from repmatch.store.database import first
from repmatch.store.records import next_key, stored_object


def adapter_bytes(adapter: Adapter) -> bytes:
    """Return an adapter as the content of a safetensors file.

    Args:
        adapter: the adapter.

    Returns:
        A and B as `A/NAME` and `B/NAME`, parameters trained in full as `full/NAME`; everything else as JSON under
        `repmatch` in the metadata.
    """
    from safetensors.numpy import save

    tensors = {f"A/{name}": np.ascontiguousarray(value, np.float32) for name, value in adapter.a.items()}
    tensors |= {f"B/{name}": np.ascontiguousarray(value, np.float32) for name, value in adapter.b.items()}
    tensors |= {f"full/{name}": np.ascontiguousarray(value, np.float32) for name, value in adapter.full.items()}
    about = {name: getattr(adapter, name) for name in ("id", "space_id", "subset", "members")}
    about |= {"recipe": dict(adapter.recipe), "record": dict(adapter.record)}
    order = {"a": list(adapter.a), "b": list(adapter.b)}
    if adapter.full:
        order["full"] = list(adapter.full)
    data: bytes = save(tensors, metadata={"repmatch": json.dumps({**about, "order": order})})
    return data


def parse_adapter(data: bytes, path: Path) -> Adapter:
    """Read an adapter from the content of its file.

    Args:
        data: the content.
        path: the file, for the message.

    Returns:
        The adapter.

    Raises:
        StoreCorruptError: it is not one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        about = stored_object(json.loads(data[8 : 8 + size])["__metadata__"]["repmatch"], f"what {path} says of itself")
        order = about.pop("order")
        a, b, full = (
            {part: tensors[f"{prefix}/{part}"] for part in order.get(name, ())}
            for name, prefix in (("a", "A"), ("b", "B"), ("full", "full"))
        )
        adapter = Adapter(**about, a=a, b=b, full=full)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreCorruptError(f"{path} is not the file of an adapter ({error}). Restore it from a backup.") from error
    if not _is_sound(adapter):
        raise StoreCorruptError(f"{path} is not the file of an adapter. Restore it from a backup.")
    return adapter


def _is_sound(adapter: Adapter) -> bool:
    texts = (adapter.id, adapter.space_id, adapter.subset, adapter.members)
    values = [*adapter.a.values(), *adapter.b.values(), *adapter.full.values()]
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(adapter.recipe, dict)
        and isinstance(adapter.record, dict)
        and adapter.a.keys() == adapter.b.keys()
        and all(value.dtype == "float32" for value in values)
        and all(
            a.ndim == adapter.b[name].ndim == 2 and len(a) == adapter.b[name].shape[1] for name, a in adapter.a.items()
        )
    )


def put_adapter(conn: Any, adapter: Adapter, data: bytes) -> None:
    """Enter an adapter whose file is there.

    Args:
        conn: a connection in a transaction.
        adapter: the adapter.
        data: content of its file.
    """
    body = [adapter.space_id, adapter.subset, adapter.members]
    body += [json.dumps(dict(adapter.recipe)), json.dumps(dict(adapter.record))]
    values = [*body, hashlib.sha256(data).hexdigest(), len(data)]
    found = first(conn.execute("SELECT pk FROM registry.adapters WHERE id = ?", [adapter.id]))
    if found:
        conn.execute(
            "UPDATE registry.adapters SET space_id = ?, subset = ?, members = ?, recipe = ?, record = ?, sha256 = ?, "
            "bytes = ? WHERE pk = ?",
            [*values, found[0]],
        )
        return
    conn.execute(
        "INSERT INTO registry.adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, now()::TIMESTAMP)",
        [next_key(conn, "adapters"), adapter.id, *values],
    )
