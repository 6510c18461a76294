"""Durable writes: whole buffers, synced, with a full disk told apart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repmatch.errors import StoreCorruptError, StoreError, UsageError

FOLDERS = ("segments", "adapters", "cache", "staging")
# Ends of the names of a store's files. Folders besides those have names of their own ends.
_FILES = (".bin", ".journal", ".safetensors", ".duckdb", ".wal", ".lock", ".new", ".tmp", ".f32", ".part")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn operating system errors of a write into errors that say what to do.

    Args:
        path: what is written.

    Yields:
        Nothing.

    Raises:
        StoreError: the disk is full, the folder cannot be written, or another error of the operating system.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno == errno.ELOOP:
            raise _not_plain(path) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk of {path} is full. What was committed before stays; make room and run the command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(
                f"cannot write {path}: {error.strerror}. Open the store with mode='r' to read it, "
                "or change the permissions."
            ) from error
        raise StoreError(f"cannot write {path}: {error.strerror or error}.") from error


def _not_plain(path: Path) -> StoreCorruptError:
    return StoreCorruptError(
        f"{path} is a link or no plain file, and a store holds plain files only: what is written to it would go "
        "elsewhere. Nothing was touched. Look where it leads, and put the file itself in its place. To keep a store on "
        "another disk link its whole folder, or name it with --store."
    )


def _misplaced(path: Path, found: str, expected: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{path} is a {found}, where a store has a {expected}. Nothing was touched. Move it elsewhere, and restore the "
        "store from a backup where something is missing then."
    )


def check_plain(folder: Path) -> None:
    """Make sure that all in a store's folder is a plain file or folder: a link would lead out of it, a pipe hang.

    Args:
        folder: the store, which may not exist; it may be a link itself.

    Raises:
        StoreCorruptError: something is a link, a pipe or a device, a folder where a file belongs, or a file where a
            folder does.
        UsageError: the name is too long.
    """
    for place in (folder, *(folder / name for name in FOLDERS)):
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
                    if not (is_file or is_folder):
                        raise _not_plain(Path(entry.path))
                    if is_file and place == folder and entry.name in FOLDERS:
                        raise _misplaced(Path(entry.path), "file", "folder")
                    if is_folder and Path(entry.name).suffix in _FILES:
                        raise _misplaced(Path(entry.path), "folder", "file")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise StoreError(f"{place} cannot be read: {error.strerror}. Change the permissions.") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UsageError(f"the path {place} is too long for this system; name a shorter one.") from error
            raise StoreError(f"{place} cannot be read: {error.strerror}. Name another folder with --store.") from error


def open_to_write(path: Path, flags: int) -> int:
    """Open a file of a store for writing, never through a link.

    Args:
        path: the file.
        flags: of `os.open`, besides `O_NOFOLLOW` and `O_CLOEXEC`.

    Returns:
        The descriptor.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write a whole buffer at an offset.

    Args:
        descriptor: an open file.
        data: the bytes.
        offset: where they go.
    """
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable.

    Args:
        path: the folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all: temporary name, fsync, rename, fsync of the folder.

    Args:
        path: the file's final name.
        data: its content.
    """
    temporary = path.with_name(path.name + ".tmp")
    descriptor = open_to_write(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_at(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)
