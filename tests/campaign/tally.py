"""How trials end, and the table of a campaign."""

from __future__ import annotations

import shlex
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("trials", "struck", "detected", "recovered", "lost", "half-written", "not run", "seconds")


class Wrong(Exception):  # noqa: N818 -- a finding, not a failure of the campaign
    """What must not be.

    Args:
        what: "lost", "half-written", "undetected", "unrecovered" or "crash".
        text: what was seen.
    """

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what


class NotRun(Exception):  # noqa: N818
    """This machine does not allow the trial."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended that went well.

    Attributes:
        struck: whether the fault met the store at work, or changed a byte that counts.
        detected: whether it was noticed and said.
        recovered: whether the store was whole afterwards.
        note: the variety of the fault.
    """

    struck: bool = True
    detected: bool = False
    recovered: bool = True
    note: str = ""


@dataclass
class Tally:
    """Counts by kind of fault."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def trial(self, kind: str, seed: int, folder: Path, act: Callable[[Path], Outcome]) -> None:
        """Run one trial and count it.

        Args:
            kind: kind of fault.
            seed: the trial's own, which repeats it.
            folder: a new folder; it is removed after a trial that went well.
            act: the trial.
        """
        counts, notes = self.counts.setdefault(kind, Counter()), self.notes.setdefault(kind, Counter())
        counts["trials"] += 1
        folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            outcome = act(folder)
            for name in ("struck", "detected", "recovered"):
                counts[name] += getattr(outcome, name)
            notes[outcome.note] += 1
            shutil.rmtree(folder, ignore_errors=True)
        except NotRun as error:
            counts["not run"] += 1
            notes[f"not run: {error}"] += 1
        except Wrong as error:
            counts[error.what] += 1
            self.wrong.append(f"{kind}, --only {shlex.quote(kind)} --seed {seed}: {error} (left in {folder})")
        except Exception:
            counts["crash"] += 1
            self.wrong.append(f"{kind}, seed {seed}: the trial itself failed\n{traceback.format_exc()}")
        counts["seconds"] += round(time.monotonic() - began)

    @property
    def trials(self) -> int:
        """Trials that ran."""
        return sum(counts["trials"] - counts["not run"] for counts in self.counts.values())

    def table(self) -> str:
        """Return the tally as text."""
        rows = [["fault", *COLUMNS]]
        total: Counter[str] = Counter()
        for kind, counts in self.counts.items():
            rows.append([kind, *(str(counts[name]) for name in COLUMNS)])
            total.update(counts)
        rows.append(["all", *(str(total[name]) for name in COLUMNS)])
        lines = _aligned(rows)
        for kind, notes in self.notes.items():
            shown = ", ".join(f"{note} {count}" for note, count in sorted(notes.items()) if note)
            lines += [f"{kind}: {shown}"] if shown else []
        lines += ["", f"wrong: {len(self.wrong)}", *self.wrong]
        return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
