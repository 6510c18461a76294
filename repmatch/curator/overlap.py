"""Work beside work: the next window is made ready, and the last one stored, while this one is computed.

On an accelerator the processor's cores are idle meanwhile; on the CPU they are not: there windows are read and stored
in the main thread, while batches are computed (see `repmatch.curator.batches`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_DEPTH = 2


def ahead(items: Iterator[T], on: bool = True) -> Generator[T, None, None]:
    """Iterate with a thread that is some items ahead.

    Args:
        items: made in the other thread, in order.
        on: False: iterate plainly.

    Yields:
        The items; an error of theirs comes at its place.
    """
    if not on:
        yield from items
        return
    line: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(_DEPTH)
    stopped = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                line.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    worker = threading.Thread(target=make, name="repmatch-ahead", daemon=True)
    worker.start()
    try:
        while True:
            kind, value = line.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        worker.join()


@contextmanager
def behind(keep: Callable[[T], None], on: bool = True) -> Iterator[Callable[[T], None]]:
    """Run a function in a thread of its own, one call at a time and in order, at most one call behind.

    Args:
        keep: the function.
        on: False: call it plainly.

    Yields:
        What to call in its place. An error of a call is raised by the next one, or at the end of the block.
    """
    if not on:
        yield keep
        return
    with ThreadPoolExecutor(1, thread_name_prefix="repmatch-behind") as pool:
        waiting: list[Future[None]] = []

        def call(item: T) -> None:
            while waiting:
                waiting.pop().result()
            waiting.append(pool.submit(keep, item))

        yield call
        while waiting:
            waiting.pop().result()
