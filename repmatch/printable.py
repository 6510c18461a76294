"""Text from outside, made fit for a line that a person reads."""

from __future__ import annotations


def printable(text: str) -> str:
    """Make text from outside safe for a terminal: control characters are shown, not obeyed.

    Args:
        text: any text.

    Returns:
        One line without control or bidirectional-override characters.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] if c not in "\n\t" else " " for c in text)


def shorten(text: str, width: int = 60) -> str:
    """Cut text for a table cell.

    Args:
        text: any text.
        width: characters shown at most.

    Returns:
        The text, with an ellipsis where it was cut.
    """
    return text if len(text) <= width else text[: width - 1] + "…"
