"""Destinations: files that results are written to, whole or not at all, and never over what cannot be made again."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.errors import UsageError
from repmatch.store.catalog import NAME
from repmatch.store.records import encodable, stored_object

if TYPE_CHECKING:
    from repmatch.store import Store

_OUTSIDE = ("-", "hf:")  # sources that are no files


@contextmanager
def whole_file(path: Path, *, before: Callable[[], object] | None = None) -> Iterator[Callable[[bytes], Any]]:
    """Write beside the target and rename onto it at the end, so that no half-written file is ever seen.

    Args:
        path: the file; an existing one is replaced.
        before: called when all is on disk, just before the rename.

    Yields:
        The function that writes bytes.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:  # on a full disk closing it raises once more
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        if before is not None:
            before()
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_destination(
    path: Path, store: Store | None = None, *, ours: Callable[[Path], bool] | None = None, force: bool = False
) -> None:
    """Refuse to write a file that would damage a store or the user's own data, before any work is done.

    Args:
        path: the file to write.
        store: the store that it is made from; files that its rows were read from are refused.
        ours: whether an existing file was written by repmatch, so that it can be made again.
        force: whether a file that somebody else wrote may be replaced; never one of a store or one with its rows.

    Raises:
        UsageError: the path is a folder, its folder does not exist, it lies in a store, rows were read from it, or
            there is a file already that repmatch did not write.
    """
    if not encodable(str(path)):
        raise UsageError(f"{str(path)!r} is no text in UTF-8 and cannot be noted in a manifest; choose another name.")
    try:
        found = _status(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{path} is a folder; expected the name of a file to write.")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}; make it first: mkdir -p {path.parent}")
        check_outside(path, store)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another place with -o.") from error
    if found is None:
        return
    if store is not None and any(_same(path, source) for source in source_files(store)):
        raise UsageError(
            f"{path} is a file that rows of the store were read from, and is never written over; name another file."
        )
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        raise UsageError(f"{path} is a pipe or a device; expected the name of a file to write.")
    if not force and not (stat.S_ISREG(found.st_mode) and ours is not None and ours(path)):
        raise UsageError(
            f"{path} is there already and was not written by this command, or was changed since; name another file, "
            "or replace it with --force."
        )


def has_mark(path: Path, mark: str, within: int = -1) -> bool:
    """Whether a file holds the mark that a command of ours leaves in what it writes.

    Args:
        path: an existing file.
        mark: the mark.
        within: bytes of its beginning to look at; -1: all.

    Returns:
        True or False; False where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return mark.encode() in file.read(within)
    except OSError:
        return False


def check_outside(path: Path, store: Store | None = None) -> None:
    """Refuse a path within a store's folder, links resolved: a store holds its own files only.

    Args:
        path: what is to be written.
        store: the store at hand; every other is known by its files.

    Raises:
        UsageError: it lies in a store.
    """
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if (store is not None and _same(folder, store.path)) or (
            (folder / NAME).is_file() and (folder / "segments").is_dir()
        ):
            raise UsageError(f"{path} lies in the store {folder}, whose files are its own; name a place outside of it.")


def source_files(store: Store) -> set[Path]:
    """Return the files that a store's rows were read from, as far as it knows them.

    A name counts from the folder that the ingest ran in. Where that was not kept (the store is of an earlier version,
    its catalog was rebuilt, or it was merged from others), it counts from this folder and from the store's.

    Args:
        store: the store.

    Returns:
        Paths, which need not exist any more.
    """
    found: set[Path] = set()
    placed: set[str] = set()
    for (text,) in store.sql("SELECT arguments FROM runs WHERE command = 'ingest'").iter_rows():
        given = stored_object(text, "the record of a run")
        names, folder = given.get("sources"), given.get("folder")
        if isinstance(names, list) and isinstance(folder, str):
            placed.update(map(str, names))
            found.update(Path(folder, str(name)) for name in names if not str(name).startswith(_OUTSIDE))
    listed = store.sql("SELECT DISTINCT source FROM instances UNION SELECT DISTINCT source FROM quarantine")
    for name in listed.to_series():
        if name not in placed and not name.startswith(_OUTSIDE):
            found.update((Path(name), store.path.parent / name))
    return found


def working_folder() -> dict[str, str]:
    """Return what an ingest notes of the folder it runs in: `{"folder": PATH}`, or nothing where that has no name."""
    try:
        folder = str(Path.cwd())
    except OSError:
        return {}
    return {"folder": folder} if encodable(folder) else {}


def _status(path: Path) -> os.stat_result | None:
    """Return what is at a path: of a link what it leads to, or itself where that is nothing."""
    for look in (path.stat, path.lstat):
        try:
            return look()
        except FileNotFoundError:
            continue
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False
