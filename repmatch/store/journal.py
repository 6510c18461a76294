"""The journal of a segment: every batch once more, synced before the catalog's commit.

DuckDB can lose the end of a damaged write-ahead log without a word. The journal holds all that the catalog knows of a
batch, so that such batches are found and entered again. A journal is a file of frames: magic, length, CRC-32, then
JSON compressed by zlib. The first frame describes the space, each further one a batch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from repmatch.datamodels import Row
from repmatch.store.files import sync_folder, write_at, writing_to

MAGIC = b"RPMJ"
FRAME_HEAD = 12
_ROW = attrgetter(*(field.name for field in fields(Row)))


def pack_frame(value: Mapping[str, Any]) -> bytes:
    """Turn a value into a frame.

    Args:
        value: anything JSON can hold.

    Returns:
        The frame's bytes.
    """
    body = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    return MAGIC + len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


@dataclass(frozen=True)
class BatchEntry:
    """One batch as the journal keeps it: all that the catalog is told.

    Attributes:
        number: the batch's number, counted over the store.
        first: its first row in the segment.
        crc32: checksum of its segment rows.
        dataset: the dataset's record as plain JSON values.
        rows: the input rows.
        losses: loss of each.
        tokens: tokens of each.
        truncated: whether each was cut.
    """

    number: int
    first: int
    crc32: int
    dataset: Mapping[str, Any]
    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]

    def to_frame(self) -> bytes:
        """Return the entry as a frame."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return pack_frame({**values, "rows": [_ROW(row) for row in self.rows]})

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> BatchEntry:
        """Rebuild an entry from a frame's value.

        Args:
            value: what `Journal.frames` yielded.

        Returns:
            The entry.
        """
        values = dict(value)
        values["rows"] = tuple(Row(*row) for row in values["rows"])
        for name in ("losses", "tokens", "truncated"):
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal beside one segment.

    Attributes:
        path: the file.
    """

    path: Path

    def size(self) -> int:
        """Bytes of the file, 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def create(self, head: Mapping[str, Any]) -> int:
        """Start the journal with a frame that describes its segment.

        Args:
            head: the description.

        Returns:
            Bytes of the file.
        """
        with writing_to(self.path):
            self.path.unlink(missing_ok=True)
            end = self.write(0, pack_frame(head))
            sync_folder(self.path.parent)
        return end

    def write(self, offset: int, frame: bytes) -> int:
        """Write a frame and sync it.

        Args:
            offset: end of the committed frames.
            frame: the bytes.

        Returns:
            The offset after it.
        """
        with writing_to(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                write_at(descriptor, memoryview(frame), offset)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        return offset + len(frame)

    def truncate(self, size: int) -> None:
        """Cut the file after its committed frames.

        Args:
            size: bytes that stay.
        """
        with writing_to(self.path):
            os.truncate(self.path, size)

    def torn(self, offset: int) -> bool:
        """Whether nothing but an unfinished frame lies behind an offset.

        Args:
            offset: end of the last whole frame.

        Returns:
            False where a frame is as long as it says and yet damaged, or no frame at all.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            head = file.read(FRAME_HEAD)
        unfinished = len(head) < FRAME_HEAD or offset + FRAME_HEAD + int.from_bytes(head[4:8], "little") > self.size()
        return unfinished and MAGIC.startswith(head[:4])

    def frames(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read whole frames one after the other; stop at the first that is torn or damaged.

        Args:
            offset: where to start, the start of a frame.

        Yields:
            (offset after the frame, its value).
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            while True:
                head = file.read(FRAME_HEAD)
                size = int.from_bytes(head[4:8], "little")
                if len(head) < FRAME_HEAD or head[:4] != MAGIC or size > self.size():
                    return
                body = file.read(size)
                if len(body) < size or zlib.crc32(body) != int.from_bytes(head[8:12], "little"):
                    return
                offset += FRAME_HEAD + size
                yield offset, json.loads(zlib.decompress(body))
