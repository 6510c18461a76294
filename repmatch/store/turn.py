"""Turns at the catalog: a writer that readers keep out asks them to wait, so that it gets in.

DuckDB lets many readers or one writer open a database. A dozen processes that read without a pause leave no moment
without a reader, and a writer that only tries again and again starves. So one that has tried for a while takes
`turn.lock` for itself; readers look at that file before they open the catalog and let the writer go first. Whoever
reads already is not disturbed, and nobody waits long: a writer that died has no lock, and a reader goes ahead after a
while.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from repmatch.store.files import open_to_write

NAME = "turn.lock"
ASKS_AFTER = 0.5
"""Seconds that a writer tries before it asks readers to wait."""
COURTESY = 5.0
"""Seconds that a reader waits for a writer at most."""
GIVES_WAY_AFTER = 10.0
"""Seconds that a writer asks before SQL of a user, which may run for hours, is ended for it."""
_LOOKS_EVERY = 0.25


@dataclass
class Turn:
    """The file by which a writer asks for its turn.

    Attributes:
        path: the file. It stays: removing it would let two processes lock two files.
    """

    path: Path
    _began: float = field(default_factory=time.monotonic)
    _descriptor: int | None = None

    def ask(self) -> None:
        """Ask readers to wait, once this writer has tried for a while; does nothing where another writer asks."""
        if self._descriptor is not None or time.monotonic() - self._began < ASKS_AFTER:
            return
        with suppress(OSError):  # without it the writer merely goes on trying
            descriptor = open_to_write(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                self._descriptor = descriptor

    def release(self) -> None:
        """Let readers go on."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def let_go_first(self, seconds: float = COURTESY) -> None:
        """Wait while a writer asks for its turn.

        Args:
            seconds: at most.
        """
        with suppress(OSError):  # no such file: nobody ever had to ask
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                while time.monotonic() - self._began < seconds:
                    with suppress(BlockingIOError):
                        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        return
                    time.sleep(0.005)
            finally:
                os.close(descriptor)


@contextmanager
def taking_turns(folder: Path, read_only: bool) -> Iterator[Turn]:
    """Be fair to writers while the catalog is opened.

    Args:
        folder: the store.
        read_only: whether it is opened for reading.

    Yields:
        The turn; a writer calls its `ask` whenever it was refused.
    """
    turn = Turn(folder / NAME)
    if read_only:
        turn.let_go_first()
    try:
        yield turn
    finally:
        turn.release()


@contextmanager
def ending_for_writers(folder: Path, end: Callable[[], None]) -> Iterator[threading.Event]:
    """End what runs meanwhile when a writer has asked for its turn for long.

    Args:
        folder: the store.
        end: called once, from another thread.

    Yields:
        An event that is set when `end` was called.
    """
    ended, over = threading.Event(), threading.Event()

    def watch() -> None:
        since: float | None = None
        while not over.wait(_LOOKS_EVERY):
            since = (since or time.monotonic()) if _asked(folder / NAME) else None
            if since is not None and time.monotonic() - since >= GIVES_WAY_AFTER:
                ended.set()
                end()
                return

    thread = threading.Thread(target=watch, name="repmatch-turn", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()


def _asked(path: Path) -> bool:
    """Whether a writer asks for its turn now."""
    with suppress(OSError):  # no such file: nobody ever had to ask
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False
