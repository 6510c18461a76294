"""Repair: what cannot be trusted is dropped, exactly that, and left to the next ingest; damaged files are set aside."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from repmatch.errors import RepMatchError, StoreCorruptError
from repmatch.store.catalog import NAME, REBUILT, Catalog, explain
from repmatch.store.database import first
from repmatch.store.files import sync_folder, writing_to
from repmatch.store.health import Finding, damaged_batches
from repmatch.store.journal import BatchEntry
from repmatch.store.recovery import Committed, committed_segments, enter_pending, journal_of, recover
from repmatch.store.removal import Removal
from repmatch.store.salvage import Salvage
from repmatch.store.segment import HEADER_BYTES, SegmentFile, SegmentHeader

logger = logging.getLogger(__name__)
ASIDE = ".damaged"

_ORPHANS = (
    "factors WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "factors WHERE segment_pk NOT IN (SELECT pk FROM registry.segments)",
    "batches WHERE segment_pk NOT IN (SELECT pk FROM registry.segments)",
    "scores WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "scores WHERE adapter_pk NOT IN (SELECT pk FROM registry.adapters)",
    "members WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "picks WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "represented WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "members WHERE subset_pk NOT IN (SELECT pk FROM registry.subsets)",
    "picks WHERE coreset_pk NOT IN (SELECT pk FROM registry.coresets)",
    "represented WHERE coreset_pk NOT IN (SELECT pk FROM registry.coresets)",
)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did.

    Attributes:
        findings: what was wrong before.
        factors: factors dropped: the next ingest of their dataset computes them again.
        datasets: datasets that these belong to.
        adapters: subset adapters dropped: they are trained again when they are needed.
        set_aside: damaged files that were kept under another name.
        left: what is still wrong.
    """

    findings: tuple[Finding, ...]
    factors: int
    datasets: tuple[str, ...]
    adapters: tuple[str, ...]
    set_aside: tuple[str, ...]
    left: tuple[Finding, ...]


class Repair(Removal):
    """Brings a damaged store to a sound state."""

    def repair(self) -> Repaired:
        """Drop what fails its checksum, keep everything else, and set damaged files aside.

        Of a catalog that is damaged every table that can be read is kept, and a damaged write-ahead log costs its own
        commits alone. Instances and factors that cannot be read, or all where the catalog is gone, are taken from the
        journals, adapters from their files; then scores, subsets, coresets, runs and the quarantine list are lost as
        far as they cannot be read, and deletions are only known if they were compacted.

        Returns:
            What was wrong and what was done.
        """
        findings = self.verify() if self._catalog.exists() else self._lost_catalog()
        if not findings:
            with self.writing():  # enters what an interrupted write left in journals and adapter files
                return Repaired((), 0, (), (), (), ())
        aside: list[str] = []
        unnamed: list[Finding] = []
        with self._locked():
            if not self._readable():
                aside += self._rebuild(unnamed)
            aside += self._set_broken_headers_aside()
            enter_pending(self._catalog, self.path)  # of an interrupted write, maybe of a repair like this one
            lost, datasets = self._drop_damaged()
            adapters = self._drop_adapters(aside)
            self._drop_orphans()
            aside += self._rewrite()
            recover(self._catalog, self.path)
            self._catalog.checkpoint()
        lost += sum(finding.factors for finding in unnamed)
        return Repaired((*findings, *unnamed), lost, datasets, adapters, tuple(aside), tuple(self.verify()))

    def _lost_catalog(self) -> list[Finding]:
        if not self._catalog_is_lost():
            if any((self.path / "segments").glob("[0-9]*.journal")):
                raise StoreCorruptError(
                    f"of the store {self.path} only journals are left: catalog and segments are gone, so there is no "
                    "factor to keep. Restore them from a backup, or ingest the rows again into another folder."
                )
            raise self._missing()
        return [Finding(str(self.path / NAME), "the file is gone", "Rebuilt from the journals.")]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the writer's lock without the recovery that refuses a damaged store."""
        if self.mode == "r":
            self._enter_writing()  # raises
        if self._depth == 0:
            self._lock.acquire(self._wait)
        self._depth += 1
        try:
            if self._readable():
                self._catalog.migrate()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._lock.release()

    def _readable(self) -> bool:
        import duckdb

        try:
            with self._catalog.reading() as conn:
                for (name,) in conn.execute(
                    "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'registry'"
                ).fetchall():
                    conn.execute(f"SELECT bit_xor(hash(COLUMNS(*))) FROM registry.{name}").fetchall()
            return True
        except StoreCorruptError:
            return False
        except (duckdb.Error, RepMatchError) as error:
            problem = error if isinstance(error, RepMatchError) else explain(error, self._catalog.path)
            if "not a catalog" in str(problem) or not self._catalog.exists():
                return False
            raise problem from error

    def _rebuild(self, findings: list[Finding]) -> list[str]:
        """Make a new catalog; the damaged one and whatever the new one does not take in stay as copies.

        A damaged write-ahead log alone costs its own commits. Of a damaged catalog every table that can be read is
        kept; what cannot be read of instances and factors comes from the journals. The new catalog takes the old one's
        place at the very end, so that a repair that is killed begins anew.
        """
        aside = []
        log = self.path / f"{NAME}.wal"
        if log.exists():
            aside.append(self._aside(log))
            if self._readable():
                return aside
        old = Salvage(self._catalog.path) if self._catalog.exists() else None
        new = Catalog(self.path)
        new.path = self.path / REBUILT
        for leftover in (new.path, new.path.with_name(f"{REBUILT}.wal")):
            leftover.unlink(missing_ok=True)
        if old is not None and old.has_core:
            new.create(old.uuid, fill=old.fill)
        else:
            uuid, copies = self._uncertain_segments(findings)
            aside += copies
            spent = None if old is None else old.keep_spent
            new.create((old.uuid if old is not None else None) or uuid, fill=spent)
            recover(new, self.path)
            if old is not None:
                with new._opened(read_only=False, files=True) as conn:
                    old.enter(conn)
        if old is not None:
            aside.append(self._aside(self._catalog.path, keep=True))
        with writing_to(self.path):
            new.path.replace(self._catalog.path)
            sync_folder(self.path)
        return aside

    def _uncertain_segments(self, findings: list[Finding]) -> tuple[str | None, list[str]]:
        """Return the store's UUID as segments have it, and copies of those of which journals do not hold every row."""
        uuid: str | None = None
        aside: list[str] = []
        for path in sorted((self.path / "segments").glob("*.bin")):
            try:
                header = SegmentFile(path.parent, int(path.stem), 1).header()
            except (StoreCorruptError, ValueError):
                continue  # recovery sets it aside as *.lost
            uuid = uuid or header.store
            file = SegmentFile(path.parent, header.number, header.row_bytes)
            rows, whole = _journalled(file)
            there = max(0, file.size() - HEADER_BYTES) // file.row_bytes
            if rows < there:
                problem = f"{there - rows} of its {there} rows are named by no journal, and the catalog is gone"
                remedy = "Ingest their dataset again; the bytes stay beside it."
                findings.append(Finding(str(path), problem, remedy, there - rows))
            if not whole:
                for part in (path, path.with_suffix(".journal")):
                    copy = part.with_name(part.name + ASIDE)
                    if part.exists():
                        shutil.copyfile(part, copy)
                        aside.append(str(copy))
        return uuid, aside

    def _set_broken_headers_aside(self) -> list[str]:
        """A segment with a broken header gets its header again: rows are found without it, by the catalog."""
        aside = []
        with self._reading() as conn:
            uuid = first(conn.execute("SELECT value FROM registry.meta WHERE key = 'uuid'"))[0]
            known = {
                row[0]: row[1:]
                for row in conn.execute(
                    "SELECT s.pk, p.id, s.encoding, s.row_bytes FROM registry.segments s "
                    "JOIN registry.spaces p ON p.pk = s.space_pk"
                ).fetchall()
            }
        for number, (space_id, encoding, row_bytes) in known.items():
            file = SegmentFile(self.path / "segments", number, row_bytes)
            expected = SegmentHeader(uuid, number, space_id, encoding, row_bytes)
            if file.size() < HEADER_BYTES:
                continue
            try:
                header = file.header()
            except StoreCorruptError:
                header = None
            if header is not None and header != expected and replace(header, row_bytes=row_bytes) == expected:
                # The header has a checksum of its own, and the batches' tell whether it is right.
                with self._transaction() as conn:
                    conn.execute("UPDATE registry.segments SET row_bytes = ? WHERE pk = ?", [header.row_bytes, number])
            elif header != expected:
                copy = file.path.with_name(file.path.name + ASIDE)
                with writing_to(copy):
                    shutil.copyfile(file.path, copy)
                    with file.path.open("r+b") as opened:
                        opened.write(expected.to_bytes())
                aside.append(str(copy))
        return aside

    def _drop_damaged(self) -> tuple[int, tuple[str, ...]]:
        """Drop the factors of batches that fail their checksum."""
        lost = self.damaged()
        with self._reading() as conn:
            segments = committed_segments(conn)
        with self._transaction() as conn:
            for record in segments:
                for _, start, count, *_ in damaged_batches(self._segment(record), record, self._batches(record.pk)):
                    conn.execute(
                        "DELETE FROM registry.factors WHERE segment_pk = ? AND row BETWEEN ? AND ?",
                        [record.pk, start, start + count - 1],
                    )
        return lost.height, tuple(sorted(set(lost["dataset"].to_list())))

    def _rewrite(self) -> list[str]:
        """Move what is left of damaged segments, or of segments with a damaged journal, and set their files aside."""
        with self._reading() as conn:
            segments = committed_segments(conn)
            sums = dict(conn.execute("SELECT pk, sha256 FROM registry.segments WHERE sealed").fetchall())
        victims = [record for record in segments if self._is_damaged(record, sums.get(record.pk))]
        self._move(victims)
        aside = []
        for record in victims:
            file = self._segment(record)
            for path in (file.path, journal_of(file).path):
                if path.exists():
                    aside.append(self._aside(path))
        self._drop(victims)
        return aside

    def _is_damaged(self, record: Committed, digest: str | None) -> bool:
        file, batches = self._segment(record), self._batches(record.pk)
        if damaged_batches(file, record, batches):
            return True
        ends = [end for end, _ in journal_of(file).frames() if end <= record.journal_bytes]
        if ends[1:] != [batch[4] for batch in batches]:
            return True
        return digest is not None and file.sha256(record.rows) != digest

    def _drop_adapters(self, aside: list[str]) -> tuple[str, ...]:
        with self._reading() as conn:
            known = conn.execute("SELECT pk, id, sha256 FROM registry.adapters ORDER BY pk").fetchall()
        gone = []
        for pk, name, digest in known:
            path = self._adapter_path(name)
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                continue
            if path.exists():
                aside.append(self._aside(path))
            with self._transaction() as conn:
                conn.execute("DELETE FROM registry.scores WHERE adapter_pk = ?", [pk])
                conn.execute("DELETE FROM registry.adapters WHERE pk = ?", [pk])
            gone.append(name)
        return tuple(gone)

    def _drop_orphans(self) -> None:
        with self._transaction() as conn:
            for rows in _ORPHANS:
                conn.execute(f"DELETE FROM registry.{rows}")

    def _aside(self, path: Path, *, keep: bool = False) -> str:
        """Give a file another name, or a second one where it is to be replaced in one go."""
        target, count = path.with_name(path.name + ASIDE), 1
        while target.exists():
            count += 1
            target = path.with_name(f"{path.name}{ASIDE}{count}")
        with writing_to(path):
            if keep:
                target.hardlink_to(path)
            else:
                path.rename(target)
            sync_folder(path.parent)
        logger.warning("set aside as %s", target)
        return str(target)


def _journalled(file: SegmentFile) -> tuple[int, bool]:
    """Count the rows that a segment's journal names and a rebuilt catalog takes in; say whether that is all."""
    rows = end = 0
    for end, value in journal_of(file).frames():  # noqa: B007
        if "crc32" in value:
            try:
                entry = BatchEntry.from_value(value)
            except ValueError:
                return rows, False
            count = len(entry.rows)
            if entry.first != rows or file.size() < file.offset(rows + count):
                return rows, False
            if file.crc32(rows, count) != entry.crc32:
                return rows, False
            rows += count
    return rows, file.size() == file.offset(rows) and journal_of(file).size() == end
