"""Compaction: live rows move to new segments by the write protocol, then old segments go.

Every move is a commit like any other, so a compaction that is killed has moved some rows and not others, and the next
one goes on. Nothing is removed before the catalog that no longer needs it lies checkpointed on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import Dataset, Encoding, Row, Space
from repmatch.errors import StoreCorruptError
from repmatch.store.cache import forget_others
from repmatch.store.database import first
from repmatch.store.factors import RawBatch, check_places
from repmatch.store.health import Health, damaged_batches, folder_bytes
from repmatch.store.mapping import MappedSegment
from repmatch.store.records import ROW_COLUMNS
from repmatch.store.recovery import Committed, committed_segments, remove_segments
from repmatch.store.segment import SegmentFile

MOVE_BYTES = 32 << 20
MOVE_ROWS = 16384


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did.

    Attributes:
        moved: factors that were written anew.
        segments: segments removed.
        before: bytes of the store before.
        after: bytes of the store after.
    """

    moved: int
    segments: int
    before: int
    after: int


class Compaction(Health):
    """Gives back the space of what was deleted or replaced."""

    def compact(self) -> Compacted:
        """Rewrite segments that hold dead rows, remove the old ones, and shrink the catalog.

        Returns:
            What was done.

        Raises:
            StoreCorruptError: a segment to be rewritten is damaged; nothing of it is moved. `repair` first.
        """
        self._ready()
        with self.writing():
            before = folder_bytes(self.path)
            with self._reading() as conn:
                live = dict(
                    conn.execute("SELECT segment_pk, count(*) FROM registry.factors GROUP BY segment_pk").fetchall()
                )
                victims = [s for s in committed_segments(conn) if live.get(s.pk, 0) < s.rows or s.rows == 0]
            for record in victims:
                if live.get(record.pk, 0):
                    self._must_be_sound(record)
            moved = self._move(victims)
            self._drop(victims)
            self._catalog.checkpoint()
            forget_others(self.path, self.datasets()["name"].to_list())
            return Compacted(moved, len(victims), before, folder_bytes(self.path))

    def _must_be_sound(self, record: Committed) -> None:
        bad = damaged_batches(self._segment(record), record, self._batches(record.pk))
        if bad:
            raise StoreCorruptError(
                f"segment {self._segment(record).path} is damaged in {len(bad)} batches and was not compacted. "
                "Put it right first with: repmatch repair"
            )

    def _segment(self, record: Committed) -> SegmentFile:
        return SegmentFile(self.path / "segments", record.pk, record.row_bytes)

    def _batches(self, segment_pk: int) -> list[tuple[int, int, int, int, int]]:
        with self._reading() as conn:
            found = conn.execute(
                "SELECT pk, first, count, crc32, journal_end FROM registry.batches WHERE segment_pk = ? ORDER BY first",
                [segment_pk],
            ).fetchall()
        return [tuple(row) for row in found]

    def _move(self, victims: Sequence[Committed]) -> int:
        """Append the live rows of segments anew, dataset by dataset and in the dataset's order."""
        numbers = [record.pk for record in victims]
        if not numbers:
            return 0
        with self._transaction() as conn:  # nothing more is appended to them
            conn.execute(
                "UPDATE registry.segments SET sealed = true WHERE pk IN (SELECT unnest(?::INTEGER[]))", [numbers]
            )
        moved = 0
        for dataset, space, encoding, keys in self._living(numbers):
            row_bytes = next(record.row_bytes for record in victims)
            step = max(1, min(MOVE_ROWS, MOVE_BYTES // row_bytes))
            for lo in range(0, len(keys), step):
                part = keys[lo : lo + step]
                self._append_raw(dataset.name, space, encoding, self._raw(part, numbers, space, encoding))
                moved += len(part)
        return moved

    def _living(self, numbers: list[int]) -> Iterator[tuple[Dataset, Space, Encoding, NDArray[np.int64]]]:
        with self._reading() as conn:
            groups = conn.execute(
                "SELECT DISTINCT d.name, p.id, s.encoding FROM registry.factors f "
                "JOIN registry.instances i ON i.pk = f.instance_pk JOIN registry.datasets d ON d.pk = i.dataset_pk "
                "JOIN registry.segments s ON s.pk = f.segment_pk JOIN registry.spaces p ON p.pk = s.space_pk "
                "WHERE f.segment_pk IN (SELECT unnest(?::INTEGER[])) ORDER BY ALL",
                [numbers],
            ).fetchall()
        for name, space_id, encoding in groups:
            with self._reading() as conn:
                columns = conn.execute(
                    "SELECT f.instance_pk FROM registry.factors f JOIN registry.instances i ON i.pk = f.instance_pk "
                    "JOIN registry.datasets d ON d.pk = i.dataset_pk JOIN registry.segments s ON s.pk = f.segment_pk "
                    "JOIN registry.spaces p ON p.pk = s.space_pk WHERE d.name = ? AND p.id = ? AND s.encoding = ? "
                    "AND f.segment_pk IN (SELECT unnest(?::INTEGER[])) ORDER BY 1",
                    [name, space_id, encoding, numbers],
                ).fetchnumpy()
            yield self.dataset(name), self.space(space_id), encoding, np.asarray(columns["instance_pk"], np.int64)

    def _raw(self, keys: NDArray[np.int64], numbers: list[int], space: Space, encoding: Encoding) -> RawBatch:
        """Read rows, bytes and facts of instances whose factors lie in some segments."""
        import pyarrow as pa

        names = ", ".join(f"i.{name}" for name in ROW_COLUMNS.split(", "))
        with self._reading() as conn:
            conn.register("moving", pa.table({"pos": np.arange(len(keys)), "pk": keys}))
            found = conn.execute(
                f"SELECT f.segment_pk, f.row, f.loss, f.tokens, f.truncated, s.row_bytes, {names} FROM moving m "
                "JOIN registry.instances i ON i.pk = m.pk JOIN registry.factors f ON f.instance_pk = m.pk "
                "JOIN registry.segments s ON s.pk = f.segment_pk JOIN registry.spaces p ON p.pk = s.space_pk "
                "WHERE p.id = ? AND s.encoding = ? AND s.pk IN (SELECT unnest(?::INTEGER[])) ORDER BY m.pos",
                [space.id, encoding, numbers],
            ).fetchall()
            conn.unregister("moving")
        values = np.empty((len(found), int(found[0][5])), np.uint8)
        where = np.asarray([row[:2] for row in found], np.int64)
        for number in np.unique(where[:, 0]).tolist():
            here = np.flatnonzero(where[:, 0] == number)
            rows = where[here, 1]
            check_places(rows, "factors")
            file = SegmentFile(self.path / "segments", number, values.shape[1])
            values[here] = MappedSegment(file, int(rows.max()) + 1).rows[rows]
        return RawBatch(
            rows=tuple(Row(*row[6:]) for row in found),
            values=values,
            losses=tuple(row[2] for row in found),
            tokens=tuple(row[3] for row in found),
            truncated=tuple(row[4] for row in found),
        )

    def _drop(self, victims: Sequence[Committed]) -> None:
        """Remove segments that no factor lies in any more: from the catalog, durably, and then from the disk."""
        numbers = [record.pk for record in victims]
        if not numbers:
            return
        which = "(SELECT unnest(?::INTEGER[]))"
        with self._transaction() as conn:
            (left,) = first(
                conn.execute(f"SELECT count(*) FROM registry.factors WHERE segment_pk IN {which}", [numbers])
            )
            if left:
                raise StoreCorruptError(f"{left} factors still lie in segments {numbers}; nothing was removed.")
            conn.execute(
                "INSERT INTO registry.dropped SELECT s.pk, coalesce(max(b.pk), 0), now()::TIMESTAMP FROM "
                f"registry.segments s LEFT JOIN registry.batches b ON b.segment_pk = s.pk WHERE s.pk IN {which} "
                "GROUP BY s.pk",
                [numbers],
            )
            conn.execute(f"DELETE FROM registry.batches WHERE segment_pk IN {which}", [numbers])
            conn.execute(f"DELETE FROM registry.segments WHERE pk IN {which}", [numbers])
        self._catalog.checkpoint()
        remove_segments(self.path / "segments", numbers)
