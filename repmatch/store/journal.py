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
from types import NoneType
from typing import Any

from repmatch.datamodels import Row
from repmatch.errors import UsageError
from repmatch.store.files import open_to_write, sync_folder, write_at, writing_to

MAGIC = b"RPMJ"
FRAME_HEAD = 12
MAX_FRAME = 1 << 30
"""Bytes of a frame's JSON: a frame that unpacks to more was not written by us, and is not unpacked to the end."""
_ROW = attrgetter(*(field.name for field in fields(Row)))


def unpack_frame(body: bytes) -> dict[str, Any]:
    """Return the value of a frame's body.

    Args:
        body: what follows the frame's head.

    Returns:
        The value.

    Raises:
        ValueError: it is no packed JSON object, or a larger one than is ever written.
    """
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(body, MAX_FRAME)
        value = json.loads(text) if unpacking.eof else None
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def pack_frame(value: Mapping[str, Any]) -> bytes:
    """Turn a value into a frame.

    Args:
        value: anything JSON can hold.

    Returns:
        The frame's bytes.

    Raises:
        UsageError: it is larger than a frame may be.
    """
    text = json.dumps(value, separators=(",", ":")).encode()
    if len(text) > MAX_FRAME:
        raise UsageError(
            f"the rows of the batch take {len(text):,} bytes; at most {MAX_FRAME:,} fit. Append fewer at once."
        )
    body = zlib.compress(text, 1)
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

        Raises:
            ValueError: the value is not what `to_frame` packs.
        """
        values = dict(value)
        try:
            values["rows"] = tuple(Row(*row) for row in values["rows"])
            for name in ("losses", "tokens", "truncated"):
                values[name] = tuple(values[name])
            entry = cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a batch: {error}") from error
        entry._check()
        return entry

    def _check(self) -> None:
        count = len(self.rows)
        numbers = (self.number, self.first, self.crc32)
        texts = [text for row in self.rows for text in (*_ROW(row)[:3], *_ROW(row)[4:8])]
        sound = (
            count > 0
            and all(type(n) is int and 0 <= n < 1 << 62 for n in (*numbers, *(row.line for row in self.rows)))
            and all(type(text) is str for text in texts)
            and all(type(row.text_pair) in (str, NoneType) for row in self.rows)
            and len({row.id for row in self.rows}) == count
            and {len(self.losses), len(self.tokens), len(self.truncated)} == {count}
            and all(type(loss) in (float, int) for loss in self.losses)
            and all(type(n) is int and abs(n) < 1 << 31 for n in self.tokens)
            and all(type(cut) is bool for cut in self.truncated)
            and isinstance(self.dataset, dict)
        )
        if not sound:
            raise ValueError("not a batch: a value of another kind")


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
            descriptor = open_to_write(self.path, os.O_WRONLY | os.O_CREAT)
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
                try:
                    value = unpack_frame(body)
                except ValueError:
                    return
                offset += FRAME_HEAD + size
                yield offset, value
