"""Inputs from outside, spoilt at random: a message for the user, never a traceback. `make fuzz` goes further."""

from __future__ import annotations

import pytest
from fuzzing import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SHORT = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PIECES = [
    *(b"{", b"[" * 2000, b'"', b"\x00", b"\xff", b"null", b"-1", b"1e999", b"NaN", b"\\ud800"),
    *(b",", b"\n", b"'", b"9" * 400),
]


@st.composite
def spoilt(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A sound input with some pieces cut out, doubled or replaced."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        lo = draw(st.integers(0, len(data)))
        hi = draw(st.integers(lo, min(len(data), lo + 40)))
        put = draw(st.sampled_from(PIECES) | st.binary(max_size=12) | st.just(data[lo:hi] * 2))
        data = data[:lo] + put + data[hi:]
    return data


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_comes_from_outside_raises_what_a_user_is_told(name: str) -> None:
    target, seeds = targets.TARGETS[name]
    sound = seeds()

    @SHORT
    @given(spoilt(sound) | st.binary(max_size=60))
    def holds(data: bytes) -> None:
        targets.run(target, data)

    target(sound[0], targets.place())  # the sound one gets through, so that there is something to spoil
    for seed in sound[1:]:
        targets.run(target, seed)
    holds()
