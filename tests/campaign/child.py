"""Processes that write until something happens to them, and what they said before it did."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from store_worker import values_of

import repmatch
from campaign.operations import SPACE, Step, dump, load
from campaign.state import moment
from repmatch import store as stores
from repmatch.errors import RepMatchError, UnknownNameError

CONTEXT = get_context("forkserver")
LIGHT = (  # a child without rights may not reach the files of modules any more
    *("duckdb", "polars", "pyarrow", "safetensors.numpy", "numba", "shlex", "csv", "uuid", "tempfile", "difflib"),
    *("repmatch.store.store", "repmatch.curator.export", "campaign.operations"),
)
HEAVY = (
    *("torch", "peft", "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"),
    *("repmatch.cli", "repmatch.curator.workbench", "repmatch.curator.engine", "repmatch.curator.training"),
)
_ROOT = str(Path(repmatch.__file__).parent)
SEGMENT_BYTES = 4096 + 30 * 104


@dataclass(frozen=True)
class Fate:
    """What is to befall a child by its own hand.

    Attributes:
        line: die by SIGKILL before this line of repmatch's code, counted from the step `step` on; None: do not.
        step: number of the step at which lines start to count.
        stop: SIGSTOP in place of SIGKILL.
        memory: bytes of address space that it may have beyond what it has at the start.
        file_bytes: largest file that it may write.
        user: user id to become.
        wait: seconds to wait for another writer.
    """

    line: int | None = None
    step: int = 0
    stop: bool = False
    memory: int | None = None
    file_bytes: int | None = None
    user: int | None = None
    wait: float = 0.0


class Lines:
    """Counts lines of repmatch's own code, and ends the process before the one that is meant.

    Args:
        last: the line; None: only count.
        stop: stop in place of kill.
    """

    def __init__(self, last: int | None = None, stop: bool = False) -> None:
        self.count, self._last, self._stop = 0, last, stop

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_ROOT):
            return None
        if event == "line":
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGSTOP if self._stop else signal.SIGKILL)
        return self


def play(path: str, exports: str, script: str, said: str, fate: Fate) -> None:
    """Do the steps of a script, one after the other; say before and after each.

    Args:
        path: the store.
        exports: folder of exported files.
        script: from `dump`.
        said: file to which a line goes for each step begun ("+3"), done ("3") or refused ("!KIND text").
        fate: what is to befall.
    """
    notes = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def say(text: str) -> None:
        os.write(notes, (text + "\n").encode())

    _limit(fate)
    lines = Lines(fate.line, fate.stop)
    try:
        with stores.open(path, wait=fate.wait) as store:
            store.segment_bytes = SEGMENT_BYTES
            for number, step in enumerate(load(script)):
                say(f"+{number}")
                if fate.line is not None and number == fate.step:
                    sys.settrace(lines)
                step.do(store, Path(exports))
                say(f"{number}")
    except (RepMatchError, MemoryError) as error:
        say(f"!{type(error).__name__} {str(error)[:300]}".replace("\n", " "))
    except BaseException as error:
        say(f"?{type(error).__name__} {str(error)[:300]}".replace("\n", " "))


def _limit(fate: Fate) -> None:
    if fate.user is not None:
        os.setgroups([])
        os.setgid(fate.user)
        os.setuid(fate.user)
    if fate.memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + fate.memory,) * 2)
    if fate.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fate.file_bytes,) * 2)


@dataclass
class Child:
    """A writer under way.

    Attributes:
        process: it.
        said: its file.
    """

    process: BaseProcess
    said: Path

    @classmethod
    def start(cls, store: Path, script: Sequence[Step], said: Path, fate: Fate | None = None) -> Child:
        """Start a writer.

        Args:
            store: the store; exports go beside it.
            script: what it does.
            said: file for what it says.
            fate: what befalls it.
        """
        exports = store.with_name("exports")
        exports.mkdir(exist_ok=True)
        said.unlink(missing_ok=True)
        said.touch()
        said.chmod(0o666)
        process = CONTEXT.Process(
            target=play, args=(str(store), str(exports), dump(script), str(said), fate or Fate()), daemon=True
        )
        process.start()
        return cls(process, said)

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines()

    def done(self) -> int:
        """Steps that it reported as done."""
        return sum(line[0].isdigit() for line in self.lines())

    def refusal(self) -> str:
        """The error that it ended with: "!..." one of ours, "?..." another, "" none."""
        lines = self.lines()
        return lines[-1] if lines and lines[-1][0] in "!?" else ""

    def reached(self, number: int, timeout: float = 60.0) -> bool:
        """Wait until it begins a step; False where it ended before."""
        return wait_for(lambda: f"+{number}" in self.lines() or not self.process.is_alive(), timeout) and (
            f"+{number}" in self.lines()
        )

    def kill(self) -> bool:
        """End it by SIGKILL; say whether it was still at work."""
        alive = self.process.is_alive()
        if alive and self.process.pid:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def join(self, timeout: float = 120.0) -> bool:
        """Wait for its end; False where it hung and was killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            return False
        return True


def wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait for something; False where it did not happen in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def measure(path: str, exports: str, script: str, out: str) -> None:
    """Count the lines of repmatch's code and the seconds that each step takes, undisturbed."""
    lines, found = Lines(), []
    with stores.open(path) as store:
        store.segment_bytes = SEGMENT_BYTES
        for step in load(script):
            before, began = lines.count, time.monotonic()
            sys.settrace(lines)
            step.do(store, Path(exports))
            sys.settrace(None)
            found.append(f"{step.kind} {lines.count - before} {time.monotonic() - began}")
    Path(out).write_text("\n".join(found))


def watch(path: str, script: str, stop: str, said: str) -> None:
    """Read again and again; note every moment that is seen, and stop at what must not be.

    Args:
        path: the store.
        script: what is being written meanwhile, from `dump`.
        stop: ends when this file is there, or after two minutes.
        said: file for a digest of each moment ("=..."), and for what must not be ("?...").
    """
    notes = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    made = {}
    for step in load(script):
        for row in step.made():
            made.setdefault(row.id, set()).add(values_of(row, SPACE).tobytes())
    deadline = time.monotonic() + 120
    try:
        with stores.open(path, mode="r") as store:
            while time.monotonic() < deadline and not Path(stop).exists():
                os.write(notes, f"={moment(store).digest()}\n".encode())
                for name in store.datasets()["name"].to_list():
                    with suppress(UnknownNameError):  # dropped meanwhile
                        for part in store.iter_factors(name):
                            flat = np.zeros((0, 1)) if part.flat is None else part.flat
                            for key, row in zip(part.ids, flat, strict=True):
                                if row.tobytes() not in made[key]:
                                    raise AssertionError(f"the factor of {key} is none that was ever written")
                time.sleep(0.3)  # ten that never pause keep a writer out for longer than it waits
    except Exception as error:
        os.write(notes, ("?" + f"{type(error).__name__} {str(error)[:300]}".replace("\n", " ") + "\n").encode())
