"""Image classification: images and a label."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator.pictures import Mode, Picture, eight_bits, opened, picture_of
from repmatch.curator.tasks.task import Example
from repmatch.datamodels import Row
from repmatch.errors import InputError, ModelError, UnknownNameError

NAME = "image-classification"
COLUMN = "image"
_TOKEN_PIXELS = 16  # a batch is counted in patches of this side
_MODES: dict[int, Mode] = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Pixels:
    """How an image becomes numbers.

    Attributes:
        height: of the resized image.
        width: of the resized image.
        mean: subtracted from each channel, red, green, blue, after scaling to [0, 1].
        std: each channel is divided by it.
        mode: the channels that the model reads.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    mode: Mode = "RGB"

    @classmethod
    def of_model(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Pixels:
        """Read a checkpoint's settings.

        Args:
            config: the content of config.json.
            processor: the content of preprocessor_config.json, or nothing.

        Returns:
            The settings: resized to the whole input size, without cropping.

        Raises:
            ModelError: the model reads two channels or more than four, or the processor has values for another number.
        """
        size = processor.get("size", config.get("image_size", 224))
        if isinstance(size, Mapping):
            side = size.get("shortest_edge", 224)
            size = (size.get("height", side), size.get("width", side))
        height, width = (size, size) if isinstance(size, int) else size
        channels = config.get("num_channels", 3)
        if channels not in _MODES:
            raise ModelError(f"the model reads images of {channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA).")
        mean, std = (_each(processor.get(name, 0.5), channels, name) for name in ("image_mean", "image_std"))
        return cls(int(height), int(width), mean, std, _MODES[channels])

    @property
    def template(self) -> str:
        """The part of the space's identity that says how images are read."""
        channels = "" if self.mode == "RGB" else f",mode:{self.mode}"
        return f"resize:{self.height}x{self.width},mean:{list(self.mean)},std:{list(self.std)}{channels}"

    def read(self, picture: Picture, source: str) -> NDArray[np.float32]:
        """Read one image.

        Args:
            picture: as it stands in the row.
            source: the file the row came from.

        Returns:
            (channels, height, width) float32.

        Raises:
            InputError: it cannot be read any more.
        """
        from PIL import Image

        try:
            with opened(picture, source) as image:
                whole = eight_bits(image, self.mode)
                sized = whole.resize((self.width, self.height), Image.Resampling.BILINEAR)
        except OSError as error:
            raise InputError(
                f"the image {picture.name!r} of {source!r} cannot be read any more ({error.strerror or error}); "
                "expected it where it was at the ingest. Relative paths start at the rows' folder: run from the same "
                "directory."
            ) from error
        values = np.asarray(sized, dtype=np.float32).reshape(self.height, self.width, -1) / 255.0
        scaled = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _each(value: float | Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """A processor's value for each channel; one that is the same for all fits any number of them."""
    found = (value,) if isinstance(value, int | float) else tuple(value)
    if len(found) != channels and len(set(found)) != 1:
        raise ModelError(
            f"preprocessor_config.json has {len(found)} values in {name}, but the model reads {channels} channels; "
            "expected as many, or one."
        )
    return found if len(found) == channels else found[:1] * channels


class ImageClassification:
    """Turns rows into batches of pixels and logits into losses.

    Args:
        pixels: how images are read.
        labels: every label; its position is its index.
        column: column with the image.
    """

    name = NAME

    def __init__(self, pixels: Pixels, labels: Sequence[str], column: str = COLUMN) -> None:
        self.column = column
        self.pixels = pixels
        self.template = pixels.template
        self._index = {label: i for i, label in enumerate(labels)}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Note where the images are; they are read batch by batch.

        Args:
            rows: rows with an image, and a label.

        Returns:
            One example a row, in order.
        """
        size = max(1, (self.pixels.height // _TOKEN_PIXELS) * (self.pixels.width // _TOKEN_PIXELS))
        for row in rows:
            if row.label not in self._index:
                raise UnknownNameError.of("label", row.label, self._index)
        return [
            Example({"picture": self._picture(row), "source": row.source}, self._index[row.label], False, size)
            for row in rows
        ]

    def _picture(self, row: Row) -> Picture:
        """The row's image; a row of a query has its path as text alone."""
        return picture_of(json.loads(row.json).get(self.column)) or Picture(row.text)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Read the images of a batch.

        Args:
            examples: at least one.

        Returns:
            "pixel_values" (n, channels, height, width) float32 and "labels" (n,) int64.
        """
        arrays = [self.pixels.read(example.features["picture"], example.features["source"]) for example in examples]
        labels = torch.tensor([example.label for example in examples])
        return {"pixel_values": torch.from_numpy(np.stack(arrays)), "labels": labels}

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the cross entropy of each instance.

        Args:
            module: an image classifier of transformers.
            inputs: from `collate`.

        Returns:
            (n,) float32 losses.
        """
        logits = module(pixel_values=inputs["pixel_values"]).logits
        return functional.cross_entropy(logits.float(), inputs["labels"], reduction="none")
