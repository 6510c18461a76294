"""Rows of numbers that can be computed again, kept beside the facts: losing them costs time and nothing else.

`cache/OWNER-KEY-WIDTH-CRC.f32` holds float32 rows, whole; `cache/OWNER-KEY-WIDTH.part` those of a computation that was
interrupted. The owner is a dataset, the key says of what the rows were made, the CRC-32 is of the file's bytes.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import digest
from repmatch.store.files import open_to_write, sync_folder, write_at, writing_to

FOLDER = "cache"
_NAME = re.compile(r"(?P<owner>[0-9a-f]{16})-(?P<key>[0-9a-f]{32})-(?P<width>\d{1,6})-(?P<crc>[0-9a-f]{8})\.f32")
_READ = 16 << 20  # bytes that are checked at a time

Made = Callable[[int], Iterable[NDArray[np.floating]]]


class CachedRows:
    """Rows of one dataset, (n, width) float32.

    Args:
        store: the store's folder.
        dataset: whose rows they are.
        made_of: everything that decides the rows, as plain JSON values.
    """

    def __init__(self, store: Path, dataset: str, made_of: object) -> None:
        self._folder = store / FOLDER
        self._owner, self._key = _owner(dataset), digest(made_of, size=16)

    def read(self, n: int) -> NDArray[np.float32] | None:
        """Return the rows as a read-only map of the file; None where they are not there or damaged.

        Args:
            n: how many there must be.
        """
        for path in sorted(self._folder.glob(f"{self._owner}-{self._key}-*.f32")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            width = int(match["width"])
            if path.stat().st_size == 4 * n * width and _crc(path) == int(match["crc"], 16):
                return _mapped(path, n, width)
        return None

    def fill(self, n: int, width: int, make: Made) -> NDArray[np.float32]:
        """Make the rows, keep them, and let go of what was kept for the dataset before.

        Args:
            n: how many.
            width: numbers of a row.
            make: given how many rows are there already, yields (some, width) floats, the rest in order.

        Returns:
            The rows, as `read` gives them.

        Raises:
            StoreError: the folder cannot be written.
        """
        part = self._folder / f"{self._owner}-{self._key}-{width}.part"
        with writing_to(part):
            self._folder.mkdir(exist_ok=True)
            descriptor = open_to_write(part, os.O_RDWR | os.O_CREAT)
            try:
                done = _whole_rows(part, n, width)
                for rows in make(done):
                    data = np.ascontiguousarray(rows, np.float32)
                    write_at(descriptor, data.data.cast("B"), 4 * done * width)
                    os.fdatasync(descriptor)
                    done += len(data)
                os.ftruncate(descriptor, 4 * done * width)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if done != n:
                raise ValueError(f"{done} rows were made where {n} were announced")
            whole = part.with_name(f"{part.stem}-{_crc(part):08x}.f32")
            part.replace(whole)
            sync_folder(self._folder)
        _forget(self._folder, lambda owner, name: owner == self._owner and name != whole.name)
        return _mapped(whole, n, width)


def forget_others(store: Path, datasets: Iterable[str]) -> None:
    """Remove what is cached for datasets that are no longer there.

    Args:
        store: the store's folder.
        datasets: names of those that are.
    """
    owners = {_owner(name) for name in datasets}
    _forget(store / FOLDER, lambda owner, _: owner not in owners)


def _forget(folder: Path, which: Callable[[str, str], bool]) -> None:
    """Remove the files of which the owner and the name say so."""
    for path in folder.glob("*"):
        if path.suffix in (".f32", ".part") and which(path.name.partition("-")[0], path.name):
            path.unlink(missing_ok=True)


def _mapped(path: Path, n: int, width: int) -> NDArray[np.float32]:
    return np.memmap(path, np.float32, "r", shape=(n, width)) if n else np.zeros((0, width), np.float32)


def _whole_rows(part: Path, n: int, width: int) -> int:
    """Return how many rows an interrupted computation left; a row of zeros never reached the disk."""
    there = _mapped(part, min(n, part.stat().st_size // (4 * width)), width)
    empty = np.flatnonzero(~there.any(axis=1))
    return int(empty[0]) if len(empty) else len(there)


def _owner(dataset: str) -> str:
    return digest(dataset, size=8)


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            found = zlib.crc32(data, found)
    return found
