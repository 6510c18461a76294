"""The lock that makes one process the writer."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from repmatch.errors import StoreLockedError
from repmatch.store.files import open_to_write, writing_to


@dataclass
class WriterLock:
    """A flock on `store.lock`; the file names its holder.

    Attributes:
        path: the lock file. It stays when the lock is released: removing it would let two processes lock two files.
    """

    path: Path
    _descriptor: int | None = field(default=None, repr=False)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock.

        Args:
            wait: seconds to keep trying.

        Raises:
            StoreLockedError: another process, or another Store of this one, holds it.
        """
        with writing_to(self.path):
            descriptor = open_to_write(self.path, os.O_RDWR | os.O_CREAT)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise StoreLockedError(self._refusal(wait)) from None
                time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
        self._descriptor = descriptor
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with writing_to(self.path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _refusal(self, wait: float) -> str:
        pid, who = _holder(self.path), "another process"
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            holder = json.loads(self.path.read_text())
            who = f"process {int(holder['pid'])} on {holder['host']}, since {holder['since']}"
        if pid is not None and f"process {pid} " not in who:  # the holder has not written its name yet
            who = f"process {pid}"
        waited = f" after waiting {wait:g} s" if wait else ""
        return (
            f"the store {self.path.parent} is being written to by {who}; no second writer is let in{waited}. "
            "Wait until it has finished, or end that process. Reading works meanwhile."
        )


def _holder(path: Path) -> int | None:
    """Return the process that holds the lock as Linux knows it; None elsewhere, and where it is not of this machine."""
    with suppress(OSError, ValueError, IndexError):
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            parts = line.split()
            if parts[1] == "FLOCK" and parts[5].endswith(f":{inode}") and int(parts[4]) > 0:
                return int(parts[4])
    return None
