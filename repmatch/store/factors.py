"""Appending instance factors by the write protocol, and reading them back."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import Dataset, Encoding, FactorBatch, Factors, Row, Space
from repmatch.errors import RepMatchError, StoreCorruptError, StoreError, UnknownNameError, UsageError
from repmatch.store.database import first
from repmatch.store.encoding import RowFormat
from repmatch.store.instances import Instances
from repmatch.store.journal import BatchEntry, Journal
from repmatch.store.mapping import MappedSegment
from repmatch.store.records import check_unique, dataset_value, enter_batch, next_key, rows_table
from repmatch.store.recovery import COMMITTED, Committed, journal_of, put_segment, settle
from repmatch.store.segment import SegmentFile, SegmentHeader

logger = logging.getLogger(__name__)
_MAX_ROWS = 1 << 48
ATTEMPTS = 5


def check_places(rows: NDArray[np.int64], whose: str) -> None:
    """Refuse places in a segment that cannot be.

    Args:
        rows: (n,) numbers of rows in segments, as the catalog has them.
        whose: what lies there, for the message.

    Raises:
        StoreCorruptError: a number is negative or beyond any segment.
    """
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < _MAX_ROWS:
        raise StoreCorruptError(
            f"the catalog places {whose} at rows {int(rows.min())} to {int(rows.max())} of a segment, which makes no "
            "sense. Restore the store from a backup."
        )


@dataclass(frozen=True)
class Located:
    """Where the factors of some instances lie.

    Attributes:
        space: their space.
        encoding: their encoding.
        keys: (n,) keys of the instances.
        segments: (n,) numbers of the segments.
        rows: (n,) rows in them.
        maps: number of a segment -> its rows; held from the time of the look-up, so that a later compaction does not
            pull them away.
    """

    space: Space
    encoding: Encoding
    keys: NDArray[np.int64]
    segments: NDArray[np.int64]
    rows: NDArray[np.int64]
    maps: Mapping[int, MappedSegment]

    def part(self, index: slice | NDArray[np.integer[Any]] | NDArray[np.bool_]) -> Located:
        """Return some of them.

        Args:
            index: a slice, positions or a mask.

        Returns:
            Those, in that order.
        """
        return replace(self, keys=self.keys[index], segments=self.segments[index], rows=self.rows[index])

    def load(self, ids: tuple[str, ...] | None = None) -> Factors:
        """Read their factors; a view of the file where they lie in one piece.

        Args:
            ids: the ids of the instances; None: empty texts in their place.

        Returns:
            The factors.
        """
        form, n = RowFormat(self.space.layout, self.encoding), len(self.keys)
        segments, rows = self.segments, self.rows
        if n and _in_one_piece(segments, rows):
            raw = self.maps[int(segments[0])].rows[rows[0] : rows[0] + n]
        else:
            raw = np.zeros((n, form.row_bytes), np.uint8)
            for number in np.unique(segments):
                here = np.flatnonzero(segments == number)
                raw[here] = self.maps[int(number)].rows[rows[here]]
        parts = form.decode(raw)
        return Factors(
            ids=("",) * n if ids is None else ids,
            layout=self.space.layout,
            encoding=self.encoding,
            flat=parts.flat,
            bits=parts.bits,
            norms=parts.norms,
            cores=parts.cores,
            space_id=self.space.id,
        )


@dataclass(frozen=True)
class RawBatch:
    """Rows with their factors as a segment keeps them.

    Attributes:
        rows: the rows, n of them.
        values: (n, row_bytes) uint8, C order.
        losses: loss of each.
        tokens: tokens of each.
        truncated: whether each was cut.
    """

    rows: tuple[Row, ...]
    values: NDArray[np.uint8]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


class FactorTables(Instances):
    """Instance factors."""

    def append(self, dataset_name: str, space_id: str, encoding: Encoding, batch: FactorBatch) -> None:
        """Store rows and their factors together, durably: after the return both are there, before it neither.

        A row whose id is in the dataset replaces that row and its factor.

        Args:
            dataset_name: the dataset, which is there.
            space_id: the space of the factors, which is there.
            encoding: how to keep them.
            batch: rows and factors.

        Raises:
            UsageError: the batch does not fit the space, or sign codes are asked for with a rank above 1.
            StoreError: the disk is full or cannot be written; what was committed stays.
        """
        if not batch.rows:
            return
        check_unique(batch.rows)
        with self.writing(), ThreadPoolExecutor(1) as pool:
            space = self._known_space(space_id)
            values = pool.submit(RowFormat(space.layout, encoding).encode, batch)
            table = rows_table(batch.rows)  # raises for what cannot be stored before anything is written
            raw = RawBatch(
                rows=batch.rows,
                values=values.result(),
                losses=tuple(np.asarray(batch.losses, np.float64).tolist()),
                tokens=tuple(batch.tokens.tolist()),
                truncated=tuple(np.asarray(batch.truncated, np.bool_).tolist()),
            )
            self._append_raw(dataset_name, space, encoding, raw, table)

    def append_encoded(self, dataset_name: str, space_id: str, encoding: Encoding, raw: RawBatch) -> None:
        """Store rows with factors that were encoded elsewhere; otherwise as `append`.

        Args:
            dataset_name: the dataset, which is there.
            space_id: the space of the factors, which is there.
            encoding: how they are kept.
            raw: rows and encoded factors.

        Raises:
            UsageError: the bytes do not fit the space and encoding.
            StoreError: the disk is full or cannot be written; what was committed stays.
        """
        check_unique(raw.rows)
        with self.writing():
            space = self._known_space(space_id)
            expected = (len(raw.rows), RowFormat(space.layout, encoding).row_bytes)
            if raw.values.shape != expected or raw.values.dtype != np.uint8:
                raise UsageError(
                    f"the encoded factors are {raw.values.dtype} of shape {raw.values.shape}; expected uint8 of shape "
                    f"{expected}."
                )
            self._append_raw(dataset_name, space, encoding, raw)

    def _known_space(self, space_id: str) -> Space:
        """Return a space, which never changes, without asking the catalog twice."""
        if space_id not in self._spaces:
            self._spaces[space_id] = self.space(space_id)
        return self._spaces[space_id]

    def _append_raw(self, dataset: str, space: Space, encoding: Encoding, raw: RawBatch, table: Any = None) -> None:
        """Append encoded rows by the write protocol; nothing or all of it is there afterwards."""
        number = 0
        try:
            with self._transaction() as conn:
                number = self._write_batch(conn, (self.dataset(dataset), space, encoding), raw, table)
        except BaseException as error:
            if not self._settled(number) or not isinstance(error, StoreError):
                raise
            logger.warning("batch %d was committed although DuckDB reported: %s", number, error)

    def _write_batch(self, conn: Any, kind: tuple[Dataset, Space, Encoding], raw: RawBatch, table: Any) -> int:
        dataset, space, encoding = kind
        file, record = self._segment_for(conn, space, encoding, raw.values.shape[1])
        entry = BatchEntry(
            number=next_key(conn, "batches"),
            first=record.rows,
            crc32=zlib.crc32(raw.values.data),
            dataset=dataset_value(dataset),
            rows=raw.rows,
            losses=raw.losses,
            tokens=raw.tokens,
            truncated=raw.truncated,
        )
        with ThreadPoolExecutor(1) as pool:  # the rows are on the disk before the journal speaks of them
            written = pool.submit(file.write, record.rows, raw.values)
            frame = entry.to_frame()
            written.result()
        end = journal_of(file).write(record.journal_bytes, frame)
        enter_batch(conn, entry, file.number, end, table)
        return entry.number

    def _settled(self, number: int) -> bool:
        """After a failed transaction: cut what it left, and say whether its commit happened all the same."""
        try:
            settle(self._catalog, self.path)
            with self._reading() as conn:
                return bool(first(conn.execute("SELECT 1 FROM registry.batches WHERE pk = ?", [number])))
        except RepMatchError as error:
            logger.warning("could not look at the store after a failed write: %s", error)
            return False

    def _segment_for(
        self, conn: Any, space: Space, encoding: Encoding, row_bytes: int
    ) -> tuple[SegmentFile, Committed]:
        folder = self.path / "segments"
        found = first(
            conn.execute(
                f"SELECT * FROM ({COMMITTED}) c(pk, row_bytes, sealed, rows, journal_bytes) WHERE NOT sealed AND pk IN "
                "(SELECT s.pk FROM registry.segments s JOIN registry.spaces p ON p.pk = s.space_pk WHERE p.id = ? "
                "AND s.encoding = ?) ORDER BY pk DESC LIMIT 1",
                [space.id, encoding],
            )
        )
        if found:
            record = Committed(*found)
            file = SegmentFile(folder, record.pk, record.row_bytes)
            if file.offset(record.rows) < self.segment_bytes and journal_of(file).size() >= record.journal_bytes:
                return file, record
            conn.execute(
                "UPDATE registry.segments SET sealed = true, sha256 = ? WHERE pk = ?",
                [file.sha256(record.rows), record.pk],
            )
        number = next_key(conn, "segments")
        while list(folder.glob(f"{number:06d}.*")):
            number += 1
        journal = Journal(folder / f"{number:06d}.journal")
        head_end = journal.create({"segment": number, "space": space.to_json(), "encoding": encoding})
        uuid = first(conn.execute("SELECT value FROM registry.meta WHERE key = 'uuid'"))[0]
        file = SegmentFile.create(folder, SegmentHeader(uuid, number, space.id, encoding, row_bytes))
        put_segment(conn, space, encoding, file, head_end)
        return file, Committed(number, row_bytes, False, 0, head_end)

    def factors(self, dataset: str, *, ids: Sequence[str] | None = None, space_id: str | None = None) -> Factors:
        """Return instance factors; a view of the file where they lie in one piece.

        Args:
            dataset: the dataset.
            ids: which, in which order; None: all that have one, in the dataset's order.
            space_id: another space than the dataset's.

        Returns:
            The factors.

        Raises:
            UnknownNameError: an id is not in the dataset, or has no factor in the space.
        """
        located = self._locate(dataset, space_id, ids)
        return located.load(tuple(ids)) if ids is not None else self._load_named(located)

    def iter_factors(self, dataset: str, size: int = 8192, *, space_id: str | None = None) -> Iterator[Factors]:
        """Stream the factors of a dataset in its order.

        Args:
            dataset: the dataset.
            size: how many at a time.
            space_id: another space than the dataset's.

        Returns:
            An iterator over parts of at most `size`.
        """
        located = self._locate(dataset, space_id, None)
        parts = (located.part(slice(lo, lo + size)) for lo in range(0, len(located.keys), size))
        return (self._load_named(part) for part in parts)

    def _load_named(self, located: Located) -> Factors:
        """Read factors with their ids; those whose instances were deleted since they were located are left out."""
        ids = self._ids_of(located.keys)
        if len(ids) == len(located.keys):
            return located.load(ids)
        left = dict(row for rows in self._chunks(located.keys, "i.pk, i.id", 65536) for row in rows)
        return located.part(np.isin(located.keys, list(left))).load(tuple(left.values()))

    def _ids_of(self, keys: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(row[0] for rows in self._chunks(keys, "i.id", 65536) for row in rows)

    def _locate(self, dataset: str, space_id: str | None, ids: Sequence[str] | None) -> Located:
        """Look up where factors lie and map their segments; again where a compaction moves them meanwhile."""
        for attempt in range(ATTEMPTS):
            found = self._look_up(dataset, space_id, ids)
            numbers, last = np.unique(found.segments), found.rows
            try:
                form = RowFormat(found.space.layout, found.encoding)
                maps = {
                    int(number): MappedSegment(
                        SegmentFile(self.path / "segments", int(number), form.row_bytes),
                        int(last[found.segments == number].max()) + 1,
                    )
                    for number in numbers
                }
                return replace(found, maps=maps)
            except (StoreCorruptError, FileNotFoundError):
                with self._reading() as conn:
                    known = {row[0] for row in conn.execute("SELECT pk FROM registry.segments").fetchall()}
                if attempt + 1 == ATTEMPTS or known.issuperset(numbers.tolist()):
                    raise
        raise AssertionError("unreachable")

    def _look_up(self, dataset: str, space_id: str | None, ids: Sequence[str] | None) -> Located:
        wanted = None if ids is None else self._keys(dataset, ids)
        with self._reading() as conn:
            pk, record = self._dataset(conn, dataset)
            chosen = space_id or record.space_id
            if chosen is None:
                raise UnknownNameError(
                    f"dataset {dataset!r} has no factors yet. Make them with: repmatch ingest FILE --dataset {dataset}"
                )
            space = self.space(chosen)
            query = (
                "SELECT f.instance_pk, f.segment_pk, f.row FROM registry.factors f WHERE f.segment_pk IN (SELECT s.pk "
                "FROM registry.segments s JOIN registry.spaces p ON p.pk = s.space_pk WHERE p.id = ? AND s.encoding = ?"
                ") AND f.instance_pk IN "
            )
            if wanted is None:
                query += "(SELECT pk FROM registry.instances WHERE dataset_pk = ?)"
                columns = conn.execute(query, [chosen, record.encoding, pk]).fetchnumpy()
            else:
                query += "(SELECT unnest(?::BIGINT[]))"
                columns = conn.execute(query, [chosen, record.encoding, np.unique(wanted).tolist()]).fetchnumpy()
        keys, segments, rows = (np.asarray(columns[name], np.int64) for name in ("instance_pk", "segment_pk", "row"))
        check_places(rows, f"factors of {dataset!r}")
        if len(keys) and not bool((np.diff(keys) > 0).all()):
            order = np.argsort(keys)
            keys, segments, rows = keys[order], segments[order], rows[order]
        if wanted is not None:
            at = np.searchsorted(keys, wanted)
            there = at < len(keys)
            there[there] = keys[at[there]] == wanted[there]
            if not there.all() and ids is not None:
                raise UnknownNameError(
                    f"instance {ids[int(np.argmin(there))]!r} of {dataset!r} has no factor in space {chosen}. "
                    f"Make it with: repmatch ingest FILE --dataset {dataset}"
                )
            keys, segments, rows = wanted, segments[at], rows[at]
        return Located(space, record.encoding, keys, segments, rows, {})


def _in_one_piece(segments: NDArray[np.int64], rows: NDArray[np.int64]) -> bool:
    if segments[0] != segments[-1] or rows[-1] - rows[0] != len(rows) - 1:
        return False  # the common case of both orders, told without a look at every row
    return bool((segments == segments[0]).all()) and bool((rows[1:] - rows[:-1] == 1).all())
