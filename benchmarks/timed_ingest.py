"""Run the command line with timers around the parts of an ingest: `timed_ingest.py OUT.json ARGUMENTS...`."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

_spent: Counter[str] = Counter()


def _timed(owner: Any, name: str, part: str) -> None:
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return wrapped(*args, **kwargs)
        finally:
            _spent[part] += time.perf_counter() - began

    setattr(owner, name, call)


def main() -> None:
    """Time the parts and write their seconds, whatever the command's end."""
    began = time.perf_counter()
    from repmatch.cli import main as cli_main
    from repmatch.curator import ingest
    from repmatch.curator.batches import Batches
    from repmatch.curator.classification import SequenceClassification
    from repmatch.store import Store

    _spent["imports"] = time.perf_counter() - began
    _timed(ingest, "_bench", "model")
    _timed(ingest, "_read", "reading")
    _timed(SequenceClassification, "encode", "tokenizing")
    _timed(Batches, "_gathered", "engine")  # waited for: batches go on while windows are read and stored
    _timed(Store, "append", "storing")
    try:
        cli_main(sys.argv[2:])
    finally:
        _spent["all"] = time.perf_counter() - began
        Path(sys.argv[1]).write_text(json.dumps(_spent))


if __name__ == "__main__":
    main()
