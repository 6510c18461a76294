"""The DuckDB catalog: short connections, one at a time in a process, retried while another process commits.

A POSIX lock vanishes when the same process opens and closes the locked file in any other way, a refused second
connection included; two writers would then erase each other's rows without an error. So all connections of a process
to one catalog pass one gate, and nothing here opens `catalog.duckdb` but DuckDB.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repmatch.errors import (
    RepMatchError,
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreNotFoundError,
    StoreVersionError,
)
from repmatch.store import migrations
from repmatch.store.database import attach, confine, connect, hide_progress
from repmatch.store.files import sync_folder, writing_to
from repmatch.store.meta import check_objects, check_version, schema_of
from repmatch.store.turn import GIVES_WAY_AFTER, ending_for_writers, taking_turns

NAME = "catalog.duckdb"
REBUILT = "catalog.rebuilt.duckdb"  # what a repair works on until it takes the catalog's place
PATIENCE = 30.0
_DAMAGE = (
    *("corrupt", "checksum", "not a valid duckdb", "internal error", "serialization", "deserialize"),
    *("could not read enough bytes", "could not read all bytes"),
    *("wal does not match", "failed to read wal of version", "but the wal checkpoint", "unordered_map::at"),
)


@dataclass
class _Gate:
    lock: Any = field(default_factory=threading.RLock)
    connection: Any = None
    trusted: tuple[int, int] | None = None  # device and inode of the catalog whose objects were looked at


_gates: dict[str, _Gate] = {}
_gates_lock = threading.Lock()


def _gate(path: Path) -> _Gate:
    with _gates_lock:
        return _gates.setdefault(os.path.realpath(path), _Gate())


def explain(error: Exception, path: Path) -> RepMatchError:
    """Turn an error of DuckDB into one of ours.

    Args:
        error: a `duckdb.Error`.
        path: the catalog.

    Returns:
        The error, ready to raise.
    """
    text = str(error).strip()
    lower = text.lower()
    if "no space left" in lower or "disk quota" in lower:
        return StoreError(f"the disk of {path} is full. What was committed before stays; make room and run it again.")
    if "file too large" in lower:
        return StoreError(
            f"cannot write {path}: a limit on the size of files is reached (see ulimit -f). What was committed before "
            "stays; raise it and run it again."
        )
    if "newer version of duckdb" in lower or "newer duckdb" in lower:
        return StoreVersionError(f"{path} was written by a newer DuckDB: {text} Upgrade with: pip install -U duckdb")
    if "read-only file system" in lower or "permission denied" in lower:
        return StoreError(f"cannot open {path} for writing: {text} Open the store with mode='r' to read it.")
    if any(sign in lower for sign in _DAMAGE):
        return StoreCorruptError(
            f"the catalog {path} is damaged or no DuckDB database: {text} Restore the store from a backup."
        )
    return StoreError(f"the catalog {path} refused: {text}")


class Catalog:
    """Opens the catalog for a moment at a time.

    Args:
        folder: the store.
        patience: seconds to wait while another process holds DuckDB's lock.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self.path = folder / NAME
        self.patience = patience

    def exists(self) -> bool:
        """Whether there is a catalog."""
        return self.path.is_file()

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Open for reading; inside a transaction of the same thread, its connection.

        Yields:
            A DuckDB connection.
        """
        with self._opened(read_only=True) as conn:
            yield conn

    @contextmanager
    def guarded(self) -> Iterator[Any]:
        """Open for SQL that a user wrote: read-only, no files, no network, settings locked.

        Errors of DuckDB pass unchanged, the caller knows what the user asked for. SQL may run as long as it likes while
        nobody writes; a writer that waits for it ends it after a while, or it would wait in vain and fail.

        Yields:
            A DuckDB connection.

        Raises:
            StoreLockedError: a writer had waited for long and the SQL was ended.
        """
        gate = _gate(self.path)
        with gate.lock:
            if gate.connection is not None:
                raise StoreError("user-written SQL cannot run while this thread holds a transaction open.")
            conn = gate.connection = self._connect(read_only=True)
            try:
                self._check(conn, write=False)
                conn.execute("SET lock_configuration = true")
                with ending_for_writers(self.path.parent, conn.interrupt) as ended:
                    try:
                        yield conn
                    except Exception as error:  # what the caller made of the interruption
                        if not ended.is_set():
                            raise
                        raise StoreLockedError(
                            f"the SQL was ended because another process had waited {GIVES_WAY_AFTER:g} s to write to "
                            f"{self.path.parent}, and it would have failed. Run it again when nobody writes, or on a "
                            "copy of the store's folder."
                        ) from error
            finally:
                gate.connection = None
                conn.close()

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Open for writing and run one transaction; inside another of the same thread, a part of that.

        Yields:
            A DuckDB connection.
        """
        import duckdb

        gate = _gate(self.path)
        with gate.lock:
            if gate.connection is not None:
                yield gate.connection
                return
            with self._opened(read_only=False) as conn:
                conn.begin()
                try:
                    yield conn
                    conn.commit()
                except BaseException:
                    with suppress(duckdb.Error):  # raised where the commit itself failed: nothing is left to undo
                        conn.rollback()
                    raise

    @contextmanager
    def _opened(self, read_only: bool, files: bool = False) -> Iterator[Any]:
        import duckdb

        gate = _gate(self.path)
        with gate.lock:
            if gate.connection is not None:
                yield gate.connection
                return
            conn = gate.connection = self._connect(read_only, files)
            try:
                self._check(conn, write=not read_only)
                yield conn
            except duckdb.Error as error:
                raise explain(error, self.path) from error
            finally:
                gate.connection = None
                conn.close()

    def _check(self, conn: Any, write: bool) -> None:
        """Refuse another schema and, once a process, a catalog that holds what would run by itself."""
        check_version(conn, self.path, write=write)
        gate, about = _gate(self.path), self.path.stat()
        if gate.trusted != (about.st_dev, about.st_ino):
            check_objects(conn, self.path)
            gate.trusted = (about.st_dev, about.st_ino)

    @contextmanager
    def attached(self, conn: Any) -> Iterator[None]:
        """Attach the catalog to another database's connection for reading, as `catalog`.

        Args:
            conn: a connection of a scratch database.

        Yields:
            Nothing.
        """
        import duckdb

        gate = _gate(self.path)
        with gate.lock:
            with self.reading():
                pass
            self._patiently(lambda: attach(conn, self.path, "catalog"))
            try:
                yield
            except duckdb.Error as error:
                raise explain(error, self.path) from error
            finally:
                conn.execute("DETACH catalog")

    def checkpoint(self) -> None:
        """Move what the write-ahead log holds into the catalog's file, and give its free blocks back."""
        with self._opened(read_only=False) as conn:
            conn.execute("CHECKPOINT")

    def create(self, store_uuid: str | None = None, fill: Callable[[Any], None] | None = None) -> None:
        """Make the catalog under a temporary name and rename it, so that it is there in full or not at all.

        Args:
            store_uuid: the store's UUID where it has one.
            fill: puts rows in before the catalog takes its place.
        """
        import duckdb

        from repmatch import __version__

        new = self.path.with_name(NAME + ".new")
        log = new.with_name(new.name + ".wal")
        with writing_to(self.path):
            for leftover in (new, log):
                leftover.unlink(missing_ok=True)
        try:
            conn = connect(new)
            try:
                for step in range(migrations.schema()):
                    migrations.apply_step(conn, step)
                conn.execute(
                    "INSERT INTO registry.meta VALUES ('uuid', ?), ('created_by', ?), ('created', now()::VARCHAR)",
                    [store_uuid or uuid.uuid4().hex, __version__],
                )
                if fill is not None:
                    fill(conn)
                # Closing would do this too, and say nothing where the disk is full: all would be in the log, which
                # does not come along.
                conn.execute("CHECKPOINT")
            finally:
                conn.close()
        except duckdb.Error as error:
            for part in (new, log):
                with suppress(OSError):
                    part.unlink(missing_ok=True)
            raise explain(error, self.path) from error
        with writing_to(self.path):
            new.replace(self.path)
            sync_folder(self.path.parent)

    def migrate(self) -> None:
        """Bring an older catalog to this version's schema, a copy of it first.

        Raises:
            StoreError: the copy failed, then nothing was changed; or a step failed.
            StoreVersionError: the schema is newer.
        """
        import duckdb

        gate = _gate(self.path)
        with gate.lock:
            conn = self._connect(read_only=False)
            try:
                found, _ = schema_of(conn, self.path)
                if found >= migrations.schema():
                    check_version(conn, self.path, write=True)  # a newer one is not even put right
                    return
                check_objects(conn, self.path)
                conn.execute("CHECKPOINT")
            finally:
                conn.close()
            backup = self._backup(found)
            conn = self._connect(read_only=False)
            try:
                for step in range(found, migrations.schema()):
                    migrations.apply_step(conn, step)
            except duckdb.Error as error:
                raise StoreError(
                    f"the store {self.path.parent} could not be brought from schema {found} to {migrations.schema()}: "
                    f"{error} It is as it was before the failing step; {backup} is a copy from before."
                ) from error
            finally:
                conn.close()

    def _backup(self, schema: int) -> Path:
        # Another process copies: opening the file in this one would drop DuckDB's lock on it.
        target = self.path.with_name(f"{NAME}.schema-{schema}.backup")
        code = "import os,shutil,sys; shutil.copyfile(*sys.argv[1:]); f=os.open(sys.argv[2],os.O_RDONLY); os.fsync(f)"
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(self.path), str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise StoreError(f"could not back up {self.path} before migrating it: {done.stderr.strip()[-500:]}")
        return target

    def _connect(self, read_only: bool, files: bool = False) -> Any:
        if not self.exists():
            raise StoreNotFoundError(
                f"there is no store at {self.path.parent}. Make one with: repmatch ingest FILE --dataset NAME, "
                "or name another with --store."
            )
        spill = str(Path(tempfile.gettempdir()) / f"repmatch-{os.getpid()}")
        with taking_turns(self.path.parent, read_only) as turn:
            conn = self._patiently(
                lambda: connect(self.path, read_only=read_only, config={"temp_directory": spill}),
                None if read_only else turn.ask,
            )
        hide_progress(conn)
        if not files:
            confine(conn)
        return conn

    def _patiently(self, opening: Any, ask: Callable[[], None] | None = None) -> Any:
        import duckdb

        deadline, pause = time.monotonic() + self.patience, 0.005
        while True:
            try:
                return opening()
            except duckdb.Error as error:
                text = str(error)
                if "different configuration" in text or "file handle conflict" in text:
                    raise StoreLockedError(
                        f"{self.path} is open in this process outside of repmatch. Close that connection first: two "
                        "of them in one process can lose rows."
                    ) from error
                if "Could not set lock" not in text:
                    raise explain(error, self.path) from error
                if time.monotonic() >= deadline:
                    found = re.search(r"PID (\d+)", text)
                    who = f"process {found[1]}" if found else "another process"
                    raise StoreLockedError(
                        f"the catalog {self.path} has been held by {who} for {self.patience:g} s. "
                        "Wait until it has finished, or end that process."
                    ) from error
                if ask is not None:
                    ask()
                time.sleep(pause)
                pause = random.uniform(0.005, 0.03)  # short: a busy writer leaves the lock for moments only
