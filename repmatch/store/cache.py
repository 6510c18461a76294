"""Rows of numbers that can be computed again, kept beside the facts: losing them costs time and nothing else.

`cache/OWNER-KEY-WIDTH-CRC.f32` holds float32 rows, whole; `cache/OWNER-KEY-WIDTH.part` those of a computation that was
interrupted, `.sums` beside it how many were there after each step and the CRC-32 of all of them. The owner is a
dataset, the key says of what the rows were made, the CRC-32 is of the file's bytes. One process makes a part: its lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import digest
from repmatch.store.files import open_to_write, sync_folder, write_at, writing_to

logger = logging.getLogger(__name__)
FOLDER = "cache"
_NAME = re.compile(r"(?P<owner>[0-9a-f]{16})-(?P<key>[0-9a-f]{32})-(?P<width>\d{1,6})-(?P<crc>[0-9a-f]{8})\.f32")
_READ = 16 << 20  # bytes that are checked at a time
_STEP = struct.Struct("<QI")  # rows that are there, CRC-32 of their bytes

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

        A process that makes the same rows already is waited for. Where the store may not be written nothing is kept.

        Args:
            n: how many.
            width: numbers of a row.
            make: given how many rows are there already, yields (some, width) floats, the rest in order.

        Returns:
            The rows, as `read` gives them.

        Raises:
            StoreError: the disk is full.
        """
        part = self._folder / f"{self._owner}-{self._key}-{width}.part"
        try:
            self._folder.mkdir(exist_ok=True)
            os.close(open_to_write(part, os.O_RDWR | os.O_CREAT))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                with writing_to(part):
                    raise
            return gathered(width, make)
        with writing_to(part), _locked(part) as descriptor:
            found = self.read(n)
            if found is None:
                return self._made(part, descriptor, (n, width), make)
            part.unlink(missing_ok=True)  # another process was faster
            return found

    def _made(self, part: Path, descriptor: int, shape: tuple[int, int], make: Made) -> NDArray[np.float32]:
        n, width = shape
        sums = part.with_suffix(".sums")
        steps = open_to_write(sums, os.O_RDWR | os.O_CREAT)
        try:
            done, crc, at = _whole(descriptor, steps, shape)
            for rows in make(done):
                data = np.ascontiguousarray(rows, np.float32)
                write_at(descriptor, data.data.cast("B"), 4 * done * width)
                os.fdatasync(descriptor)
                done, crc = done + len(data), zlib.crc32(data.data, crc)
                write_at(steps, memoryview(_STEP.pack(done, crc)), at)
                at += _STEP.size
            os.ftruncate(descriptor, 4 * done * width)
            os.fsync(descriptor)
        finally:
            os.close(steps)
        if done != n:
            raise ValueError(f"{done} rows were made where {n} were announced")
        whole = part.with_name(f"{part.stem}-{crc:08x}.f32")
        try:
            part.replace(whole)
        except FileNotFoundError:  # let go of by a process that made rows of the dataset as it is now
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return np.fromfile(file, np.float32, n * width).reshape(n, width)
        sync_folder(self._folder)
        _forget(self._folder, lambda owner, name: owner == self._owner and name != whole.name)
        return _mapped(whole, n, width)


def gathered(width: int, make: Made) -> NDArray[np.float32]:
    """Make rows and keep them nowhere.

    Args:
        width: numbers of a row.
        make: as `CachedRows.fill` takes it.

    Returns:
        (rows, width) float32.
    """
    return np.concatenate([np.zeros((0, width), np.float32), *(np.asarray(rows, np.float32) for rows in make(0))])


@contextmanager
def _locked(part: Path) -> Iterator[int]:
    """Open a part for one process at a time, waiting for another that makes it."""
    while True:
        descriptor = open_to_write(part, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another process makes the same rows for %s; waiting for it", part.parent)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not part.exists() or part.stat().st_ino != os.fstat(descriptor).st_ino:
                continue  # it was finished meanwhile, under another name
            yield descriptor
            return
        finally:
            os.close(descriptor)


def forget_others(store: Path, datasets: Iterable[str]) -> None:
    """Remove what is cached for datasets that are no longer there, and what a killed process left behind new rows.

    Args:
        store: the store's folder.
        datasets: names of those that are.
    """
    folder, owners = store / FOLDER, {_owner(name) for name in datasets}
    whole = sorted(folder.glob("*.f32"), key=lambda path: path.stat().st_mtime_ns)
    newest = {path.name.partition("-")[0]: path.name for path in whole}
    parts = {path.stem for path in folder.glob("*.part")}

    def stale(owner: str, name: str) -> bool:
        stem, _, kind = name.rpartition(".")
        return (
            owner not in owners or (kind == "f32" and newest[owner] != name) or (kind == "sums" and stem not in parts)
        )

    _forget(folder, stale)


def _forget(folder: Path, which: Callable[[str, str], bool]) -> None:
    """Remove the files of which the owner and the name say so."""
    for path in folder.glob("*"):
        if path.suffix in (".f32", ".part", ".sums") and which(path.name.partition("-")[0], path.name):
            path.unlink(missing_ok=True)


def _mapped(path: Path, n: int, width: int) -> NDArray[np.float32]:
    return np.memmap(path, np.float32, "r", shape=(n, width)) if n else np.zeros((0, width), np.float32)


def _whole(part: int, steps: int, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Return how many rows an interrupted computation left as they were made, their CRC-32, and where steps go on."""
    n, width = shape
    size, done, crc, at = os.fstat(part).st_size, 0, 0, 0
    while len(entry := os.pread(steps, _STEP.size, at)) == _STEP.size:
        rows, expected = _STEP.unpack(entry)
        if not done < rows <= n or 4 * rows * width > size:
            break
        found = crc
        for lo in range(4 * done * width, 4 * rows * width, _READ):
            found = zlib.crc32(os.pread(part, min(_READ, 4 * rows * width - lo), lo), found)
        if found != expected:
            break
        done, crc, at = rows, found, at + _STEP.size
    os.ftruncate(steps, at)
    return done, crc, at


def _owner(dataset: str) -> str:
    return digest(dataset, size=8)


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            found = zlib.crc32(data, found)
    return found
