"""The dataset card that goes with an export: what the rows are, how they were chosen, and how to choose them again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.curator.destination import check_destination, has_mark
from repmatch.errors import UsageError
from repmatch.printable import printable

if TYPE_CHECKING:
    from repmatch.store import Store

_MARKUP = re.compile(r"([\\\[\]*_#~!])")
MARK = "<!-- written by repmatch export --card -->"


def check_card(path: Path, store: Store | None = None) -> None:
    """Refuse to write over a README.md that somebody else wrote.

    Args:
        path: the card.
        store: the store, whose files and sources are refused too.

    Raises:
        UsageError: it is there and was not written by this command, or `check_destination` refuses it.
    """
    if path.is_file() and not has_mark(path, MARK):
        raise UsageError(f"{path} is there already and is no card of repmatch; export into a folder of its own.")
    check_destination(path, store, ours=lambda _: True)


def composition_of(store: Store, name: str) -> dict[str, tuple[int, int]]:
    """Count labels in an export and in its dataset.

    Args:
        store: the store.
        name: what is exported.

    Returns:
        Label -> (exported, in the dataset), in order of the label.
    """
    subset = store.resolve(name)
    some, whole = Counter(store.members(subset).labels), Counter(store.members(store.resolve(subset.dataset)).labels)
    return {label: (some[label], count) for label, count in sorted(whole.items())}


def card_text(manifest: Mapping[str, Any], labels: Mapping[str, tuple[int, int]]) -> str:
    """Return a dataset card in the form of the Hugging Face hub.

    Args:
        manifest: of the export.
        labels: from `composition_of`.

    Returns:
        Markdown with a YAML head.
    """
    about, chosen, space = manifest["dataset"], manifest["selection"], manifest["space"]
    rows, columns = manifest["file"]["rows"], about["columns_read"]
    size = "n<1K" if rows < 1000 else _size(rows)
    task = _word(space["task"]) if space else "text-classification"
    head = ["---", "configs:", "- config_name: default", f"  data_files: {_quoted(manifest['file']['name'])}"]
    head += ["task_categories:", f"- {task.replace('sequence', 'text')}", "size_categories:", f"- {size}"]
    head += ["tags:", "- coreset", "- repmatch", "---", "", MARK, "", f"# {prose(manifest['name'])}", ""]
    part = f"{rows} of the {about['instances']} instances of {prose(about['name'])}"
    lines = [f"{part}, as they came: every column is kept.", ""]
    if chosen and chosen["strategy"] != "filter":
        lines += [
            f"They were chosen by the strategy `{_line(chosen['strategy'])}` from what a model learns of each "
            "instance, and stand in the order in which they were picked. Again:",
            *("", "```console", f"$ {_command(chosen['command'])}", "```", ""),
        ]
    elif chosen:
        lines += [f"They are those that match the condition `{_line(chosen['where'])}`.", ""]
    read = ", ".join(f"{kind} `{_line(column)}`" for kind, column in columns.items() if column)
    lines += [f"Columns that were read: {read}.", "", "| label | here | in the dataset |", "|---|---|---|"]
    lines += [f"| {prose(label)} | {some} | {whole} |" for label, (some, whole) in labels.items()]
    if space:
        lines += [
            "",
            f"Base model: {prose(space['model'])} (fingerprint `{space['model_fingerprint'][:16]}`), LoRA rank "
            f"{space['rank']}, seed {space['seed']}. Everything else that repeats it is in "
            f"`{_line(manifest['file']['name'])}.manifest.json`.",
        ]
    return "\n".join([*head, *lines]) + "\n"


def _size(rows: int) -> str:
    for low, high in (("1K", "10K"), ("10K", "100K"), ("100K", "1M"), ("1M", "10M")):
        if rows < {"10K": 10**4, "100K": 10**5, "1M": 10**6, "10M": 10**7}[high]:
            return f"{low}<n<{high}"
    return "n>10M"


def _quoted(text: str) -> str:
    return "'" + printable(text).replace("'", "''") + "'"


def _line(text: str) -> str:
    """Keep a text of the user's within its line, cell and code span."""
    shown = printable(" ".join(text.split())).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return shown if len(shown) <= 80 else shown[:79] + "…"


def prose(text: str) -> str:
    """Keep a text from outside within its line and cell, and from being Markdown: an image would be loaded.

    Args:
        text: any text.

    Returns:
        Markdown that shows the text, cut after 80 characters.
    """
    return _MARKUP.sub(r"\\\1", _line(text).replace("\\|", "|")).replace("|", "&#124;")


def _command(text: str) -> str:
    """Keep a command within its line of a fenced block."""
    return printable(text.replace("\n", " ")).replace("```", "` ` `")


def _word(text: str) -> str:
    """Keep a name of ours, as a store has it, a plain word of YAML."""
    return text if re.fullmatch(r"[a-z][a-z0-9-]{0,60}", text) else "text-classification"
