"""Export: the user's own rows as JSON lines, and a manifest that says how to get them again."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch import __version__
from repmatch.curator.card import card_text, check_card, composition_of
from repmatch.curator.destination import check_destination, whole_file
from repmatch.datamodels import Coreset
from repmatch.errors import InputError, RepMatchError, UsageError

if TYPE_CHECKING:
    from repmatch.store import Store

EXTRA = "repmatch"
FORMAT = "repmatch-manifest-1"
_NO_LINES = (".parquet", ".csv", ".tsv", ".gz")
_PACKAGES = ("duckdb", "numpy", "numba", "peft", "polars", "torch", "transformers")


def export_lines(store: Store, name: str, *, with_scores: bool = False) -> Iterator[str]:
    """Yield the rows of a coreset (best pick first), a subset or a dataset (its own order) as they came.

    Args:
        store: the store.
        name: a coreset, a dataset, a subset or DATASET[SQL].
        with_scores: add one object, "repmatch", to each row: a pick's rank, gain and the number of instances it stands
            for, and the row's last score.

    Yields:
        One JSON object a line, without the line's end. Without scores a line is the very text that was ingested.

    Raises:
        InputError: scores are asked for and a row already has a column of that name.
    """
    subset = store.resolve(name)
    # Everything that can be wrong is found before the first line goes out.
    extras = _extras(store, name, subset.dataset) if with_scores else None
    ids = store.members(subset).ids if subset.ids is not None or subset.where is not None else None
    return _lines(store, subset.dataset, ids, extras)


def _lines(
    store: Store, dataset: str, ids: tuple[str, ...] | None, extras: Mapping[str, dict[str, Any]] | None
) -> Iterator[str]:
    for row_id, text in store.rows(dataset, ids=ids):
        if extras is None:
            yield text
            continue
        extra = json.dumps(extras.get(row_id, {}), ensure_ascii=False)
        body = text.rstrip()[:-1].rstrip()
        yield f'{body}{"" if body == "{" else ", "}"{EXTRA}": {extra}}}'


def _extras(store: Store, name: str, dataset: str) -> dict[str, dict[str, Any]]:
    if EXTRA in store.dataset(dataset).columns:
        raise InputError(
            f"the rows of {dataset!r} already have a column {EXTRA!r}, which --with-scores would add; leave it out."
        )
    extras: dict[str, dict[str, Any]] = {}
    for row in store.latest_scores(dataset).iter_rows(named=True):
        extras[row["id"]] = {"score": row["score"], "against": row["against"]}
    if store.is_coreset(name):
        coreset = store.coreset(name)
        weights = np.bincount(coreset.representative[coreset.representative >= 0], minlength=len(coreset.ids))
        for rank, (pick, gain) in enumerate(zip(coreset.ids, coreset.gains.tolist(), strict=True), start=1):
            own = {"rank": rank, "gain": gain, "represents": int(weights[rank - 1])}
            extras[pick] = own | extras.get(pick, {})
    return extras


def write_export(
    store: Store,
    name: str,
    path: Path,
    *,
    with_scores: bool = False,
    card: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write an export and its manifest; the file appears whole or not at all.

    An earlier export, which the manifest beside it tells by its digest, is replaced. The manifest goes first, with the
    digest of what is replaced: whenever the run is killed, the next one knows the file that is there.

    Args:
        store: the store.
        name: a coreset, a dataset, a subset or DATASET[SQL].
        path: the file to write; the manifest goes to the same name with ".manifest.json" added.
        with_scores: as in `export_lines`.
        card: write a dataset card, README.md, beside the file.
        dry_run: check everything and write nothing.
        force: replace a file that is no earlier export too; never one of a store, nor one that rows were read from.

    Returns:
        The manifest.

    Raises:
        UsageError: the folder does not exist, the path is a folder, it lies in a store, rows were read from it, there
            is a file of somebody else's, or a README.md that is no card of ours, or the name is that of another format.
        RepMatchError: the file cannot be written.
    """
    if path.suffix.lower() in _NO_LINES:
        raise UsageError(
            f"{path} is named like a file of another format, and JSON lines are written; expected a name such as "
            f"{path.name.split('.')[0] or 'rows'}.jsonl. polars, for one, makes Parquet of that: "
            "read_ndjson(...).write_parquet(...)."
        )
    check_destination(path, store, ours=is_export, force=force)
    beside, readme = _manifest_of(path), path.with_name("README.md")
    check_destination(beside, store, ours=lambda found: _described(found) is not None, force=force)
    if card:
        if path.name == readme.name:
            raise UsageError(f"{path} is where the card goes; name another file with -o.")
        check_card(readme, store)
    sha, rows = hashlib.sha256(), 0
    lines = export_lines(store, name, with_scores=with_scores)
    if dry_run:
        found = manifest(store, name, with_scores=with_scores)
        found["file"] = {"name": path.name, "rows": sum(1 for _ in lines), "sha256": None}
        return found
    replaced = _digest(path) if is_export(path) else None  # what --force replaces is not ours before it is replaced
    found = manifest(store, name, with_scores=with_scores)

    def describe() -> None:
        found["file"] = {"name": path.name, "rows": rows, "sha256": sha.hexdigest()}
        if replaced not in (None, sha.hexdigest()):
            found["file"]["replaces"] = replaced
        with whole_file(beside) as write:
            write((json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())

    try:
        with whole_file(path, before=describe) as write:
            for line in lines:
                data = (line + "\n").encode()
                sha.update(data)
                write(data)
                rows += 1
        if card:
            with whole_file(readme) as write:
                write(card_text(found, composition_of(store, name)).encode())
    except OSError as error:
        raise RepMatchError(f"{path} cannot be written: {error.strerror}; choose another place with -o.") from error
    return found


def is_export(path: Path) -> bool:
    """Whether a file is an export as it was written: the manifest beside it has its digest.

    So it has of the export before, which is still there where a run was killed.

    Args:
        path: an existing file.

    Returns:
        True or False.
    """
    about = _described(_manifest_of(path))
    found = None if about is None else _digest(path)
    return about is not None and found is not None and found in (about.get("sha256"), about.get("replaces"))


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def _described(path: Path) -> dict[str, Any] | None:
    """Return what a manifest says of its file; None where it is no manifest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    about = found.get("file") if isinstance(found, dict) and found.get("format") == FORMAT else None
    return about if isinstance(about, dict) else None


def manifest(store: Store, name: str, *, with_scores: bool = False) -> dict[str, Any]:
    """Describe how an export came about, so that it can be repeated.

    Args:
        store: the store.
        name: what is exported.
        with_scores: whether scores are added.

    Returns:
        Plain JSON values: the selection's arguments, the space with its fingerprints and seeds, a digest of the
        dataset's rows, and the versions in use.
    """
    subset = store.resolve(name)
    dataset = store.dataset(subset.dataset)
    space = None if dataset.space_id is None else store.space(dataset.space_id)
    members = store.members(store.resolve(subset.dataset))
    found: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "dataset": {
            "name": dataset.name,
            "instances": len(members.ids),
            "rows_digest": members.row_digest,
            "labels": list(dataset.labels),
            "encoding": dataset.encoding,
            "columns_read": {
                "id": dataset.fields.id_field,
                "text": dataset.fields.text_field,
                "text_pair": dataset.fields.text_pair_field,
                "label": dataset.fields.label_field,
            },
        },
        "space": None if space is None else {"id": space.id, "model": space.model, **space.identity},
        "selection": None,
        "with_scores": with_scores,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    if store.is_coreset(name):
        coreset = store.coreset(name)
        found["selection"] = {
            "strategy": coreset.strategy,
            "picks": len(coreset.ids),
            "arguments": dict(coreset.arguments),
            "command": command_of(coreset),
        }
    elif subset.where is not None:
        found["selection"] = {"strategy": "filter", "where": subset.where}
    return found


def command_of(coreset: Coreset) -> str:
    """Return the command that makes a coreset again.

    Args:
        coreset: a stored coreset.

    Returns:
        A line for a shell.
    """
    given = coreset.arguments
    parts = ["repmatch", "select", str(given.get("source", coreset.dataset))]
    parts += [str(word) for word in given.get("options", ["-k", given["k"], "--strategy", coreset.strategy])]
    parts += ["--name", coreset.name]
    import shlex

    return shlex.join(parts)


def versions() -> dict[str, str]:
    """Return the versions of repmatch, Python and the packages that decide results."""
    found = {"repmatch": __version__, "python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
