"""Images as rows hold them: a file's path, its bytes, both in one object, or a folder with a subfolder a class."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repmatch.curator.records import BadRecord, Record, Records, RowProblem, shown, to_json
from repmatch.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["L", "RGB", "RGBA"]
"""Pillow's names of one, three and four channels of 8 bits."""

_DIGEST = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a row holds it.

    Attributes:
        name: its path, or what stands for one where a row holds bytes only.
        data: the bytes of its file; None: they lie at the path.
    """

    name: str
    data: bytes | None = None


def picture_of(value: Any) -> Picture | None:
    """Find the image in a column's value.

    Args:
        value: a path; a data URI, which is what bytes of a table become; or an object with `bytes` or `path`, as image
            columns of the Hugging Face library are.

    Returns:
        The image; None where the value is none of these.

    Raises:
        RowProblem: a data URI is not base64.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, str) and data:
            held = _bytes(data) if data.startswith("data:") else data.encode("utf-8")
            return Picture(path if isinstance(path, str) and path.strip() else _name(held), held)
        return Picture(path) if isinstance(path, str) and path.strip() else None
    if not isinstance(value, str) or not value.strip():
        return None
    if value.startswith("data:"):
        held = _bytes(value)
        return Picture(_name(held), held)
    if "\0" in value:  # no path: bytes of a table that happen to be UTF-8
        held = value.encode("utf-8")
        return Picture(_name(held), held)
    return Picture(value)


def _bytes(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise RowProblem(
            f"the image {shown(uri)} is no data URI in base64; expected 'data:image/png;base64,...', or the path of an "
            "image file. Fix the row."
        ) from None


def _name(data: bytes) -> str:
    return f"image:{hashlib.blake2b(data, digest_size=_DIGEST).hexdigest()}"


def image_path(text: str, source: str) -> Path:
    """Return where an image lies.

    Args:
        text: the path in the row.
        source: what the row came from: a relative path starts in the file's folder, or in the folder itself.

    Returns:
        The path.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return path
    base = Path(source).expanduser().absolute()
    return (base if base.is_dir() else base.parent) / path


@contextmanager
def opened(picture: Picture, source: str) -> Iterator[Image]:
    """Open an image with Pillow; its pixels are read later.

    Args:
        picture: the image.
        source: what the row came from.

    Yields:
        The image.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading images", "images") from None
    held = image_path(picture.name, source) if picture.data is None else io.BytesIO(picture.data)
    with Image.open(held) as image:
        yield image


def eight_bits(image: Image, mode: Mode) -> Image:
    """Convert an image to some channels of 8 bits; grey values of 16 bits are scaled, not cut off.

    Args:
        image: the image.
        mode: the channels.

    Returns:
        The image in that mode.

    Raises:
        ValueError: its pixels have 32 bits, of which nothing says what is white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError("its pixels have 32 bits, and nothing says which value is white; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        import numpy as np
        from PIL.Image import fromarray

        wide = np.asarray(image.convert("I")).clip(0, 65535)
        image = fromarray(((wide + 128) // 257).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def image_digest(picture: Picture, source: str, column: str) -> str:
    """Check that an image can be read, and hash its file.

    Args:
        picture: the image.
        source: what the row came from.
        column: the column's name.

    Returns:
        BLAKE2b digest of the file's bytes.

    Raises:
        RowProblem: there is no such file, it is no image, or it has more pixels than Pillow trusts.
        MissingExtraError: Pillow is not installed.
    """
    try:
        with opened(picture, source) as image:
            image.load()
            eight_bits(image, "RGB")
        if picture.data is not None:
            return hashlib.blake2b(picture.data, digest_size=_DIGEST).hexdigest()
        with image_path(picture.name, source).open("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=_DIGEST)).hexdigest()
    except MissingExtraError:
        raise
    except Exception as error:  # what Pillow's decoders raise on damaged or huge files is of many kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        name = picture.name if picture.data is not None else str(image_path(picture.name, source))
        raise RowProblem(
            f"the image {name!r} of column {column!r} cannot be read ({reason}); expected an image file: its path, "
            "relative paths from the rows' folder, or its bytes. Fix the row or the file."
        ) from None


def read_folder(folder: Path, id_field: str, image_field: str, label_field: str) -> Records:
    """Read a folder of images, a subfolder a class, in the order of the names.

    Args:
        folder: the folder; names that start with a dot are passed over.
        id_field: column for the path within the folder.
        image_field: column for the same.
        label_field: column for the subfolder's name.

    Yields:
        A record a file, numbered from 1; files beside the subfolders as bad ones.

    Raises:
        InputError: it has no subfolders, or these have subfolders of their own.
    """
    entries = _entries(folder)
    if not any(entry.is_dir() for entry in entries):
        raise InputError(
            "the folder has no subfolders; expected one for each class, with its images, as in FOLDER/cat/1.png. "
            "Or name a file with rows."
        )
    number = 0
    for entry in entries:
        for path in _entries(entry) if entry.is_dir() else [entry]:
            number += 1
            where = path.relative_to(folder).as_posix()
            if path.is_dir():
                raise InputError(
                    f"{where!r} is a folder within a class; expected image files in FOLDER/CLASS, no deeper. Name "
                    "the folder whose subfolders are the classes."
                )
            if path is entry:
                yield BadRecord(number, f"{where!r} lies in no subfolder, so it has no class. Move or remove it.")
                continue
            value = {id_field: where, image_field: where, label_field: entry.name}
            try:
                yield Record(number, to_json(value), value)
            except RowProblem as problem:
                yield BadRecord(number, str(problem))


def _entries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
