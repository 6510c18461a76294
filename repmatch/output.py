"""The one output sink: data on standard output; progress, warnings and hints on standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from repmatch.errors import RepMatchError
from repmatch.printable import printable as printable
from repmatch.printable import shorten as shorten

_UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # C1, line ends, directions
_COMMANDS = re.compile(f"[\x00-\x08\x0b-\x1f{_UNSAFE.pattern[1:]}")  # all that a terminal obeys but tab and line end


class Output:
    """Where commands write.

    Args:
        as_json: data as JSON in place of tables.
        quiet: no progress and no hints.
        out: standard output.
        err: standard error.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._out: TextIO | None = sys.stdout if out is None else out  # None where the stream is closed
        self._err: TextIO | None = sys.stderr if err is None else err
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def line(self, text: str) -> None:
        """Write data for a person to read; what would command the terminal is shown."""
        self.raw("\n".join(printable(line) for line in text.split("\n")))

    def raw(self, text: str) -> None:
        """Write one line of data for a program to read: as it is; on a terminal, what would command it is escaped.

        Raises:
            RepMatchError: standard output is closed.
        """
        if self._out is None:
            raise RepMatchError(
                "standard output is closed, and there is something to write to it; redirect it to a file or /dev/null."
            )
        if self._out.isatty():
            text = _COMMANDS.sub(_escape, text)
        self._out.write(text + "\n")

    def json(self, value: Any) -> None:
        """Write one JSON object on one line of data; what would command a terminal is escaped, the value stays."""
        self.raw(_UNSAFE.sub(_escape, json.dumps(value, ensure_ascii=False, allow_nan=False)))

    def text(self, text: str) -> None:
        """Write one line of data where no JSON is asked for."""
        if not self.as_json:
            self.line(text)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table: columns aligned, numbers to the right.

        Args:
            header: column names.
            rows: cells; floats are shown with four digits.
        """
        cells = [[_cell(value) for value in row] for row in rows]
        numbers = [all(_is_number(c) for c in column) for column in zip(*cells, strict=True)] or [False] * len(header)
        header = [printable(name) for name in header]
        widths = [max(len(h), *(len(row[i]) for row in cells), 0) for i, h in enumerate(header)]
        for row in [list(header), *cells]:
            padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numbers, strict=True)]
            self.raw("  ".join(padded).rstrip())

    def hint(self, text: str) -> None:
        """Write a remark for the person, unless quiet."""
        if not self.quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """Write a warning."""
        self._say(f"warning: {text}")

    def error(self, text: str) -> None:
        """Write an error."""
        self._say(f"error: {text}")

    def say(self, text: str) -> None:
        """Write lines for the person, hints or not."""
        self._say(text)

    def _say(self, text: str) -> None:
        self.close()
        if self._err is None:  # closed by the caller, who wants to hear nothing
            return
        self._err.write("\n".join(printable(line) for line in text.split("\n")) + "\n")
        self._err.flush()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Show progress on standard error: done, rate and time left; only where a person watches.

        Args:
            stage: what is done; a new stage starts a new bar.
            done: how much is done.
            total: of how much, where that is known.
        """
        if self.quiet or self._err is None:
            return
        if self._bar is None or stage != self._stage:
            self.close()
            unit = "step" if stage.startswith(("training", "retraining")) else "instance"
            self._bar = tqdm(
                desc=printable(stage),
                total=total,
                unit=f" {unit}s",
                file=self._err,
                leave=True,
                disable=None,
                initial=0,
            )
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the progress bar, if one is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogHandler(logging.Handler):
    """Sends log records of repmatch to the output sink as warnings."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._output.warn(record.getMessage())


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found.group()):04x}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else printable(str(value))


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return False
    return True
