"""Choose training data by what a model learns from it.

`import repmatch` is light: torch loads only where something is computed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# oneDNN, by which torch multiplies on some processors, keeps what it made for a thousand shapes, and hardly two batches
# of texts have the same: an ingest of 6,920 sentences took 2.5 GB, and takes 1.9 GB with this, in the same time. It is
# read when torch loads; what the user has set holds.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

__version__ = "0.1.0"

__all__ = ["Curator", "FieldChoice", "RepMatchError", "Settings", "Store", "__version__", "open"]

_HOMES = {
    "Curator": "repmatch.curator.curator",
    "FieldChoice": "repmatch.curator.rows",
    "RepMatchError": "repmatch.errors",
    "Settings": "repmatch.curator.settings",
    "Store": "repmatch.store",
    "open": "repmatch.store",
}

if TYPE_CHECKING:
    from repmatch.curator.curator import Curator
    from repmatch.curator.rows import FieldChoice
    from repmatch.curator.settings import Settings
    from repmatch.errors import RepMatchError
    from repmatch.store import Store, open  # noqa: A004 -- repmatch.open(path), as one opens a file


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'repmatch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
