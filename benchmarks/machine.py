"""The machine of a measurement: what it is, whether it is quiet, and what a whole process takes of it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Cores that other processes may use, on average, before a measurement counts as disturbed.
QUIET = 0.12


@dataclass(frozen=True)
class Ran:
    """What one process took.

    Attributes:
        seconds: wall time, start of the interpreter included.
        cpu: seconds of all its threads.
        peak_bytes: peak resident memory.
        others: cores that other processes used meanwhile, on average.
        stdout: what it wrote.
    """

    seconds: float
    cpu: float
    peak_bytes: int
    others: float
    stdout: str

    def as_json(self) -> dict[str, float]:
        """Return the numbers."""
        return {"seconds": self.seconds, "cpu": self.cpu, "peak_bytes": self.peak_bytes, "others": self.others}


class Watch:
    """Wall time and what other processes used meanwhile; read both after the `watching` block."""

    seconds = 0.0
    others = 0.0


def cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> str:
    """Return cores, CPU model, memory and system; no host name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cores()} cores, {model}, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def _busy() -> float | None:
    """Seconds that all cores have worked for anybody, None where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextmanager
def watching() -> Iterator[Watch]:
    """Measure a block: its wall time, and the cores that other processes used meanwhile.

    Yields:
        Filled in when the block ends.
    """
    watch = Watch()
    busy, own, began = _busy(), _own(), time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
    later = _busy()
    if busy is not None and later is not None:
        watch.others = max(0.0, (later - busy - (_own() - own)) / max(watch.seconds, 1e-9))


class Patience:
    """Waits until nobody else uses the machine, but not for ever.

    Args:
        seconds: to wait at most, all waits together.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self) -> None:
        """Return once the machine is quiet, or when patience is at its end."""
        while self._left > 0:
            with watching() as watch:
                time.sleep(2)
            if watch.others < QUIET:
                return
            say(f"other processes use {watch.others:.2f} cores; waiting, {self._left:.0f} s at most")
            time.sleep(8)
            self._left -= 10


def run(arguments: Sequence[str]) -> Ran:
    """Run a process to its end.

    The kernel counts the memory of the process that forks into the peak of the new one, so call this before the caller
    has grown (torch not loaded).

    Args:
        arguments: program and arguments.

    Returns:
        What it took.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with watching() as watch:
            process = subprocess.Popen(list(arguments), stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{err.read().decode()}")
        scale = 1 if sys.platform == "darwin" else 1024
        stdout = out.read().decode()
    return Ran(watch.seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * scale, watch.others, stdout)


def say(text: str) -> None:
    """Write progress to standard error."""
    print(text, file=sys.stderr, flush=True)
