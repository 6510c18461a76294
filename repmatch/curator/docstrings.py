"""The demo's corpus: docstrings of the standard library of the running interpreter, labelled by area.

Real text without a download. The source files are parsed, never imported or executed. The areas follow the chapters of
the standard library's documentation.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repmatch.errors import InputError, UsageError

MIN_CHARS = 40
MAX_CHARS = 600
DEFAULT_LIMIT = 1_600

# A package stands for all its modules; what a version lacks is skipped. Where a module is a thin front (decimal, io),
# the file that holds its Python source is named too.
AREAS: Mapping[str, str] = {
    "concurrency": (
        "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
        "subprocess threading"
    ),
    "data-formats": (
        "bz2 compression configparser copyreg csv dbm gzip lzma netrc pickle pickletools plistlib shelve "
        "sqlite3 tarfile tomllib zipfile"
    ),
    "data-types": (
        "_collections_abc _pydatetime _strptime _weakrefset bisect calendar collections copy datetime enum "
        "graphlib heapq pprint reprlib types weakref zoneinfo"
    ),
    "development": "bdb cProfile doctest pdb profile pstats pydoc timeit trace tracemalloc typing unittest",
    "files": (
        "_pyio filecmp fileinput fnmatch genericpath glob io linecache ntpath os pathlib posixpath shutil stat tempfile"
    ),
    "internet": (
        "base64 email ftplib http imaplib ipaddress json mailbox mimetypes nntplib poplib quopri smtplib "
        "socket socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc"
    ),
    "numeric": "_pydecimal decimal fractions numbers random statistics",
    "text": "codecs difflib encodings gettext html locale re rlcompleter string stringprep textwrap xml",
}

_PARAGRAPHS = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")

DocRow = dict[str, Any]


def gather(limit: int = DEFAULT_LIMIT, seed: int = 0) -> list[DocRow]:
    """Gather docstrings of the standard library.

    The rows of an area are put in the order of a hash of seed and id, which is a shuffle that neither depends on the
    version of Python nor moves when other rows come or go. Each area gives an equal share of `limit` as far as it has
    so many; the rows of all areas then come in the order of the same hash.

    Args:
        limit: rows at most.
        seed: decides which rows are taken and their order.

    Returns:
        Rows with `id` (dotted name), `text` (40 to 600 characters on one line), `label` (the area), `module`,
        `qualname`, `kind` ("function", "class" or "method") and `line`. No two have the same id or text.

    Raises:
        UsageError: `limit` is below 1.
        InputError: the interpreter came without the sources of its library.
    """
    if limit < 1:
        raise UsageError(f"the limit is {limit}; expected at least 1 row")
    root = Path(sysconfig.get_path("stdlib"))
    by_area: dict[str, list[DocRow]] = defaultdict(list)
    ids: set[str] = set()
    texts: set[str] = set()
    for area, path in sorted(_files(root), key=lambda found: found[1]):
        for row in _docstrings(path, root, area):
            if row["id"] not in ids and row["text"] not in texts:
                ids.add(row["id"])
                texts.add(row["text"])
                by_area[area].append(row)
    if not by_area:
        raise InputError(
            f"there are no Python sources of the standard library in {str(root)!r}; expected files such as queue.py. "
            "Use an interpreter that was installed with its library unpacked."
        )
    for rows in by_area.values():
        rows.sort(key=lambda row: _rank(row["id"], seed))
    quota = _shares({area: len(rows) for area, rows in by_area.items()}, limit)
    taken = [row for area, rows in by_area.items() for row in rows[: quota[area]]]
    return sorted(taken, key=lambda row: _rank(row["id"], seed))


def split(rows: Sequence[DocRow], test_share: float, seed: int = 0) -> tuple[list[DocRow], list[DocRow]]:
    """Split rows into train and test, each label in the same proportion.

    Args:
        rows: rows with `id` and `label`.
        test_share: part of each label that goes to the test rows, rounded; between 0 and 1. A label with two or more
            rows keeps at least one in each part.
        seed: decides which.

    Returns:
        Train rows and test rows, each in the order of `rows`.

    Raises:
        UsageError: `test_share` is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"the test share is {test_share}; expected a number between 0 and 1, such as 0.2")
    by_label: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row["id"])
    test: set[str] = set()
    for ids in by_label.values():
        count = round(test_share * len(ids))
        if len(ids) > 1:
            count = min(max(count, 1), len(ids) - 1)
        test.update(sorted(ids, key=lambda row_id: _rank(f"test:{row_id}", seed))[:count])
    return [row for row in rows if row["id"] not in test], [row for row in rows if row["id"] in test]


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines.

    Args:
        path: the file; an existing one is replaced.
        rows: the rows.
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rank(text: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()


def _shares(available: Mapping[str, int], limit: int) -> dict[str, int]:
    """Deal `limit` out as evenly as what is available allows; what is left over goes to the first names."""
    shares: dict[str, int] = {}
    left = limit
    for position, (name, count) in enumerate(sorted(available.items(), key=lambda item: (item[1], item[0]))):
        shares[name] = min(count, left // (len(available) - position))
        left -= shares[name]
    return shares


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for area, modules in AREAS.items():
        for module in modules.split():
            if (root / f"{module}.py").is_file():
                yield area, root / f"{module}.py"
            package = root / module
            for path in package.rglob("*.py") if package.is_dir() else ():
                if not {"test", "tests", "__pycache__"} & set(path.relative_to(root).parts):
                    yield area, path


def _docstrings(path: Path, root: Path, area: str) -> Iterator[DocRow]:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # a file that this interpreter doesn't read is not part of its library
    for qualname, kind, node in _definitions(tree.body, "", "function"):
        text = clean(ast.get_docstring(node) or "")
        if text:
            yield {
                "id": f"{module}.{qualname}",
                "text": text,
                "label": area,
                "module": module,
                "qualname": qualname,
                "kind": kind,
                "line": node.lineno,
            }


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: Sequence[ast.stmt], prefix: str, kind: str) -> Iterator[tuple[str, str, _Definition]]:
    """Functions, classes and methods, those under `if` and `try` too, but none inside a function."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, "class", node
            yield from _definitions(node.body, f"{prefix}{node.name}.", "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, kind, node
        elif isinstance(node, ast.If | ast.Try):
            blocks: list[ast.If | ast.Try | ast.ExceptHandler] = (
                [node] if isinstance(node, ast.If) else [node, *node.handlers]
            )
            for block in blocks:
                yield from _definitions(block.body, prefix, kind)
            yield from _definitions(node.orelse, prefix, kind)


def clean(docstring: str) -> str:
    """Reduce a docstring to prose on one line.

    Whole paragraphs are kept from the first on while they fit into `MAX_CHARS`; the first example or underlined heading
    ends the text. A first paragraph that is longer is cut after a sentence, or a word.

    Args:
        docstring: the docstring, dedented.

    Returns:
        40 to 600 characters, or "" where there are fewer.
    """
    text = ""
    for paragraph in _PARAGRAPHS.split(docstring.strip()):
        if ">>>" in paragraph or re.search(r"^\s*[-=~]{3,}\s*$", paragraph, re.MULTILINE):
            break
        longer = " ".join(f"{text} {paragraph}".split())
        if len(longer) > MAX_CHARS:
            text = text or _cut(longer)
            break
        text = longer
    return text if len(text) >= MIN_CHARS and sum(c.isalpha() for c in text) * 2 >= len(text) else ""


def _cut(text: str) -> str:
    head = text[: MAX_CHARS + 1]
    ends = [match.end() for match in _SENTENCE_END.finditer(head)]
    return head[: ends[-1]] if ends and ends[-1] >= MIN_CHARS else head.rsplit(" ", 1)[0][:MAX_CHARS]
