"""Uniting stores: what others hold is appended to one, byte for byte and under its own names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from repmatch.datamodels import Dataset
from repmatch.errors import SpaceMismatchError, StoreCorruptError, UsageError, quote_list
from repmatch.store.compaction import MOVE_ROWS
from repmatch.store.database import folder_of, hide_progress
from repmatch.store.records import stored_object, united_columns
from repmatch.store.recovery import committed_segments
from repmatch.store.repair import Repair

_MEMORY = "1GB"
_MAX_SHARDS = 1_000_000
_CLASHES = """
SELECT dataset, id FROM seen GROUP BY dataset, id HAVING count(DISTINCT row_hash) > 1 ORDER BY ALL LIMIT 1000
"""


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        stores: the stores in the order they were taken in.
        taken: factors appended.
        there: factors that were here already.
        rows: dataset -> instances it has now.
        missing: dataset -> the shards of its input, such as "3/8", that were in no store.
    """

    stores: tuple[str, ...]
    taken: int
    there: int
    rows: dict[str, int]
    missing: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Part:
    """A shard that a store's runs speak of: one of the parts of one input."""

    dataset: str
    input: str
    number: int
    of: int
    tokens: int


class Union(Repair):
    """Takes in what other stores hold."""

    def merge(
        self, paths: Sequence[str | Path], *, progress: Callable[[str, int, int | None], None] | None = None
    ) -> Merged:
        """Take in other stores, the shards of one input in their order; nothing is renumbered or computed.

        Run it again after an interruption and it goes on; what is here already is not taken twice. All stores are
        checked against each other and this one before anything is written.

        Args:
            paths: the other stores, which are only read.
            progress: called with (stage, done, total).

        Returns:
            What was done.

        Raises:
            SpaceMismatchError: a dataset's factors are of another space or encoding in one of the stores.
            UsageError: a store is named twice or is this one, a dataset has other columns or labels, or an id other
                content.
        """
        folders = [folder_of(path) for path in paths]
        _check_paths(self.path, folders)
        others = [Union(folder, "r", 0.0) for folder in folders]
        parts = [sorted(_parts_of(other), key=lambda part: part.number) for other in others]
        if others and all(parts):
            order = sorted(range(len(others)), key=lambda i: (parts[i][0].dataset, parts[i][0].number))
            others = [others[i] for i in order]
        here = [self] if self._catalog.exists() else []
        _check_together([*here, *others])
        arguments = {"stores": [str(other.path) for other in others]}
        with self.writing(), self.run("merge", arguments) as run:
            before = {part for mine in here for part in _parts_of(mine)}
            taken = total = 0
            for at, other in enumerate(others):
                if progress is not None:
                    progress("merging stores", at, len(others))
                more, whole = self._take(other)
                taken, total = taken + more, total + whole
            if progress is not None:
                progress("merging stores", len(others), len(others))
            known = sorted({*before, *(part for some in parts for part in some)}, key=lambda p: (p.dataset, p.number))
            run.detail.update(factors=taken, shards=[asdict(part) for part in known])
        rows = dict(self.datasets().select("name", "rows").iter_rows())
        return Merged(tuple(str(o.path) for o in others), taken, total - taken, rows, _missing(known))

    def absorb(self, path: str | Path) -> int:
        """Append the instances, factors and adapters of another store; nothing is renumbered or computed.

        A dataset that both have must have the same columns, labels and space, and an id that both have the same row.
        Rows without factors, scores, subsets and coresets stay behind.

        Args:
            path: the other store, which is only read.

        Returns:
            Factors appended; those that were here already are not counted.

        Raises:
            SpaceMismatchError: a dataset's factors are of another space or encoding; nothing was appended.
            UsageError: a dataset or an instance of the same name is another one; nothing was appended.
        """
        _check_paths(self.path, [Path(path)])
        other = Union(Path(path), "r", 0.0)
        _check_together([self, other] if self._catalog.exists() else [other])
        return self._take(other)[0]

    def _take(self, other: Union) -> tuple[int, int]:
        """Append what another store holds that fits; return factors appended and factors it has."""
        with other._reading() as conn:
            numbers = [record.pk for record in committed_segments(conn)]
        groups = list(other._living(numbers))
        taken = total = 0
        with self.writing():
            for name in other.datasets()["name"]:
                self._take_record(other.dataset(name), other)
            for dataset, space, encoding, keys in groups:
                self.save_space(space)
                total += len(keys)
                here = self._stored_ids(dataset.name, space.id, encoding)
                for lo in range(0, len(keys), MOVE_ROWS):
                    part = keys[lo : lo + MOVE_ROWS]
                    new = part[[name not in here for name in other._ids_of(part)]] if here else part
                    if len(new):
                        self._append_raw(dataset.name, space, encoding, other._raw(new, numbers, space, encoding))
                        taken += len(new)
            for adapter_id in other.adapters()["id"]:
                adapter = other.adapter(adapter_id)
                if adapter is not None:
                    self.save_space(other.space(adapter.space_id))
                    self.save_adapter(adapter)
            self._take_quarantine(other)
        return taken, total

    def _take_record(self, dataset: Dataset, other: Union) -> None:
        if dataset.space_id is not None:
            self.save_space(other.space(dataset.space_id))
        if self.has_dataset(dataset.name):
            mine = self.dataset(dataset.name)
            columns = united_columns(mine.columns, dataset.columns)
            dataset = replace(mine, columns=columns, space_id=mine.space_id or dataset.space_id)
            if dataset == mine:
                return
        self.save_dataset(dataset)

    def _stored_ids(self, dataset: str, space_id: str, encoding: str) -> set[str]:
        query = "SELECT id FROM main.factors WHERE dataset = ? AND space_id = ? AND encoding = ?"
        with self._reading() as conn:
            return {row[0] for row in conn.execute(query, [dataset, space_id, encoding]).fetchall()}

    def _take_quarantine(self, other: Union) -> None:
        import pyarrow as pa

        with other._reading() as conn:
            rows = conn.execute("SELECT dataset, source, line, id, reason FROM registry.quarantine").fetchall()
        if not rows:
            return
        names = ("dataset", "source", "line", "id", "reason")
        table = pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
        with self._transaction() as conn:
            conn.register("aside", table)
            conn.execute(
                "INSERT INTO registry.quarantine SELECT dataset, source, line, id::VARCHAR, reason, now()::TIMESTAMP "
                "FROM aside a WHERE NOT EXISTS (SELECT 1 FROM registry.quarantine q WHERE q.dataset = a.dataset "
                "AND q.source = a.source AND q.line = a.line AND q.reason = a.reason)"
            )
            conn.unregister("aside")


def _check_paths(mine: Path, others: Sequence[Path]) -> None:
    seen = {mine.resolve(): mine}
    for path in others:
        if path.resolve() in seen:
            raise UsageError(f"the store {str(path)!r} is named twice; expected different stores to take in.")
        seen[path.resolve()] = path


def _check_together(stores: Sequence[Union]) -> None:
    """Refuse stores that contradict each other, before anything is written."""
    holders: dict[str, tuple[Union, Dataset]] = {}
    for store in stores:
        for name in store.datasets()["name"]:
            dataset = store.dataset(name)
            holder, first = holders.setdefault(name, (store, dataset))
            if (first.fields, first.labels) != (dataset.fields, dataset.labels):
                raise UsageError(
                    f"the dataset {name!r} is another one in {store.path}: columns {dataset.fields} and labels "
                    f"{dataset.labels} against {first.fields} and {first.labels} in {holder.path}. Nothing was taken "
                    "in. Ingest one of the two again under another name, or all of its labels with it."
                )
            _check_space(store, dataset, holder, first)
    clash = _clashes(stores)
    if clash:
        name = clash[0][0]
        ids = [ident for dataset, ident in clash if dataset == name]
        where = [str(store.path) for store in stores if store.has_dataset(name)]
        raise UsageError(
            f"{len(ids)} instances of {name!r} have other content in another of {', '.join(where)}: "
            f"{quote_list(ids, 3)}. Nothing was taken in. Ingest one of the two again, or rename its dataset."
        )


def _check_space(store: Union, dataset: Dataset, holder: Union, first: Dataset) -> None:
    if dataset.space_id is None or first.space_id is None:
        return
    differing: dict[str, Any] = {}
    if dataset.space_id != first.space_id:
        differing = dict(holder.space(first.space_id).differences(store.space(dataset.space_id)))
    if dataset.encoding != first.encoding:
        differing["encoding"] = (first.encoding, dataset.encoding)
    if differing:
        start = " Shards share a warm start when one store was made first and copied for each." * (
            "warm_start" in differing
        )
        raise SpaceMismatchError(
            f"the factors of {dataset.name!r} in {holder.path} and in {store.path} cannot be compared. Nothing was "
            f"taken in.{start} Ingest one of the two again with the settings of the other.",
            differing,
        )


def _clashes(stores: Sequence[Union]) -> list[tuple[str, str]]:
    """Return (dataset, id) of instances whose rows differ between stores, at most a thousand."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix="repmatch-merge-") as spill:
        conn = duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "temp_directory": spill})
        try:
            hide_progress(conn)
            conn.execute("CREATE TABLE seen (dataset VARCHAR, id VARCHAR, row_hash VARCHAR)")
            for store in stores:
                with store._catalog.attached(conn):
                    conn.execute(
                        "INSERT INTO seen SELECT d.name, i.id, i.row_hash FROM catalog.registry.instances i "
                        "JOIN catalog.registry.datasets d ON d.pk = i.dataset_pk"
                    )
            return [(str(dataset), str(ident)) for dataset, ident in conn.execute(_CLASHES).fetchall()]
        finally:
            conn.close()


def _parts_of(store: Union) -> Iterator[_Part]:
    """Yield the shards that a store's finished runs computed or took in."""
    runs = store.sql("SELECT command, status, arguments, detail FROM runs ORDER BY run")
    for command, status, arguments, detail in runs.iter_rows():
        if status != "ok":
            continue
        what = f"the record of a run of {store.path}"
        given, done = stored_object(arguments, what), stored_object(detail, what)
        try:
            if command == "ingest" and "shard" in done:
                shard = done["shard"]
                if shard["number"]:
                    names = given["dataset"], given["input"]
                    yield _part(*names, shard["number"], shard["of"], int(shard["window_tokens"]))
            elif command == "merge":
                for shard in done.get("shards", []):
                    yield _part(**shard)
        except (TypeError, KeyError, ValueError) as error:
            raise StoreCorruptError(f"{what} speaks of a shard that makes no sense ({error}).") from error


def _part(dataset: str, input: str, number: int, of: int, tokens: int) -> _Part:  # noqa: A002 -- the record's names
    if not all(type(n) is int for n in (number, of, tokens)) or not 0 < number <= of <= _MAX_SHARDS:
        raise ValueError(f"shard {number}/{of}")
    return _Part(str(dataset), str(input), number, of, tokens)


def _missing(parts: Sequence[_Part]) -> dict[str, tuple[str, ...]]:
    """Return, by dataset, the shards of its inputs that nobody computed; none where another division is complete."""
    there: dict[tuple[str, str, int, int], set[int]] = {}
    for part in parts:
        there.setdefault((part.dataset, part.input, part.of, part.tokens), set()).add(part.number)
    whole = {(dataset, source) for (dataset, source, of, _), numbers in there.items() if len(numbers) == of}
    found: dict[str, list[str]] = {}
    for (dataset, source, of, tokens), numbers in there.items():
        if (dataset, source) not in whole:
            # CPU and GPU cut other windows, so their shards do not fit together.
            other = any(kind[:3] == (dataset, source, of) and kind[3] != tokens for kind in there)
            more = f" of windows of {tokens} tokens" if other else ""
            found.setdefault(dataset, []).extend(f"{i}/{of}{more}" for i in range(1, of + 1) if i not in numbers)
    return {dataset: tuple(shards) for dataset, shards in found.items() if shards}
