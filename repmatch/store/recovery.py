"""What a writer puts right before it writes: torn tails, commits that the catalog lost, leftovers."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repmatch.datamodels import Space
from repmatch.errors import StoreCorruptError
from repmatch.store.adapter_file import parse_adapter, put_adapter
from repmatch.store.catalog import Catalog
from repmatch.store.files import sync_folder
from repmatch.store.journal import BatchEntry, Journal
from repmatch.store.meta import read_meta
from repmatch.store.records import dataset_of, enter_batch, next_key, put_dataset, put_space, space_of
from repmatch.store.scratch import remove_stale
from repmatch.store.segment import HEADER_BYTES, SegmentFile

logger = logging.getLogger(__name__)
_MAX_BYTES = 1 << 48
_FILES = (".bin", ".journal")


@dataclass(frozen=True, slots=True)
class Committed:
    """A segment as the catalog knows it.

    Attributes:
        pk: its key, also the number of its file.
        row_bytes: bytes of a row.
        sealed: whether it takes no more rows.
        rows: committed rows.
        journal_bytes: end of the committed frames of its journal.
    """

    pk: int
    row_bytes: int
    sealed: bool
    rows: int
    journal_bytes: int


COMMITTED = (
    "SELECT s.pk, s.row_bytes, s.sealed, coalesce(max(b.first + b.count), 0), "
    "coalesce(max(b.journal_end), s.journal_head) FROM registry.segments s "
    "LEFT JOIN registry.batches b ON b.segment_pk = s.pk GROUP BY s.pk, s.row_bytes, s.sealed, s.journal_head"
)


def committed_segments(conn: Any) -> list[Committed]:
    """Return every segment of the catalog with its committed extent.

    Args:
        conn: an open connection.

    Returns:
        The segments by number.

    Raises:
        StoreCorruptError: sizes that no segment has.
    """
    found = [Committed(*row) for row in conn.execute(f"{COMMITTED} ORDER BY s.pk").fetchall()]
    for record in found:
        sizes = (record.pk, record.row_bytes, record.rows, record.journal_bytes)
        if not all(0 <= size < _MAX_BYTES for size in sizes) or 0 in (record.pk, record.row_bytes):
            raise StoreCorruptError(
                f"the catalog's record of segment {record.pk} makes no sense ({record.rows} rows of {record.row_bytes} "
                "bytes). Restore the store from a backup."
            )
    return found


def journal_of(segment: SegmentFile) -> Journal:
    """Return the journal beside a segment.

    Args:
        segment: the segment.

    Returns:
        Its journal, which may not exist.
    """
    return Journal(segment.path.with_suffix(".journal"))


@dataclass(frozen=True)
class _Found:
    """A whole batch in a journal that the catalog does not have."""

    segment_pk: int
    end: int
    entry: BatchEntry


def recover(catalog: Catalog, folder: Path) -> None:
    """Bring segments, journals and catalog to one state. Only the holder of the writer's lock may call this.

    Args:
        catalog: the catalog.
        folder: the store.

    Raises:
        StoreCorruptError: a segment is shorter than its committed rows, or its own header speaks of rows of another
            size than the catalog. Nothing is changed then.
    """
    segments = folder / "segments"
    with catalog.reading() as conn:
        kept = _kept(conn)
        adapters = {row[0] for row in conn.execute("SELECT id FROM registry.adapters").fetchall()}
        running = conn.execute(
            "SELECT pk, pid FROM registry.runs WHERE status = 'running' AND host = ?", [socket.gethostname()]
        ).fetchall()
    for record in kept.known:
        SegmentFile(segments, record.pk, record.row_bytes).check_size(record.rows)
    _check_rows(segments, kept.known)
    known, strange = _enter_pending(catalog, segments, kept)
    _cut(segments, known)
    _drop_empty(segments, {record.pk for record in known}, strange)
    _adopt_adapters(catalog, folder / "adapters", adapters)
    _close_runs(catalog, running)
    remove_stale(folder / "staging")


def enter_pending(catalog: Catalog, folder: Path) -> None:
    """Enter the whole batches that journals hold and the catalog does not; segments that are damaged are passed over.

    Nothing may be appended before: a new batch would take the number of one that waits here.

    Args:
        catalog: the catalog.
        folder: the store.

    Raises:
        StoreCorruptError: the catalog has a batch of the same number. Nothing is changed then.
    """
    with catalog.reading() as conn:
        kept = _kept(conn)
    _enter_pending(catalog, folder / "segments", kept)


@dataclass(frozen=True)
class _Kept:
    """What a catalog says of segments."""

    known: list[Committed]
    dropped: list[int]
    uuid: str


def _kept(conn: Any) -> _Kept:
    dropped = [row[0] for row in conn.execute("SELECT segment_pk FROM registry.dropped").fetchall()]
    return _Kept(committed_segments(conn), dropped, read_meta(conn)["uuid"])


def _enter_pending(catalog: Catalog, segments: Path, kept: _Kept) -> tuple[list[Committed], list[SegmentFile]]:
    """See `enter_pending`; return the catalog's segments afterwards, and those that it did not have before."""
    remove_segments(segments, kept.dropped)
    found: list[_Found] = []
    for record in kept.known:
        file = SegmentFile(segments, record.pk, record.row_bytes)
        if not record.sealed and file.size() >= file.offset(record.rows):
            found += _ahead(file, record)
    strange = _unknown(segments, {record.pk for record in kept.known}, kept.uuid)
    for file, head_end in strange:
        found += _ahead(file, Committed(file.number, file.row_bytes, False, 0, head_end))
    known = kept.known
    if found:
        _adopt(catalog, segments, found, {file.number: end for file, end in strange})
        with catalog.reading() as conn:
            known = committed_segments(conn)
    return known, [file for file, _ in strange]


def _ahead(file: SegmentFile, record: Committed) -> list[_Found]:
    """List the whole batches behind the committed ones, in order, checked against the segment's bytes."""
    out: list[_Found] = []
    rows = record.rows
    for end, value in journal_of(file).frames(record.journal_bytes):
        try:
            entry = BatchEntry.from_value(value)
            dataset_of(entry.dataset)
        except (ValueError, StoreCorruptError):
            break
        count = len(entry.rows)
        whole = file.size() >= file.offset(rows + count)
        if entry.first != rows or not whole or file.crc32(rows, count) != entry.crc32:
            break
        out.append(_Found(record.pk, end, entry))
        rows += count
    return out


def _unknown(segments: Path, known: set[int], uuid: str) -> list[tuple[SegmentFile, int]]:
    """List segment files of this store that the catalog does not have, with the end of their journal's head."""
    out = []
    for path in sorted(segments.glob("*.bin")):
        number = _number(path)
        if number is None or number in known:
            continue
        try:
            header = SegmentFile(segments, number, 1).header()
        except StoreCorruptError:
            continue
        file = SegmentFile(segments, header.number, header.row_bytes)
        head = next(journal_of(file).frames(), None)
        if header.store == uuid and header.number == number and head is not None and _names_space(head[1]):
            out.append((file, head[0]))
    return out


def _number(path: Path) -> int | None:
    """The number of a segment's file; None where it is not named like one."""
    return int(path.stem) if re.fullmatch(r"[0-9]{6,18}", path.stem) else None


def _names_space(head: dict[str, Any]) -> bool:
    with suppress(StoreCorruptError):
        return bool(space_of(head.get("space", "")))
    return False


def _adopt(catalog: Catalog, segments: Path, found: list[_Found], heads: dict[int, int]) -> None:
    found = sorted(found, key=lambda item: item.entry.number)
    with catalog.transaction() as conn:
        last = next_key(conn, "batches") - 1
        for item in found:
            if item.segment_pk in heads:
                _enter_segment(conn, segments, item.segment_pk, heads.pop(item.segment_pk))
            if item.entry.number <= last:
                raise StoreCorruptError(
                    f"the journal of segment {item.segment_pk} holds batch {item.entry.number}, which the catalog has "
                    "elsewhere. Nothing was changed. Restore the store from a backup."
                )
            last = item.entry.number
            put_dataset(conn, dataset_of(item.entry.dataset))
            enter_batch(conn, item.entry, item.segment_pk, item.end)
    rows = sum(len(item.entry.rows) for item in found)
    if len(found) == 1:
        logger.info("entered a batch of %d rows whose commit had been interrupted", rows)
    else:
        logger.warning(
            "the catalog %s had lost its last %d commits (%d rows); they were entered again from the journal. Lost "
            "commits come from a damaged disk or write-ahead log: check the store with verify().",
            catalog.path,
            len(found),
            rows,
        )


def remove_segments(segments: Path, numbers: Sequence[int]) -> None:
    """Remove the files of segments that the catalog has dropped.

    Args:
        segments: the store's `segments` folder.
        numbers: which.
    """
    there = [path for number in numbers for path in segments.glob(f"{number:06d}.*") if path.suffix in _FILES]
    for path in there:
        path.unlink(missing_ok=True)
    if there:
        sync_folder(segments)


def _enter_segment(conn: Any, segments: Path, number: int, head_end: int) -> None:
    header = SegmentFile(segments, number, 1).header()
    file = SegmentFile(segments, number, header.row_bytes)
    head = next(journal_of(file).frames())[1]
    put_segment(conn, space_of(head["space"]), header.encoding, file, head_end)


def put_segment(conn: Any, space: Space, encoding: str, file: SegmentFile, head_end: int) -> None:
    """Enter a segment.

    Args:
        conn: a connection in a transaction.
        space: its space.
        encoding: its encoding.
        file: the file.
        head_end: end of the head of its journal.
    """
    conn.execute(
        "INSERT INTO registry.segments VALUES (?, ?, ?, ?, ?, false, NULL, now()::TIMESTAMP)",
        [file.number, put_space(conn, space), encoding, file.row_bytes, head_end],
    )


def _unsealed(segments: Path, known: list[Committed]) -> list[tuple[Committed, SegmentFile]]:
    return [(record, SegmentFile(segments, record.pk, record.row_bytes)) for record in known if not record.sealed]


def _check_rows(segments: Path, known: list[Committed]) -> None:
    """Check the row size of every segment that `_cut` may cut; a caller does it before it changes anything."""
    for _, file in _unsealed(segments, known):
        file.check_rows()


def _cut(segments: Path, known: list[Committed]) -> None:
    for record, file in _unsealed(segments, known):
        if file.size() > file.offset(record.rows):
            file.truncate(record.rows)
        journal = journal_of(file)
        if journal.size() > record.journal_bytes:
            journal.truncate(record.journal_bytes)
        elif journal.size() < record.journal_bytes:
            logger.warning(
                "the journal %s is shorter than what was committed (%d of %d bytes); the rows themselves are there, "
                "but it cannot restore them any more.",
                journal.path,
                journal.size(),
                record.journal_bytes,
            )


def settle(catalog: Catalog, folder: Path) -> None:
    """Cut the tails that a failed append left, so that it has either happened or not.

    Args:
        catalog: the catalog.
        folder: the store.
    """
    with catalog.reading() as conn:
        known = committed_segments(conn)
    _check_rows(folder / "segments", known)
    _cut(folder / "segments", known)


def _drop_empty(segments: Path, known: set[int], strange: list[SegmentFile]) -> None:
    """Remove segments that were started and never committed to; set aside what cannot be told."""
    heads = {file.number for file in strange}
    for path in sorted(segments.glob("*.bin")):
        number = _number(path)
        if number is None or number in known:
            continue
        journal = Journal(path.with_suffix(".journal"))
        frames = journal.frames()
        head = next(frames, None)
        if path.stat().st_size <= HEADER_BYTES or (number in heads and head and journal.torn(head[0])):
            path.unlink()
            journal.path.unlink(missing_ok=True)
        else:
            logger.warning("%s belongs to no commit of this store and cannot be read; renamed to *.lost", path)
            path.rename(path.with_suffix(".bin.lost"))
            if journal.path.exists():
                journal.path.rename(path.with_suffix(".journal.lost"))
    for path in segments.glob("*.journal"):
        if not path.with_suffix(".bin").exists() and len(list(Journal(path).frames())) <= 1:
            path.unlink()


def _adopt_adapters(catalog: Catalog, folder: Path, known: set[str]) -> None:
    """Enter adapters whose file is there and whose row is not; remove half-written files."""
    for path in folder.glob("*.tmp"):
        path.unlink()
    files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for name in sorted(set(files) - known):
        data = files[name].read_bytes()
        try:
            adapter = parse_adapter(data, files[name])
        except StoreCorruptError as error:
            logger.warning("%s", error)
            continue
        if adapter.id != name:
            logger.warning("%s says that it is the adapter %r; it is not entered.", files[name], adapter.id)
            continue
        with catalog.transaction() as conn:
            put_adapter(conn, adapter, data)
        logger.info("entered adapter %s, whose commit had been interrupted or lost", name)


def _close_runs(catalog: Catalog, running: list[tuple[int, int]]) -> None:
    """Mark runs as interrupted whose process is gone."""
    gone = [pk for pk, pid in running if Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()]
    if gone:
        with catalog.transaction() as conn:
            conn.execute(
                "UPDATE registry.runs SET status = 'interrupted' WHERE pk IN (SELECT unnest(?::BIGINT[]))", [gone]
            )
