"""JPEGs decoded by simplejpeg (libjpeg-turbo) once it is known at which size; all other images by Pillow.

Pillow reads and checks every header, as for `decode_image`, and decodes whatever simplejpeg refuses or warns about. The
same samples are therefore bad with either decoder, for the same reasons.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megacid.data.decode import MAX_PIXELS, decode_image, is_rotated, opened_image, upright_rgb
from megacid.errors import UserError


@dataclass(frozen=True)
class Jpeg:
    """An upright JPEG of 8 bits, grey or in colour, whose header was checked; not decoded yet.

    Attributes:
        size: (width, height).
        max_pixels, shard, key: as for `decode_image`.
    """

    data: bytes
    size: tuple[int, int]
    max_pixels: float
    shard: str
    key: str

    def pixels(self, factor: int) -> np.ndarray:
        """RGB pixels, uint8 [height, width, 3], of sides divided by factor (1, 2, 4 or 8) and rounded up.

        They have the full size if Pillow decodes them. Raises BadSample as `decode_image` does.
        """
        return decode_jpeg(self, factor, shard=self.shard, key=self.key)


def decode_jpeg(jpeg: Jpeg, factor: int, *, shard: str, key: str) -> np.ndarray:
    """`Jpeg.pixels`; a function because the watchdog reads `shard` and `key` of its frame."""
    import simplejpeg

    width, height = (-(-side // factor) if factor > 1 else 0 for side in jpeg.size)
    try:
        # Raises ValueError for warnings, too: Pillow decides what is damaged.
        pixels: np.ndarray = simplejpeg.decode_jpeg(jpeg.data, min_width=width, min_height=height)
        return pixels
    except ValueError:
        return np.array(decode_image(jpeg.data, max_pixels=jpeg.max_pixels, shard=shard, key=key))


def open_image(data: bytes, *, max_pixels: float = MAX_PIXELS, shard: str = "", key: str = "") -> Image.Image | Jpeg:
    """The image of `decode_image`, as a `Jpeg` if simplejpeg can decode it. Raises BadSample as `decode_image` does."""
    with opened_image(data, max_pixels=max_pixels, shard=shard, key=key) as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB") and not is_rotated(image):
            return Jpeg(data, image.size, max_pixels, shard, key)
        return upright_rgb(image)


def image_reader(decoder: str) -> Callable[..., Any]:
    """The function that reads images for a value of data.decoder. Raises UserError if its package is missing."""
    if decoder == "pillow":
        return decode_image
    try:
        importlib.import_module("simplejpeg")
    except ImportError as error:
        raise UserError(
            f'"megacid.data.decoder" is "{decoder}", which needs simplejpeg ({error}): pip install simplejpeg, '
            'or choose "pillow"'
        ) from None
    return open_image
