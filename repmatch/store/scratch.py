"""Scratch databases of stages: each has a lock file, so that those of dead processes can be told."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def remove_scratch(path: Path) -> None:
    """Remove a scratch database and what DuckDB put beside it.

    Args:
        path: the database.
    """
    for leftover in (path, path.with_name(path.name + ".wal")):
        leftover.unlink(missing_ok=True)
    spill = path.with_suffix(".spill")
    if spill.is_dir():
        for entry in spill.iterdir():
            entry.unlink(missing_ok=True)
        spill.rmdir()


def remove_stale(folder: Path) -> None:
    """Remove scratch databases whose process is gone.

    Args:
        folder: the store's `staging` folder, which may not exist.
    """
    for guard in folder.glob("*.lock"):
        descriptor = os.open(guard, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_scratch(guard.with_suffix(".duckdb"))
            guard.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
