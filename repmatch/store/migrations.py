"""The catalog's schema as numbered steps. Append only: a step that has been released is never edited.

Tables live in the schema `registry`; the views that users query with SQL live in `main`. Large tables carry no
index: DuckDB's indexes would make every update a delete and an insert, and one writer at a time keeps keys unique.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from repmatch import __version__

V1 = """
CREATE SCHEMA registry;
CREATE TABLE registry.meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL);
CREATE TABLE registry.spaces (pk INTEGER NOT NULL, id VARCHAR NOT NULL, json VARCHAR NOT NULL, created TIMESTAMP);
CREATE TABLE registry.datasets (
  pk INTEGER NOT NULL, name VARCHAR NOT NULL, fields VARCHAR NOT NULL, labels VARCHAR NOT NULL,
  columns VARCHAR NOT NULL, space_id VARCHAR, encoding VARCHAR NOT NULL, created TIMESTAMP, updated TIMESTAMP);
CREATE TABLE registry.instances (
  pk BIGINT NOT NULL, dataset_pk INTEGER NOT NULL, id VARCHAR NOT NULL, json VARCHAR NOT NULL, text VARCHAR NOT NULL,
  text_pair VARCHAR, label VARCHAR NOT NULL, row_hash VARCHAR NOT NULL, task_hash VARCHAR NOT NULL,
  source VARCHAR NOT NULL, line BIGINT NOT NULL);
CREATE TABLE registry.segments (
  pk INTEGER NOT NULL, space_pk INTEGER NOT NULL, encoding VARCHAR NOT NULL, row_bytes BIGINT NOT NULL,
  journal_head BIGINT NOT NULL, sealed BOOLEAN NOT NULL, sha256 VARCHAR, created TIMESTAMP);
CREATE TABLE registry.batches (
  pk BIGINT NOT NULL, segment_pk INTEGER NOT NULL, first BIGINT NOT NULL, count BIGINT NOT NULL,
  crc32 BIGINT NOT NULL, journal_end BIGINT NOT NULL, created TIMESTAMP);
CREATE TABLE registry.factors (
  instance_pk BIGINT NOT NULL, segment_pk INTEGER NOT NULL, row BIGINT NOT NULL, loss FLOAT NOT NULL,
  tokens INTEGER NOT NULL, truncated BOOLEAN NOT NULL);
CREATE TABLE registry.adapters (
  pk INTEGER NOT NULL, id VARCHAR NOT NULL, space_id VARCHAR NOT NULL, subset VARCHAR NOT NULL,
  members VARCHAR NOT NULL, recipe VARCHAR NOT NULL, record VARCHAR NOT NULL, sha256 VARCHAR NOT NULL,
  bytes BIGINT NOT NULL, created TIMESTAMP);
CREATE TABLE registry.scores (
  dataset_pk INTEGER NOT NULL, adapter_pk INTEGER NOT NULL, instance_pk BIGINT NOT NULL, score DOUBLE NOT NULL,
  per_matrix FLOAT[] NOT NULL);
CREATE TABLE registry.subsets (pk INTEGER NOT NULL, name VARCHAR NOT NULL, dataset_pk INTEGER NOT NULL,
  created TIMESTAMP);
CREATE TABLE registry.members (subset_pk INTEGER NOT NULL, position BIGINT NOT NULL, instance_pk BIGINT NOT NULL);
CREATE TABLE registry.coresets (
  pk INTEGER NOT NULL, name VARCHAR NOT NULL, dataset_pk INTEGER NOT NULL, strategy VARCHAR NOT NULL,
  arguments VARCHAR NOT NULL, created TIMESTAMP);
CREATE TABLE registry.picks (
  coreset_pk INTEGER NOT NULL, rank BIGINT NOT NULL, instance_pk BIGINT NOT NULL, gain DOUBLE NOT NULL);
CREATE TABLE registry.represented (
  coreset_pk INTEGER NOT NULL, position BIGINT NOT NULL, instance_pk BIGINT NOT NULL, representative BIGINT NOT NULL,
  similarity FLOAT NOT NULL);
CREATE TABLE registry.runs (
  pk BIGINT NOT NULL, command VARCHAR NOT NULL, arguments VARCHAR NOT NULL, started TIMESTAMP, ended TIMESTAMP,
  status VARCHAR NOT NULL, version VARCHAR NOT NULL, detail VARCHAR NOT NULL, pid BIGINT, host VARCHAR);
CREATE TABLE registry.quarantine (
  dataset VARCHAR NOT NULL, source VARCHAR NOT NULL, line BIGINT NOT NULL, id VARCHAR, reason VARCHAR NOT NULL,
  created TIMESTAMP);
CREATE VIEW main.datasets AS SELECT name, space_id, encoding, labels::JSON AS labels, fields::JSON AS fields,
  columns::JSON AS columns, created, updated FROM registry.datasets;
CREATE VIEW main.spaces AS SELECT id, json::JSON AS json, created FROM registry.spaces;
CREATE VIEW main.instances AS SELECT d.name AS dataset, i.pk AS position, i.id, i.label, i.text, i.text_pair,
  i.json::JSON AS json, i.source, i.line, f.loss, f.tokens, f.truncated
  FROM registry.instances i JOIN registry.datasets d ON d.pk = i.dataset_pk
  LEFT JOIN (SELECT f.*, p.id AS space_id, s.encoding FROM registry.factors f
    JOIN registry.segments s ON s.pk = f.segment_pk JOIN registry.spaces p ON p.pk = s.space_pk) f
  ON f.instance_pk = i.pk AND f.space_id = d.space_id AND f.encoding = d.encoding;
CREATE VIEW main.adapters AS SELECT id, space_id, subset, members, recipe::JSON AS recipe, record::JSON AS record,
  bytes, created FROM registry.adapters;
CREATE VIEW main.scores AS SELECT d.name AS dataset, a.id AS adapter, i.id, s.score, s.per_matrix
  FROM registry.scores s JOIN registry.datasets d ON d.pk = s.dataset_pk
  JOIN registry.adapters a ON a.pk = s.adapter_pk JOIN registry.instances i ON i.pk = s.instance_pk;
CREATE VIEW main.coresets AS SELECT c.name, d.name AS dataset, c.strategy, c.arguments::JSON AS arguments, c.created
  FROM registry.coresets c JOIN registry.datasets d ON d.pk = c.dataset_pk;
CREATE VIEW main.picks AS SELECT c.name AS coreset, d.name AS dataset, p.rank, i.id, p.gain
  FROM registry.picks p JOIN registry.coresets c ON c.pk = p.coreset_pk
  JOIN registry.datasets d ON d.pk = c.dataset_pk JOIN registry.instances i ON i.pk = p.instance_pk;
CREATE VIEW main.runs AS SELECT pk AS run, command, arguments::JSON AS arguments, started, ended, status, version,
  detail::JSON AS detail FROM registry.runs;
CREATE VIEW main.quarantine AS SELECT dataset, source, line, id, reason, created FROM registry.quarantine;
"""

V2 = """
CREATE TABLE registry.dropped (segment_pk INTEGER NOT NULL, last_batch BIGINT NOT NULL, dropped TIMESTAMP);
CREATE VIEW main.factors AS SELECT d.name AS dataset, i.id, p.id AS space_id, s.encoding, f.segment_pk AS segment,
  f.row, f.loss, f.tokens, f.truncated
  FROM registry.factors f JOIN registry.instances i ON i.pk = f.instance_pk
  JOIN registry.datasets d ON d.pk = i.dataset_pk JOIN registry.segments s ON s.pk = f.segment_pk
  JOIN registry.spaces p ON p.pk = s.space_pk;
CREATE VIEW main.segments AS SELECT s.pk AS segment, p.id AS space_id, s.encoding, s.row_bytes, s.sealed, s.sha256,
  (SELECT coalesce(max(b.first + b.count), 0) FROM registry.batches b WHERE b.segment_pk = s.pk) AS rows,
  (SELECT count(*) FROM registry.factors f WHERE f.segment_pk = s.pk) AS live, s.created
  FROM registry.segments s JOIN registry.spaces p ON p.pk = s.space_pk;
CREATE VIEW main.subsets AS SELECT s.name, d.name AS dataset, m.position, i.id
  FROM registry.subsets s JOIN registry.datasets d ON d.pk = s.dataset_pk
  JOIN registry.members m ON m.subset_pk = s.pk JOIN registry.instances i ON i.pk = m.instance_pk;
"""

MIGRATIONS: list[str] = [V1, V2]
"""Step i takes a catalog from schema i to schema i + 1."""

MIN_READER = 1
"""The least schema that a reader must know to read what this version writes."""


def schema() -> int:
    """Return the schema that this version writes."""
    return len(MIGRATIONS)


def apply_step(conn: Any, step: int) -> None:
    """Run one step in one transaction and record it, with the version of repmatch that others need to read the result.

    Args:
        conn: a connection for writing, outside a transaction.
        step: index in `MIGRATIONS`.
    """
    import duckdb

    conn.begin()
    try:
        conn.execute(MIGRATIONS[step])
        conn.execute("DELETE FROM registry.meta WHERE key IN ('schema', 'min_reader', 'schema_version')")
        conn.execute(
            "INSERT INTO registry.meta VALUES ('schema', ?), ('min_reader', ?), ('schema_version', ?)",
            [str(step + 1), str(MIN_READER), __version__],
        )
        conn.commit()
    except BaseException:
        with suppress(duckdb.Error):  # where the disk is full DuckDB has ended the transaction itself
            conn.rollback()
        raise
