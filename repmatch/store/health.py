"""What the store is made of, and whether it is sound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repmatch.errors import RepMatchError, StoreCorruptError
from repmatch.store.catalog import explain, first, read_meta
from repmatch.store.recovery import Committed, committed_segments, journal_of
from repmatch.store.runs import Runs
from repmatch.store.segment import SegmentFile

TABLES = [
    "spaces",
    "datasets",
    "instances",
    "segments",
    "batches",
    "factors",
    "adapters",
    "scores",
    "subsets",
    "members",
    "coresets",
    "picks",
    "represented",
    "runs",
    "quarantine",
]

_REFERENCES = {
    "an instance of no dataset": "instances WHERE dataset_pk NOT IN (SELECT pk FROM registry.datasets)",
    "a factor of no instance": "factors WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "a factor in no segment": "factors WHERE segment_pk NOT IN (SELECT pk FROM registry.segments)",
    "a segment of no space": "segments WHERE space_pk NOT IN (SELECT pk FROM registry.spaces)",
    "a batch of no segment": "batches WHERE segment_pk NOT IN (SELECT pk FROM registry.segments)",
    "a score of no instance": "scores WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "a score against no adapter": "scores WHERE adapter_pk NOT IN (SELECT pk FROM registry.adapters)",
    "a subset member that is no instance": "members WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "a pick that is no instance": "picks WHERE instance_pk NOT IN (SELECT pk FROM registry.instances)",
    "an id twice in a dataset": "(SELECT 1 FROM registry.instances GROUP BY dataset_pk, id HAVING count(*) > 1)",
    "a key of an instance twice": "(SELECT 1 FROM registry.instances GROUP BY pk HAVING count(*) > 1)",
    "two factors of an instance in one space and encoding": (
        "(SELECT 1 FROM registry.factors f JOIN registry.segments s ON s.pk = f.segment_pk "
        "GROUP BY f.instance_pk, s.space_pk, s.encoding HAVING count(*) > 1)"
    ),
    "a factor outside of the committed rows": (
        "factors f LEFT JOIN (SELECT segment_pk, max(first + count) AS rows FROM registry.batches GROUP BY 1) b "
        "ON b.segment_pk = f.segment_pk WHERE f.row >= coalesce(b.rows, 0)"
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the store that is not as it was committed.

    Attributes:
        where: file or table.
        problem: what is wrong.
        remedy: what to do.
    """

    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}"


class Health(Runs):
    """Facts about the store and its soundness."""

    def info(self) -> dict[str, Any]:
        """Return facts about the store as plain JSON values.

        Returns:
            path, uuid, schema, created, bytes by part, row counts, datasets, spaces, coresets, bytes an instance,
            quarantined rows.
        """
        with self._reading() as conn:
            meta = read_meta(conn)
            counts = {name: first(conn.execute(f"SELECT count(*) FROM registry.{name}"))[0] for name in TABLES}
        size = {
            "catalog": sum(p.stat().st_size for p in self.path.glob("catalog.duckdb*") if p.is_file()),
            "segments": _bytes(self.path / "segments", "*.bin"),
            "journals": _bytes(self.path / "segments", "*.journal"),
            "adapters": _bytes(self.path / "adapters", "*"),
        }
        total = sum(size.values())
        datasets = self.datasets().drop("created", "updated").to_dicts()
        coresets = self.coresets().drop("created", "arguments").to_dicts()
        return {
            "path": str(self.path),
            "uuid": meta["uuid"],
            "schema": int(meta["schema"]),
            "created": meta["created"],
            "bytes": {**size, "total": total},
            "counts": counts,
            "datasets": datasets,
            "spaces": [_about_space(self.space(i)) for i in self.spaces()["id"]],
            "coresets": coresets,
            "bytes_per_instance": round(total / counts["instances"], 1) if counts["instances"] else None,
            "quarantined": counts["quarantine"],
        }

    def verify(self) -> list[Finding]:
        """Check every checksum and every reference.

        Returns:
            What is wrong, nothing for a sound store. Uncommitted tails are no fault.
        """
        import duckdb

        self._ready()
        try:
            with self._catalog.reading() as conn:
                findings = list(_check_tables(conn))
                segments = committed_segments(conn)
                batches = conn.execute(
                    "SELECT segment_pk, pk, first, count, crc32, journal_end FROM registry.batches ORDER BY pk"
                ).fetchall()
                sums = dict(conn.execute("SELECT pk, sha256 FROM registry.segments WHERE sealed").fetchall())
                adapters = conn.execute("SELECT id, sha256 FROM registry.adapters ORDER BY pk").fetchall()
        except (duckdb.Error, RepMatchError) as error:
            problem = error if isinstance(error, RepMatchError) else explain(error, self._catalog.path)
            return [Finding(str(self._catalog.path), str(problem), "Restore the store from a backup.")]
        for record in segments:
            file = SegmentFile(self.path / "segments", record.pk, record.row_bytes)
            mine = [batch[1:] for batch in batches if batch[0] == record.pk]
            findings += _check_segment(file, record, mine, sums.get(record.pk))
            findings += _check_journal(file, record, mine)
        for adapter_id, digest in adapters:
            findings += _check_adapter(self._adapter_path(adapter_id), digest)
        return findings


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _about_space(space: Any) -> dict[str, Any]:
    about = {name: getattr(space, name) for name in ("id", "model", "task", "rank", "alpha", "seed", "warm_start")}
    return {**about, "max_length": space.max_length, "matrices": list(space.layout.names)}


def _check_tables(conn: Any) -> Iterator[Finding]:
    for name in ("meta", *TABLES):  # reads every block, so that DuckDB compares every checksum
        conn.execute(f"SELECT bit_xor(hash(COLUMNS(*))) FROM registry.{name}").fetchall()
    for problem, query in _REFERENCES.items():
        source = query if query.startswith("(") else f"registry.{query}"
        count = first(conn.execute(f"SELECT count(*) FROM {source}"))[0]
        if count:
            yield Finding("catalog.duckdb", f"{problem} ({count} times)", "Restore the store from a backup.")


def _check_segment(file: SegmentFile, record: Committed, batches: list[Any], digest: str | None) -> Iterator[Finding]:
    remedy = "Restore this file from a backup; its instances cannot be trusted until then."
    try:
        header = file.header()
        file.check_size(record.rows)
    except (StoreCorruptError, OSError) as error:
        yield Finding(str(file.path), str(error), remedy)
        return
    if (header.number, header.row_bytes) != (record.pk, record.row_bytes):
        yield Finding(str(file.path), f"the header is that of another segment ({header.number})", remedy)
        return
    at = 0
    for number, start, count, crc, _ in batches:
        if start != at:
            yield Finding(str(file.path), f"batch {number} starts at row {start}, expected {at}", remedy)
        elif file.crc32(start, count) != crc:
            yield Finding(str(file.path), f"rows {start} to {start + count - 1} fail their CRC-32", remedy)
        at = start + count
    if digest is not None and file.sha256(record.rows) != digest:
        yield Finding(str(file.path), "the sealed segment fails its SHA-256", remedy)


def _check_journal(file: SegmentFile, record: Committed, batches: list[Any]) -> Iterator[Finding]:
    journal = journal_of(file)
    remedy = "The rows themselves are not touched by this; back the store up, for the journal cannot restore them."
    ends = [end for end, _ in journal.frames() if end <= record.journal_bytes]
    expected = [batch[4] for batch in batches]
    if ends[1:] != expected:
        last = ends[-1] if ends else 0
        yield Finding(str(journal.path), f"damaged after byte {last} of {record.journal_bytes}", remedy)


def _check_adapter(path: Path, digest: str) -> Iterator[Finding]:
    remedy = "Restore it from a backup, or train the adapter again."
    if not path.exists():
        yield Finding(str(path), "the file is gone", remedy)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        yield Finding(str(path), "fails its SHA-256", remedy)
