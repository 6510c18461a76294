"""What is asked of a store after a fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from campaign.operations import Step
from campaign.state import State, read_state
from campaign.tally import Wrong
from repmatch import store as stores
from repmatch.errors import StoreNotFoundError


def which(found: State, states: Sequence[State], acked: int, when: str) -> int:
    """Return which state a store is in: that of the last step done, or of the one that was under way.

    Args:
        found: what the store holds.
        states: what is committed before each step, and at the end.
        acked: steps reported as done.
        when: for the message.
    """
    for number in (acked, acked + 1):
        if number < len(states) and found.same(states[number]):
            return number
    before = states[acked]
    lost = before.missing_from(found)
    next_ = states[min(acked + 1, len(states) - 1)]
    both = [item for item in lost if item in next_.missing_from(found)]
    raise Wrong("lost" if both else "half-written", f"{when}: after step {acked}: {(both or lost)[:4]}")


def sound(store: stores.Store, when: str) -> None:
    """Make sure that `verify` finds nothing."""
    findings = store.verify()
    if findings:
        raise Wrong("half-written", f"{when}: verify says {findings[0]}")


def whole_after(path: Path, script: Sequence[Step], states: Sequence[State], acked: int, *, wait: float = 0.0) -> int:
    """Hold a store whose writer is gone against the oracle; then finish the script and do so again.

    Args:
        path: the store.
        script: what was being done.
        states: from `operations.states`.
        acked: steps that were reported as done.
        wait: seconds to wait for the lock.

    Returns:
        The number of the state that the store was found in.
    """
    exports = path.with_name("exports")
    try:
        with stores.open(path, mode="r") as reader:  # before anybody puts anything right
            which(read_state(reader, exports), states, acked, "a reader")
            sound(reader, "a reader")
    except StoreNotFoundError:
        if acked:
            raise Wrong("lost", f"the store is gone after {acked} steps") from None
    with stores.open(path, mode="w", wait=wait) as store:
        at = which(read_state(store, exports), states, acked, "a writer")
        for step in script[at:]:
            step.do(store, exports)
        if at < len(script):
            found = read_state(store, exports)
            if not found.same(states[-1]):
                raise Wrong("unrecovered", f"{states[-1].missing_from(found)[:4]}")
        sound(store, "at the end")
        left = store.sql("SELECT count(*) AS n FROM runs WHERE status = 'running'")["n"][0]
        if left:
            raise Wrong("half-written", f"{left} runs still count as running")
    stray = [p.name for p in path.rglob("*") if p.name.endswith((".tmp", ".part", ".lost", ".damaged"))]
    stray += [p.name for p in (path / "staging").glob("*")]
    if stray:
        raise Wrong("half-written", f"left behind: {stray}")
    return at
