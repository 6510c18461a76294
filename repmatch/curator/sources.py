"""Sources: what a user can name as input, found, opened, hashed and read as records."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from repmatch.curator.pictures import read_folder
from repmatch.curator.records import Record, Records, shown
from repmatch.curator.tables import hub_library, read_hub, read_parquet
from repmatch.curator.textfiles import read_array, read_csv, read_jsonl
from repmatch.errors import InputError, UsageError, quote_list

SUPPORTED = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz), .parquet"

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_FOREIGN = (
    (b"\x1f\x8b", "gzip data", "name the file .gz"),
    (b"PAR1", "Parquet data", "name the file .parquet"),
    (b"PK\x03\x04", "a zip archive or an Office file", "unpack it, or save the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "unpack it with zstd -d"),
    (b"BZh", "bzip2 data", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "xz data", "unpack it with unxz"),
    (b"\xff\xfe", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
)
_HUB = re.compile(r"hf:(?P<name>[^@:]+)(@(?P<config>[^@:]+))?(:(?P<split>[^:]+))?")
_PEEK = 4096
_BUFFER = 1 << 20


class _Hashing(io.RawIOBase):
    """Bytes of another stream, hashed as they pass."""

    def __init__(self, inner: Any, state: hashlib.blake2b) -> None:
        self._fill: Callable[[Any], int | None] = getattr(inner, "readinto1", inner.readinto)
        self._state = state

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        count = self._fill(target) or 0
        self._state.update(memoryview(target)[:count])
        return count


@dataclass
class Source:
    """One input that the user named.

    Attributes:
        name: how the user named it.
        kind: "json" (lines, or one array), "csv", "tsv", "parquet", "hub", "images" (a folder), or "" (to be seen from
            its bytes).
        path: the file or folder; None for standard input and the hub.
        packed: whether it is gzip data.
        hub: name, configuration and split of a hub dataset.
        columns: of a folder of images, the names of its columns: id, image, label.
        state: BLAKE2b over its bytes as they lie on disk; of a hub dataset, over its rows as JSON lines; of a folder,
            over these and its files' bytes.
    """

    name: str
    kind: str
    path: Path | None = None
    packed: bool = False
    hub: tuple[str, str | None, str | None] | None = None
    columns: tuple[str, str, str] = ("id", "image", "label")
    state: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=32), repr=False)

    def __str__(self) -> str:
        """How the user named it."""
        return self.name

    def records(self) -> Records:
        """Read the source once, from its start.

        Yields:
            Its rows in order, those that cannot be parsed with the reason.

        Raises:
            InputError: it is not what its name says, or cannot be read on.
            UsageError: neither its name nor its bytes tell its format, or the hub dataset has no such split.
        """
        try:
            yield from self._records()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self.name!r} is not complete gzip data ({error}); expected a whole .gz file. "
                "Check it with gzip -t, or rename it if it is not packed."
            ) from None
        except OSError as error:
            raise InputError(f"{self.name!r} cannot be read: {error.strerror or error}. Check the file.") from error
        except (InputError, UsageError) as error:
            raise type(error)(f"{self.name!r}: {error}") from error.__cause__

    def _records(self) -> Records:
        if self.hub is not None:
            for record in read_hub(*self.hub):
                if isinstance(record, Record):
                    self.state.update(record.json.encode("utf-8") + b"\n")
                yield record
        elif self.kind == "images" and self.path is not None:
            for record in read_folder(self.path, *self.columns):
                if isinstance(record, Record):
                    self.state.update(record.json.encode("utf-8") + b"\n")
                    with suppress(OSError):  # the row is set aside where it is checked
                        self._hash(self.path / record.value[self.columns[1]])
                yield record
        elif self.kind == "parquet" and self.path is not None:
            self._hash(self.path)
            yield from read_parquet(self.path)
        else:
            with self._bytes() as stream:
                yield from _read_text(self.kind, stream)

    def _hash(self, path: Path) -> None:
        with path.open("rb") as file:
            while piece := file.read(_BUFFER):
                self.state.update(piece)

    @contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        if self.path is None:
            yield io.BufferedReader(_Hashing(sys.stdin.buffer, self.state), _BUFFER)
            return
        with self.path.open("rb", buffering=0) as raw:
            stream = io.BufferedReader(_Hashing(raw, self.state), _BUFFER)
            if self.packed:
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    yield io.BufferedReader(unpacked, _BUFFER)
            else:
                yield stream


def find(name: str, columns: tuple[str, str, str] | None = None) -> Source:
    """Find what a user named, without reading it.

    Args:
        name: a path, "-" for JSON lines on standard input, or hf:NAME[@CONFIG][:SPLIT].
        columns: names for the columns of a folder of images: id, image, label; None: rows are no images.

    Returns:
        The source.

    Raises:
        UsageError: nothing is there, or its format is not supported.
        InputError: it is a directory or cannot be reached.
        MissingExtraError: a hub dataset without the `datasets` library.
    """
    if name == "-":
        if sys.stdin is None:
            raise UsageError("'-' names standard input, which is closed; name a file")
        return Source(name, "json")
    if name.startswith("hf:"):
        return _find_hub(name)
    path = Path(name)
    try:
        found = bool(name) and path.exists()
        folder = found and path.is_dir()
        status = path.stat() if found else None
    except OSError as error:
        raise UsageError(f"{shown(name)} cannot be reached: {error.strerror}; expected the path of a file") from None
    if status is None:
        raise _not_found(name, path)
    if _is_device(status):
        raise UsageError(f"{name!r} is a device, which may never end; expected a file, a pipe or '-'.")
    if folder and columns is not None:
        return Source(name, "images", path, columns=columns)
    if folder:
        files = sorted(p.name for p in islice(path.iterdir(), 10_000) if p.suffix.lower() in {*_FORMATS, ".gz"})
        raise InputError(
            f"{name!r} is a directory; expected a file ({SUPPORTED}). "
            + (
                f"It holds {quote_list(files)}; name them one by one."
                if files
                else "It holds no such file. A folder of images goes with --task image-classification."
            )
        )
    return _find_file(name, path, stat.S_ISREG(status.st_mode))


def _is_device(status: os.stat_result) -> bool:
    """Whether something is a device, but for the one that standard input is: /dev/stdin may be a terminal."""
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return False
    try:
        return not os.path.samestat(status, os.fstat(0))
    except OSError:
        return True


def _find_hub(name: str) -> Source:
    match = _HUB.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name!r} does not name a hub dataset; expected hf:NAME[@CONFIG][:SPLIT], as in hf:sst2:train"
        )
    hub_library(name)
    return Source(name, "hub", hub=(match["name"], match["config"], match["split"]))


def _find_file(name: str, path: Path, regular: bool) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    if packed:
        suffixes.pop()
    kind = _FORMATS.get(suffixes[-1] if suffixes else "", "")
    if packed and kind == "parquet":
        raise UsageError(f"{name!r} is packed Parquet, which cannot be streamed; expected .parquet. Unpack it: gunzip.")
    source = Source(name, kind, path, packed)
    if not kind and regular:  # refuse it before any work is done; a pipe shows its bytes only once
        try:
            with source._bytes() as stream:
                _kind_of(stream.read(_PEEK))
        except UsageError as error:
            raise UsageError(f"{name!r}: {error}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name!r} cannot be read: {error}. Check the file.") from None
        source.state = hashlib.blake2b(digest_size=32)
    return source


def _not_found(name: str, path: Path) -> UsageError:
    if path.is_symlink():
        return UsageError(
            f"{name!r} is a link to {str(path.readlink())!r} and {_leads(path)}; expected a file. Mend the link, or "
            "name the file itself."
        )
    folder = path.parent
    try:
        names = [entry.name for entry in islice(folder.iterdir(), 10_000)]
    except (OSError, ValueError):
        names = []
    close = get_close_matches(path.name, names, n=3)
    text = f"there is no file {name!r}"
    if close:
        text += "; did you mean " + " or ".join(repr(str(folder / c)) for c in close) + "?"
    elif not names:
        text += f"; the folder {str(folder)!r} does not exist or is empty."
    else:
        text += "; expected a path."
    return UsageError(f"{text} A dataset of the Hugging Face hub is named hf:NAME[@CONFIG][:SPLIT].")


def _leads(link: Path) -> str:
    try:
        link.stat()
    except FileNotFoundError:
        return "leads to nothing that exists"
    except OSError:
        return "leads round in a circle"
    return "leads to a file that is there now"


def _kind_of(head: bytes) -> str:
    """The format that unnamed bytes are in; only JSON shows itself."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] not in (b"", b"{", b"["):
        raise UsageError(
            f"the name does not tell the format, and the content starts with {shown(bytes(start[:20]))}; expected "
            f"{SUPPORTED}, or JSON lines. Rename the file."
        )
    return "json"


def _read_text(kind: str, stream: BinaryIO) -> Records:
    head = stream.peek(_PEEK)[:_PEEK]  # type: ignore[attr-defined]
    for magic, what, remedy in _FOREIGN:
        if head.startswith(magic):
            raise InputError(f"the file holds {what}; expected text in UTF-8. To read it, {remedy}.")
    if head[:2].count(0) == 1:  # neither JSON nor a header begins like this in UTF-8
        width = 32 if head[:4].count(0) == 3 else 16
        encoding = f"UTF-{width}{'BE' if head[0] == 0 else 'LE'}"
        raise InputError(
            f"the file holds {encoding} text without a byte order mark; expected text in UTF-8. To read it, convert it "
            f"with iconv -f {encoding} -t UTF-8."
        )
    kind = kind or _kind_of(head)
    if kind == "csv":
        return read_csv(stream, ",")
    if kind == "tsv":
        return read_csv(stream, "\t")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return read_array(stream) if start.startswith(b"[") else read_jsonl(stream)
