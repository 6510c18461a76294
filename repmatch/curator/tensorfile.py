"""Tensors of a safetensors file by numpy alone, one at a time, bfloat16 included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import InputError

_PLAIN: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


class TensorFile:
    """A safetensors file; numbers are read when they are asked for.

    Args:
        path: the file.

    Raises:
        InputError: it is not a sound safetensors file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, "np") as file:  # checks sizes, offsets and overlaps
                list(file.keys())
            with path.open("rb") as raw:
                size = int.from_bytes(raw.read(8), "little")
                header: dict[str, Any] = json.loads(raw.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is no sound safetensors file ({error}); fetch or write it again.") from error
        self._start = 8 + size
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._header = header

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the header's order."""
        return tuple(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._header[name]["shape"])

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor.

        Args:
            name: one of `names`.

        Returns:
            float32, of the tensor's shape.

        Raises:
            InputError: it is kept in a type that has no exact float32 (8-bit floats, integers).
        """
        about = self._header[name]
        lo, hi = about["data_offsets"]
        with self.path.open("rb") as raw:
            raw.seek(self._start + lo)
            data = raw.read(hi - lo)
        if about["dtype"] == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif about["dtype"] in _PLAIN:
            values = np.frombuffer(data, _PLAIN[about["dtype"]]).astype(np.float32)
        else:
            raise InputError(
                f"{self.path}: {name!r} is kept as {about['dtype']}; expected F64, F32, F16 or "
                "BF16. Save it in one of them."
            )
        return values.reshape(about["shape"])
