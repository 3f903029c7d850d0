"""Crop and resize of uint8 tensors by torch, with the geometry of open_clip's transforms of PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.functional import center_crop

from megacid.errors import UserError

_FACTORS = (8, 4, 2)  # by which a JPEG decoder divides the sides at no cost


class Undecoded(Protocol):
    """An image that is decoded when its pixels are read."""

    @property
    def size(self) -> tuple[int, int]: ...

    def pixels(self, factor: int) -> np.ndarray:
        """RGB pixels, uint8 [height, width, 3], of sides divided by factor and rounded up, or of the full size."""


class TensorResize:
    """RGB image -> uint8 [3, H, W], cropped and resized as by the given steps, but with torch's arithmetic.

    torch resizes bytes several times faster than Pillow; the values differ by at most 2 of 255. Random crops are those
    that the steps draw from the same state of torch's generator.

    Args:
        steps: those of open_clip's transform that crop and resize.
        scaled: decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop is still at least as large as the target. The
            crop then moves by up to half a pixel of the smaller image.

    Raises:
        UserError: the steps are others than RandomResizedCrop, or Resize and CenterCrop.
    """

    def __init__(self, steps: Sequence[Any], *, scaled: bool) -> None:
        geometry = [step for step in steps if isinstance(step, (RandomResizedCrop, Resize, CenterCrop))]
        names = [type(step).__name__ for step in steps if type(step).__name__ != "MaybeConvertMode"]
        if names not in (["RandomResizedCrop"], ["Resize"], ["Resize", "CenterCrop"]):
            raise UserError(
                f'"megacid.data.decoder" is other than "pillow", but the model\'s transform is {", ".join(names)}, '
                'expected RandomResizedCrop, or Resize and CenterCrop: choose "pillow"'
            )
        self.resize, *self.crop = geometry
        self.scaled = scaled

    def __call__(self, image: Image.Image | Undecoded) -> torch.Tensor:
        width, height = image.size
        top, left, rows, columns = self._box(height, width)
        target = self._target(rows, columns)
        if isinstance(image, Image.Image):
            pixels = np.array(image)
        else:
            factors = (n for n in _FACTORS if self.scaled and rows >= n * target[0] and columns >= n * target[1])
            pixels = image.pixels(next(factors, 1))
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        crop = pixels[round(top * y) : round((top + rows) * y), round(left * x) : round((left + columns) * x)]
        out_1CHW = F.interpolate(
            torch.from_numpy(crop).permute(2, 0, 1)[None], target, mode=self.resize.interpolation.value, antialias=True
        )
        for step in self.crop:
            out_1CHW = center_crop(out_1CHW, list(step.size))
        return out_1CHW[0]

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part that is resized."""
        if not isinstance(self.resize, RandomResizedCrop):
            return 0, 0, height, width
        size_alone: Any = torch.empty(3, height, width, device="meta", dtype=torch.uint8)
        return self.resize.get_params(size_alone, self.resize.scale, self.resize.ratio)

    def _target(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) to which that part is resized."""
        size = self.resize.size
        if not isinstance(size, int) and len(size) == 2:
            return size[0], size[1]
        shorter = size if isinstance(size, int) else size[0]
        longer = int(shorter * max(rows, columns) / min(rows, columns))  # as torchvision rounds
        return (shorter, longer) if rows <= columns else (longer, shorter)
