"""Bytes from a shard to an RGB image; whatever is wrong with them becomes a `BadSample`."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000


class BadSample(Exception):  # noqa: N818  a fault of the data, handled and counted by the loader
    """A sample that cannot be used: which shard, which key, why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(
            shard, key, reason
        )  # all of args, so that the exception survives the way out of a worker process
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


def decode_image(data: bytes, *, max_pixels: float = MAX_PIXELS, shard: str = "", key: str = "") -> Image.Image:
    """Decode JPEG, PNG or WEBP into an upright RGB image.

    Args:
        data: the encoded file. Other formats are refused, whatever the member was called.
        max_pixels: largest width x height; checked on the header, before any pixel is allocated.
        shard, key: named in the error.

    Raises:
        BadSample: unknown format, too many pixels, truncated or damaged data.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: damaged images would be trained on as grey; switch it off"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadSample(shard, key, f"{width} x {height} pixels, more than {max_pixels:.0f}")
                return ImageOps.exif_transpose(image).convert("RGB")
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its own text holds a memory address, different in every process
        raise BadSample(shard, key, f"not a readable {', '.join(FORMATS)} image") from error
    except (
        Exception
    ) as error:  # decoders of foreign data raise nearly anything (OSError, SyntaxError, struct.error, ...)
        raise BadSample(shard, key, f"{type(error).__name__}: {error}") from error
