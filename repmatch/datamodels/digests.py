"""One text and one digest for equal values."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Serialise to the one JSON text that equal values share (sorted keys, no spaces, no NaN).

    Args:
        value: anything JSON can hold.

    Returns:
        The text, UTF-8 encodable.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, size: int = 16) -> str:
    """Hash the canonical JSON of a value with BLAKE2b.

    Args:
        value: anything JSON can hold.
        size: bytes of the digest.

    Returns:
        `2 * size` hexadecimal digits.
    """
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=size).hexdigest()
