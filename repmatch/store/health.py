"""What the store is made of, and whether it is sound."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import RepMatchError, StoreCorruptError, StoreVersionError
from repmatch.store.cache import FOLDER
from repmatch.store.catalog import explain
from repmatch.store.database import first
from repmatch.store.meta import read_meta
from repmatch.store.recovery import Committed, committed_segments, journal_of
from repmatch.store.runs import Runs
from repmatch.store.segment import SegmentFile

if TYPE_CHECKING:
    import polars as pl

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
    "dropped",
]

_REMEDY = "Restore it from a backup, or run: repmatch repair, then the ingest again."
_REMEDY_OF_AN_ERROR = re.compile(r"\s*Restore (it|the file|the store) from a backup\.$")
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
        factors: instance factors that cannot be trusted and need recomputing; `damaged` lists them.
    """

    where: str
    problem: str
    remedy: str
    factors: int = 0

    def __str__(self) -> str:
        lost = f" ({self.factors} factors to compute again)" if self.factors else ""
        return f"{self.where}: {self.problem}{lost}. {self.remedy}"


_ENCODING_COLUMNS = ("encoding", "segments", "rows", "factors", "row_bytes", "bytes", "dead_bytes")
_BY_ENCODING = (
    "SELECT s.encoding, count(*), sum(s.rows)::BIGINT, sum(s.live)::BIGINT, max(s.row_bytes), "
    "sum(s.rows * s.row_bytes)::BIGINT, sum((s.rows - s.live) * s.row_bytes)::BIGINT FROM main.segments s "
    "GROUP BY s.encoding ORDER BY s.encoding"
)


class Health(Runs):
    """Facts about the store and its soundness."""

    def info(self) -> dict[str, Any]:
        """Return facts about the store as plain JSON values.

        Returns:
            path, uuid, schema, created, bytes by part, rows and bytes by table (blocks of the catalog in use),
            factors and segment bytes by encoding, of which dead (`compact` gives them back), datasets, spaces,
            coresets, bytes an instance, quarantined rows.
        """
        with self._reading() as conn:
            meta = read_meta(conn)
            counts = {name: first(conn.execute(f"SELECT count(*) FROM registry.{name}"))[0] for name in TABLES}
            encodings = conn.execute(_BY_ENCODING).fetchall()
            tables = _table_bytes(conn)
        size = {
            "catalog": sum(p.stat().st_size for p in self.path.glob("catalog.duckdb*") if p.is_file()),
            "segments": _bytes(self.path / "segments", "*.bin"),
            "journals": _bytes(self.path / "segments", "*.journal"),
            "adapters": _bytes(self.path / "adapters", "*"),
            "cache": _bytes(self.path / FOLDER, "*"),
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
            "tables": {name: {"rows": counts[name], "bytes": tables.get(name, 0)} for name in TABLES},
            "encodings": [dict(zip(_ENCODING_COLUMNS, row, strict=True)) for row in encodings],
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
            if isinstance(problem, StoreVersionError):
                raise problem from error  # of another version, not damaged
            remedy = "Restore the store from a backup, or rebuild what its segments hold with: repmatch repair."
            return [Finding(str(self._catalog.path), _problem(problem), remedy)]
        live = self._live_rows()
        for record in segments:
            file = SegmentFile(self.path / "segments", record.pk, record.row_bytes)
            mine = [batch[1:] for batch in batches if batch[0] == record.pk]
            findings += _check_segment(file, record, mine, sums.get(record.pk), live.get(record.pk))
            findings += _check_journal(file, record, mine)
        for adapter_id, digest in adapters:
            findings += _check_adapter(self._adapter_path(adapter_id), digest)
        return findings

    def damaged(self) -> pl.DataFrame:
        """List the instances whose stored factor is not what was committed: `repair` drops exactly these.

        Returns:
            dataset, id, encoding, segment; empty for a sound store.
        """
        empty = "SELECT dataset, id, encoding, segment FROM main.factors WHERE false"
        with self._reading() as conn:
            segments = committed_segments(conn)
            batches = conn.execute(
                "SELECT segment_pk, pk, first, count, crc32, journal_end FROM registry.batches ORDER BY pk"
            ).fetchall()
        parts = []
        for record in segments:
            file = SegmentFile(self.path / "segments", record.pk, record.row_bytes)
            for _, start, count, *_ in damaged_batches(file, record, [b[1:] for b in batches if b[0] == record.pk]):
                parts.append(f"(segment = {record.pk} AND row BETWEEN {start} AND {start + count - 1})")
        where = " OR ".join(parts)
        return self._frame(
            f"SELECT dataset, id, encoding, segment FROM main.factors WHERE {where} ORDER BY ALL" if where else empty
        )

    def _live_rows(self) -> dict[int, NDArray[np.int64]]:
        """Return, for each segment, the rows that factors lie in."""
        with self._reading() as conn:
            found = conn.execute("SELECT segment_pk, row FROM registry.factors ORDER BY segment_pk, row").fetchnumpy()
        numbers, rows = np.asarray(found["segment_pk"], np.int64), np.asarray(found["row"], np.int64)
        edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        return {int(numbers[lo]): rows[lo:hi] for lo, hi in pairwise(edges.tolist())}


def folder_bytes(path: Path) -> int:
    """Return the bytes of every file in a folder and below.

    Args:
        path: the folder.

    Returns:
        Their sum.
    """
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def _problem(error: Exception) -> str:
    """Return what an error says is wrong, without stop and remedy: a finding adds both."""
    return _REMEDY_OF_AN_ERROR.sub("", str(error)).rstrip().removesuffix(".")


def _table_bytes(conn: Any) -> dict[str, int]:
    """Return the bytes of the catalog's blocks that each table uses, by table."""
    (size,) = first(conn.execute("SELECT block_size FROM pragma_database_size()"))
    out = {}
    for name in TABLES:
        query = f"SELECT count(DISTINCT block_id) FROM pragma_storage_info('registry.{name}') WHERE persistent"
        out[name] = int(first(conn.execute(query))[0]) * int(size)
    return out


def damaged_batches(file: SegmentFile, record: Committed, batches: list[Any]) -> list[Any]:
    """Return the batches of a segment whose bytes are not what was committed.

    Args:
        file: the segment.
        record: what the catalog says of it.
        batches: (number, first, count, crc32, journal_end) of each, by first row.

    Returns:
        Those that fail their CRC-32 or lie beyond the end of the file.
    """
    out = []
    for batch in batches:
        _, start, count, crc, _ = batch
        if file.size() < file.offset(start + count) or file.crc32(start, count) != crc:
            out.append(batch)
    return out


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _about_space(space: Any) -> dict[str, Any]:
    about = {name: getattr(space, name) for name in ("id", "model", "task", "rank", "alpha", "seed", "warm_start")}
    more = {name: getattr(space, name) for name in ("template", "model_fingerprint", "tokenizer_fingerprint")}
    return {
        **about,
        **more,
        "optimizer": space.optimizer,
        "max_length": space.max_length,
        "matrices": list(space.layout.names),
    }


def _check_tables(conn: Any) -> Iterator[Finding]:
    for name in ("meta", *TABLES):  # reads every block, so that DuckDB compares every checksum
        conn.execute(f"SELECT bit_xor(hash(COLUMNS(*))) FROM registry.{name}").fetchall()
    for problem, query in _REFERENCES.items():
        source = query if query.startswith("(") else f"registry.{query}"
        count = first(conn.execute(f"SELECT count(*) FROM {source}"))[0]
        if count:
            yield Finding("catalog.duckdb", f"{problem} ({count} times)", _REMEDY)


def _check_segment(
    file: SegmentFile, record: Committed, batches: list[Any], digest: str | None, live: NDArray[np.int64] | None
) -> Iterator[Finding]:
    rows = np.empty(0, np.int64) if live is None else live
    sound = True
    try:
        header = file.header()
        if (header.number, header.row_bytes) != (record.pk, record.row_bytes):
            raise StoreCorruptError(f"the header is that of another segment ({header.number})")
    except (StoreCorruptError, OSError) as error:
        sound = False
        yield Finding(str(file.path), _problem(error), _REMEDY)
    at = 0
    for number, start, count, _, _ in batches:
        if start != at:
            yield Finding(str(file.path), f"batch {number} starts at row {start}, expected {at}", _REMEDY)
        at = start + count
    bad = damaged_batches(file, record, batches)
    for _, start, count, _, _ in bad:
        lost = int(np.searchsorted(rows, start + count) - np.searchsorted(rows, start))
        what = "fail their CRC-32" if file.size() >= file.offset(start + count) else "are missing or cut off"
        yield Finding(str(file.path), f"rows {start} to {start + count - 1} {what}", _REMEDY, lost)
    if sound and not bad and digest is not None and file.sha256(record.rows) != digest:
        yield Finding(str(file.path), "the sealed segment fails its SHA-256", _REMEDY)


def _check_journal(file: SegmentFile, record: Committed, batches: list[Any]) -> Iterator[Finding]:
    journal = journal_of(file)
    remedy = "The rows themselves are not touched by this, but it cannot restore them. " + _REMEDY
    ends = [end for end, _ in journal.frames()]
    within = [end for end in ends if end <= record.journal_bytes]
    if within[1:] != [batch[4] for batch in batches]:
        last = within[-1] if within else 0
        yield Finding(str(journal.path), f"damaged after byte {last} of {record.journal_bytes}", remedy)
    elif len(ends) > len(within) + 1:
        yield Finding(
            str(journal.path),
            f"holds {len(ends) - len(within)} batches that the catalog has lost",
            "They come back with the next write, or with: repmatch repair.",
        )


def _check_adapter(path: Path, digest: str) -> Iterator[Finding]:
    remedy = "Restore it from a backup, or run: repmatch repair; it is then trained again when it is needed."
    if not path.exists():
        yield Finding(str(path), "the file is gone", remedy)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        yield Finding(str(path), "fails its SHA-256", remedy)
