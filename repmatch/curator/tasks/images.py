"""Image classification: image files and a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator.forms import image_path
from repmatch.curator.tasks.task import Example
from repmatch.datamodels import Row
from repmatch.errors import MissingExtraError, UnknownNameError

NAME = "image-classification"
_TOKEN_PIXELS = 16  # a batch is counted in patches of this side


@dataclass(frozen=True)
class Pixels:
    """How an image becomes numbers.

    Attributes:
        height: of the resized image.
        width: of the resized image.
        mean: subtracted from each channel, red, green, blue, after scaling to [0, 1].
        std: each channel is divided by it.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def of_model(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Pixels:
        """Read a checkpoint's settings.

        Args:
            config: the content of config.json.
            processor: the content of preprocessor_config.json, or nothing.

        Returns:
            The settings: resized to the whole input size, without cropping.
        """
        size = processor.get("size", config.get("image_size", 224))
        if isinstance(size, Mapping):
            side = size.get("shortest_edge", 224)
            size = (size.get("height", side), size.get("width", side))
        height, width = (size, size) if isinstance(size, int) else size
        mean, std = (tuple(processor.get(name, (0.5, 0.5, 0.5))) for name in ("image_mean", "image_std"))
        return cls(int(height), int(width), mean, std)

    @property
    def template(self) -> str:
        """The part of the space's identity that says how images are read."""
        return f"resize:{self.height}x{self.width},mean:{list(self.mean)},std:{list(self.std)}"

    def read(self, path: str, source: str) -> NDArray[np.float32]:
        """Read one image.

        Args:
            path: as it stands in the row.
            source: the file the row came from.

        Returns:
            (3, height, width) float32.
        """
        try:
            from PIL import Image
        except ImportError:
            raise MissingExtraError("reading images", "images") from None
        with Image.open(image_path(path, source)) as image:
            sized = image.convert("RGB").resize((self.width, self.height), Image.Resampling.BILINEAR)
        values = np.asarray(sized, dtype=np.float32) / 255.0
        scaled = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))


class ImageClassification:
    """Turns rows into batches of pixels and logits into losses.

    Args:
        pixels: how images are read.
        labels: every label; its position is its index.
    """

    name = NAME

    def __init__(self, pixels: Pixels, labels: Sequence[str]) -> None:
        self.pixels = pixels
        self.template = pixels.template
        self._index = {label: i for i, label in enumerate(labels)}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Note the images' paths; they are read batch by batch.

        Args:
            rows: rows with an image's path as text, and a label.

        Returns:
            One example a row, in order.
        """
        size = max(1, (self.pixels.height // _TOKEN_PIXELS) * (self.pixels.width // _TOKEN_PIXELS))
        for row in rows:
            if row.label not in self._index:
                raise UnknownNameError.of("label", row.label, self._index)
        return [Example({"path": r.text, "source": r.source}, self._index[r.label], False, size) for r in rows]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Read the images of a batch.

        Args:
            examples: at least one.

        Returns:
            "pixel_values" (n, 3, height, width) float32 and "labels" (n,) int64.
        """
        arrays = [self.pixels.read(example.features["path"], example.features["source"]) for example in examples]
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
