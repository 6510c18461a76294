"""The report as one HTML file: data, script, style and the plotting library in it, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmatch.curator.destination import check_destination, has_mark, whole_file
from repmatch.curator.report.gather import ReportOptions, gather
from repmatch.errors import MissingExtraError, RepMatchError

if TYPE_CHECKING:
    from repmatch.curator.report.kernel import Tell
    from repmatch.store import Store


MARK = '<meta name="generator" content="repmatch report">'
_HEAD = 4096  # bytes of a file in which the mark stands


def plotting_library() -> str:
    """Return the source of plotly.js, which the Python package plotly brings along.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("a report", "report") from error
    return str(get_plotlyjs())


def safe_json(value: Any) -> str:
    """Serialise JSON so that it cannot end the element that holds it, whatever texts are in it.

    Args:
        value: plain JSON values.

    Returns:
        JSON without `<`, `>`, `&` and the line ends that old scripts trip over.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace").decode()  # half a character cannot be written


def page(data: dict[str, Any]) -> str:
    """Return the whole page.

    The content security policy lets run only the two scripts whose hashes it names, and loads nothing: a text from the
    data that got past the escaping could still do nothing. (`unsafe-eval` is for the plotting library's WebGL code.)

    Args:
        data: from `gather`.

    Returns:
        HTML.
    """
    folder = files("repmatch.curator.report")
    template, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    library = plotting_library()
    if "</script" in library.lower() or "</script" in script.lower():
        raise RepMatchError(
            "the plotting library holds '</script' and cannot be put into a page; install another version"
        )
    hashes = " ".join(f"'sha256-{_hash(source)}'" for source in (library, script))
    policy = (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "mark": MARK,
        "policy": html.escape(policy, quote=True),
        "title": html.escape(data["title"]),
        "style": style,
        "data": safe_json(data),
        "library": library,
        "script": script,
    }
    out = []
    for piece in template.split("@@"):  # @@name@@ by name, and never inside of what was put in
        out.append(parts.get(piece, piece))
    return "".join(out)


def _hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def write_report(
    store: Store, path: Path, options: ReportOptions, tell: Tell | None = None, *, force: bool = False
) -> dict[str, Any]:
    """Write a report; the file appears whole or not at all. An earlier report is replaced.

    Args:
        store: the store.
        path: the file.
        options: what to show.
        tell: progress.
        force: replace a file that is no report too; never one of a store, nor one that rows were read from.

    Returns:
        `{"file", "bytes", "datasets", "points", "instances", "layout"}`.

    Raises:
        UsageError: the folder does not exist, the path is a folder, it lies in a store, rows were read from it, or
            there is a file that is no report.
        StoreError: there are no factors to report on.
        RepMatchError: the file cannot be written.
        MissingExtraError: the plotting library is not installed.
    """
    check_destination(path, store, ours=partial(has_mark, mark=MARK, within=_HEAD), force=force)
    plotting_library()  # missing: say so before a minute of work
    data = gather(store, options, tell)
    content = page(data).encode("utf-8", "replace")  # a title may hold half a character, which cannot be written
    try:
        with whole_file(path) as write:
            write(content)
    except OSError as error:
        raise RepMatchError(f"{path} cannot be written: {error.strerror}; choose another place with -o.") from error
    return {
        "file": str(path),
        "bytes": len(content),
        "datasets": [d["name"] for section in data["sections"] for d in section["datasets"]],
        "points": sum(len(section["map"]["ids"]) for section in data["sections"]),
        "instances": sum(section["map"]["total"] for section in data["sections"]),
        "layout": data["sections"][0]["map"]["layout"],
    }
