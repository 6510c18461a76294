"""What the machine has."""

from __future__ import annotations

import os


def physical_memory() -> int | None:
    """Return the machine's memory in bytes, None where it isn't told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
