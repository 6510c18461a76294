"""A short form of the fault campaign; `make faults` runs the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")
def test_a_store_keeps_what_was_committed_whatever_happens() -> None:
    kinds = ["kill", "kill again", "damage", "repair killed", "cache"]
    command = [sys.executable, "-m", "campaign", "--trials", "15", "--seed", "7", "--only", *kinds]
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_whole_commands_are_killed_and_run_again() -> None:
    command = [sys.executable, "-m", "campaign", "--trials", "20", "--seed", "3", "--only", "command"]
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout


def test_every_writing_command_is_killed_and_named_by_the_trial_that_repeats_it() -> None:
    from campaign.__main__ import SHARES, order
    from campaign.commands import ORDERS

    kinds = [kind for kind, _ in order(500, [], 1)]
    assert set(kinds) == set(SHARES)
    assert {kind.removeprefix("command ") for kind, _ in order(len(ORDERS), ["command"], 5)} == set(ORDERS)
    assert order(2, ["command select joined"], 5) == [("command select joined", 5), ("command select joined", 6)]


def test_the_campaign_tells_what_is_lost(tmp_path: Path) -> None:
    from campaign.tally import Outcome, Tally, Wrong

    def lose(_: Path) -> Outcome:
        raise Wrong("lost", "one row")

    tally = Tally()
    tally.trial("kill", 3, tmp_path / "a", lose)
    tally.trial("kill", 4, tmp_path / "b", lambda _: Outcome(note="well"))
    assert tally.counts["kill"]["lost"] == 1
    assert "--only kill --seed 3: lost: one row" in tally.wrong[0]
    assert not (tmp_path / "b").exists()
