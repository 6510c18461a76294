"""How inner loops are compiled and spread over threads.

Loops are compiled by numba without the GIL and run by plain Python threads on disjoint chunks. numba's own thread
pools are avoided on purpose: a process that used one can't be forked safely, and one aborts when two threads enter it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a loop with numba: no GIL, cached on disk; sums may be reordered to use vector instructions.

    Args:
        function: a function of arrays and numbers in numba's subset of Python.

    Returns:
        The compiled function, called like the original.
    """
    return _compile(function, fastmath={"reassoc", "contract"})


def compiled_exactly(function: F) -> F:
    """Compile a loop as `compiled` does, but keep every addition in the order written.

    Args:
        function: a function of arrays and numbers in numba's subset of Python.

    Returns:
        The compiled function, called like the original.
    """
    return _compile(function)


def _compile(function: F, **options: Any) -> F:
    import numba

    compiler: Any = numba.njit
    try:
        out: F = compiler(cache=True, nogil=True, error_model="numpy", **options)(function)
    except RuntimeError:  # there is no folder that a cache could be written to
        out = compiler(nogil=True, error_model="numpy", **options)(function)
    return out


def thread_count() -> int:
    """Return how many threads a loop may use.

    Returns:
        REPMATCH_THREADS, or OMP_NUM_THREADS, or the number of cores this process may run on.
    """
    for name in ("REPMATCH_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_chunks(function: Callable[[int, int], object], n: int, *, least: int = 1) -> None:
    """Call a function on disjoint ranges that together cover 0..n, each thread one range.

    Args:
        function: called as function(start, stop); writes its results where no other range writes.
        n: length of the whole range.
        least: smallest range that is worth a thread.
    """
    parts = max(1, min(thread_count(), n // max(1, least)))
    if parts == 1:
        function(0, n)
        return
    edges = [n * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts - 1) as pool:
        waiting = [pool.submit(function, lo, hi) for lo, hi in pairwise(edges[1:])]
        function(edges[0], edges[1])
        for future in waiting:
            future.result()
