"""Bytes from a shard to an RGB image or a caption; whatever is wrong with them becomes a `BadSample`."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # transforms bring the shorter side to some hundred pixels: the longer one must not become millions
MAX_TEXTS = 8 << 20  # bytes that the compressed texts of a PNG may become; the decoder alone would let 64 MiB pass
MAX_WORD = 1000  # the time that byte-pair encoding takes grows with its square: half a minute for 16,000
_DEFLATE = 1032  # times that deflate can at most shrink data


class BadSample(Exception):  # noqa: N818  a fault of the data, handled and counted by the loader
    """A sample that cannot be used: which shard, which key, why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        # All of args, so that the exception survives the way out of a worker process.
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


def decode_image(data: bytes, *, max_pixels: float = MAX_PIXELS, shard: str = "", key: str = "") -> Image.Image:
    """Decode JPEG, PNG or WebP (the first frame) into an upright 8-bit RGB image.

    Transparency is dropped, as CLIP's own preprocessing does, not blended.

    Args:
        data: the encoded file. Other formats are refused, whatever the member was called.
        max_pixels: largest width x height; checked on the header, before any pixel is allocated.
        shard, key: named in the error.

    Raises:
        BadSample: unknown format, too many pixels, sides too unequal, too much text, truncated or damaged data.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: damaged images would be trained on as grey; switch it off"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the decoder thinks of foreign files, for thousands of them
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if (texts := _texts(data)) > MAX_TEXTS:
                raise BadSample(shard, key, f"compressed texts of up to {texts} bytes, more than {MAX_TEXTS}")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadSample(shard, key, f"{width} x {height} pixels, more than {max_pixels:.0f}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise BadSample(
                        shard, key, f"{width} x {height} pixels, one side more than {MAX_ASPECT} x the other"
                    )
                image.load()
                return _rgb(_upright(image))
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its own text holds a memory address, different in every process
        raise BadSample(shard, key, f"not a readable {', '.join(FORMATS)} image") from error
    except (
        Exception
    ) as error:  # decoders of foreign data raise nearly anything (OSError, SyntaxError, struct.error, ...)
        raise BadSample(shard, key, f"{type(error).__name__}: {error}") from error


def decode_caption(data: bytes, *, shard: str = "", key: str = "") -> str:
    """A caption: UTF-8, bytes that are none replaced, without blanks around it. BadSample for a word without an end."""
    caption = data.decode("utf-8", errors="replace").strip()
    longest = max(map(len, caption.split()), default=0)
    if longest > MAX_WORD:
        raise BadSample(shard, key, f"a caption with a word of {longest} characters, more than {MAX_WORD}")
    return caption


def _texts(data: bytes) -> int:
    """Bytes that the compressed texts of a PNG may at most become, from the lengths of its chunks; 0 for other formats.

    Python needs up to four bytes for each of theirs, which the decoder does not count.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return 0
    at, total = 8, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"zTXt", b"iTXt"):
            total += min(length * _DEFLATE, PngImagePlugin.MAX_TEXT_CHUNK)
        at += length + 12
    return total


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is stored when that is damaged, which says nothing about the pixels."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: PIL's own conversion makes everything above 255 white
        wide = np.asarray(image.convert("I"))
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without a warning for every image
    return image.convert("RGB")
