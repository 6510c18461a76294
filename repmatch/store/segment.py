"""Segment files: a 4 KiB header, then factor rows of one size, appended only."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import StoreCorruptError
from repmatch.store.files import open_to_write, sync_folder, write_at, writing_to

HEADER_BYTES = 4096
MAGIC = b"RPMSEG01"


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment file says about itself.

    Attributes:
        store: UUID of the store.
        number: the segment's number, also its file name.
        space_id: space of every row.
        encoding: encoding of every row.
        row_bytes: bytes of a row.
    """

    store: str
    number: int
    space_id: str
    encoding: str
    row_bytes: int

    def to_bytes(self) -> bytes:
        """Return the header block: magic, length and CRC-32 of a JSON object, the object, zeros."""
        body = json.dumps(asdict(self), sort_keys=True).encode()
        head = MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body
        return head.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def from_bytes(cls, block: bytes, path: Path) -> SegmentHeader:
        """Read the header block.

        Args:
            block: the first 4096 bytes of the file.
            path: the file, for the message.

        Returns:
            The header.

        Raises:
            StoreCorruptError: the block is not a header or fails its checksum.
        """
        size = int.from_bytes(block[8:12], "little")
        body = block[16 : 16 + size]
        if (
            len(block) < HEADER_BYTES
            or block[:8] != MAGIC
            or zlib.crc32(body) != int.from_bytes(block[12:16], "little")
            or block[16 + size :].strip(b"\0")
        ):
            raise _no_header(path)
        try:
            header = cls(**json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            raise _no_header(path) from error
        texts = (header.store, header.space_id, header.encoding)
        numbers = (header.number, header.row_bytes)
        if not all(type(text) is str for text in texts) or not all(type(n) is int and n > 0 for n in numbers):
            raise _no_header(path)
        return header


def _no_header(path: Path) -> StoreCorruptError:
    return StoreCorruptError(f"{path} does not start with the header of a segment. Restore the file from a backup.")


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One segment file.

    Attributes:
        folder: the store's `segments` folder.
        number: its number.
        row_bytes: bytes of a row.
    """

    folder: Path
    number: int
    row_bytes: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.number:06d}.bin"

    def offset(self, row: int) -> int:
        """Byte at which a row starts.

        Args:
            row: number of the row, from 0.

        Returns:
            Its offset in the file.
        """
        return HEADER_BYTES + row * self.row_bytes

    @classmethod
    def create(cls, folder: Path, header: SegmentHeader) -> SegmentFile:
        """Make an empty segment, durably.

        Args:
            folder: the store's `segments` folder.
            header: what it says about itself.

        Returns:
            The segment.
        """
        segment = cls(folder, header.number, header.row_bytes)
        with writing_to(segment.path):
            descriptor = open_to_write(segment.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_at(descriptor, memoryview(header.to_bytes()), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(folder)
        return segment

    def header(self) -> SegmentHeader:
        """Read the file's own header.

        Raises:
            StoreCorruptError: it is not one.
        """
        with self.path.open("rb") as file:
            return SegmentHeader.from_bytes(file.read(HEADER_BYTES), self.path)

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        """Write rows and sync them.

        Args:
            first: number of the first row; what lay there and after is uncommitted.
            rows: (n, row_bytes) uint8, C order.
        """
        with writing_to(self.path):
            descriptor = open_to_write(self.path, os.O_WRONLY)
            try:
                write_at(descriptor, rows.data.cast("B"), self.offset(first))
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def truncate(self, rows: int) -> None:
        """Cut the file after its committed rows.

        Args:
            rows: how many rows stay.
        """
        with writing_to(self.path):
            os.truncate(self.path, self.offset(rows))

    def size(self) -> int:
        """Bytes of the file, 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def check_size(self, rows: int) -> None:
        """Make sure that the committed rows are all there.

        Args:
            rows: committed rows.

        Raises:
            StoreCorruptError: the file is shorter.
        """
        expected, found = self.offset(rows), self.size()
        if found < expected:
            what = f"{found} bytes" if self.path.exists() else "no file"
            raise StoreCorruptError(
                f"segment {self.path} is damaged: its {rows} committed rows take {expected} bytes, found {what}. "
                "Nothing was changed. Restore this file from a backup; what it holds cannot be read until then."
            )

    def check_rows(self) -> None:
        """Make sure that catalog and file mean rows of one size, before anything is cut off.

        Raises:
            StoreCorruptError: they do not, or the header cannot be read.
        """
        said = self.header().row_bytes
        if said != self.row_bytes:
            raise StoreCorruptError(
                f"the catalog has rows of {self.row_bytes} bytes in segment {self.path}, whose own header says {said}. "
                "Nothing was changed. Restore the store's catalog from a backup, or keep what can be told with: "
                "repmatch repair"
            )

    def rows(self, first: int, count: int) -> NDArray[np.uint8]:
        """Map rows of the file, without reading them.

        Args:
            first: number of the first row.
            count: how many.

        Returns:
            (count, row_bytes) uint8, read-only view of the file.

        Raises:
            StoreCorruptError: the file is shorter than that.
        """
        if count == 0:
            return np.zeros((0, self.row_bytes), np.uint8)
        self.check_size(first + count)
        mapped = np.memmap(self.path, np.uint8, "r", self.offset(first), (count, self.row_bytes))
        return mapped.view(np.ndarray)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read rows in any order into new memory.

        Args:
            rows: (k,) row numbers.

        Returns:
            (k, row_bytes) uint8.
        """
        if len(rows) == 0:
            return np.zeros((0, self.row_bytes), np.uint8)
        first = int(rows.min())
        return self.rows(first, int(rows.max()) - first + 1)[rows - first]

    def crc32(self, first: int, count: int) -> int:
        """CRC-32 of a range of rows, read from the disk in pieces.

        Args:
            first: number of the first row.
            count: how many.

        Returns:
            The checksum.
        """
        crc = 0
        step = max(1, (8 << 20) // self.row_bytes)
        for at in range(first, first + count, step):
            crc = zlib.crc32(self.rows(at, min(step, first + count - at)).data, crc)
        return crc

    def sha256(self, rows: int) -> str:
        """SHA-256 of header and committed rows.

        Args:
            rows: committed rows.

        Returns:
            64 hexadecimal digits.
        """
        left = self.offset(rows)
        hashed = hashlib.sha256()
        with self.path.open("rb") as file:
            while left > 0:
                block = file.read(min(left, 8 << 20))
                if not block:
                    break
                hashed.update(block)
                left -= len(block)
        return hashed.hexdigest()
