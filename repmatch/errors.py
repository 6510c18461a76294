"""The family of errors that repmatch raises on purpose.

Each message says what was wrong, the value received, what was expected, and what to do. The command line prints
`str(error)` and leaves with `error.exit_code`; anything outside this family is a defect of repmatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


class RepMatchError(Exception):
    """Base of every error that repmatch raises on purpose.

    Attributes:
        exit_code: what the command line leaves with.
        origin: lines on where a value comes from that was not typed, set by the command line.
    """

    exit_code = 1
    origin = ""

    def __str__(self) -> str:
        """Return the plain message (KeyError would add quotes)."""
        return str(self.args[0]) if self.args else self.__class__.__name__


class UsageError(RepMatchError, ValueError):
    """An argument or a combination of arguments that cannot be meant."""

    exit_code = 2


class InputError(RepMatchError, ValueError):
    """A file or row handed in by the user that cannot be read as what it should be."""


class RefusedRowsError(InputError):
    """Rows that a task cannot make ready for the model, among others that it can.

    Attributes:
        reasons: position among the rows that were given -> what is wrong with the row there.
    """

    def __init__(self, message: str, reasons: Mapping[int, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__(message)


class UnknownNameError(RepMatchError, KeyError):
    """A dataset, subset, coreset, instance, label, strategy or column that does not exist."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
        """Build the error with the closest known names and a remedy.

        Args:
            kind: what was looked for ("dataset", "label", ...).
            name: the value received.
            known: the names that exist.
            remedy: what to do about it, one sentence without a full stop.

        Returns:
            The error, ready to raise.
        """
        names = sorted(set(known))
        text = f"there is no {kind} {name!r}"
        close = get_close_matches(name, names, n=3)
        if close:
            text += "; did you mean " + " or ".join(repr(c) for c in close) + "?"
        elif names:
            shown = ", ".join(repr(n) for n in names[:10])
            text += f"; known: {shown}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        else:
            text += "; there are none yet"
        stop = "" if text.endswith("?") else "."
        return cls(text + (f"{stop} {remedy[0].upper()}{remedy[1:]}." if remedy else ""))


class UnknownChoiceError(UnknownNameError, UsageError):
    """A strategy, kernel, task or option that repmatch does not have: what was typed cannot be meant."""


class SpaceMismatchError(RepMatchError, ValueError):
    """Adapters of different spaces were about to be compared or mixed.

    Attributes:
        differences: field name -> (value here, value there).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.differences = dict(differences)
        shown = "; ".join(f"{k}: {a!r} against {b!r}" for k, (a, b) in self.differences.items())
        super().__init__(f"{message} Differing: {shown}.")


class ModelError(RepMatchError, ValueError):
    """A base model that cannot be loaded, verified or adapted."""


class SharedUseError(ModelError):
    """An adapted layer works once for a whole batch, whose instances or adapters can then only be taken one by one."""


class MissingExtraError(RepMatchError, ImportError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency. Install it with: pip install 'repmatch[{extra}]'")


class ClusterError(RepMatchError):
    """A cluster that cannot be reached, has no room, or whose workers keep dying."""


class StoreError(RepMatchError):
    """A store that cannot be opened, read or written."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path."""

    exit_code = 2


class StoreLockedError(StoreError):
    """Another process is writing to the store."""


class StoreVersionError(StoreError):
    """The store was written by a version of repmatch with another schema."""


class StoreCorruptError(StoreError):
    """Bytes in the store are not what was committed."""


class SelectionError(RepMatchError, ValueError):
    """A selection that cannot be made: bad kernel, impossible size or quota."""


class SelectionUsageError(SelectionError, UsageError):
    """A rule, an algorithm or a parameter of a selection that cannot be meant, whatever the data."""


def quote_list(values: Sequence[object], limit: int = 10) -> str:
    """Join values for a message, quoted, cut after `limit` of them.

    Args:
        values: what to show.
        limit: how many to show before "and N more".

    Returns:
        One line of text.
    """
    shown = ", ".join(repr(v) for v in values[:limit])
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")
