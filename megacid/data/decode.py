"""Decoding of images and captions from untrusted bytes; every fault becomes a `BadSample`."""

from __future__ import annotations

import codecs
import contextlib
import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # transforms resize the shorter side to a few hundred pixels: the longer one must not become millions
MAX_TEXT_BYTES = 8 << 20  # of the text chunks of a PNG once inflated; the decoder alone would accept 64 MiB
MAX_WORD = 1000  # the time of byte-pair encoding grows with the square of this: half a minute for 16,000
_DEFLATE_RATIO = 1032  # the largest possible compression ratio
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


class BadSample(Exception):  # noqa: N818  a fault of the data that the loader handles and counts
    """A sample that cannot be used: its shard, its key and the reason."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        # All arguments, so that the exception can be pickled in a worker process.
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


def decode_image(data: bytes, *, max_pixels: float = MAX_PIXELS, shard: str = "", key: str = "") -> Image.Image:
    """Decode JPEG, PNG or WebP (the first frame) into an upright 8-bit RGB image.

    Transparency is dropped, not blended, as in CLIP's own preprocessing.

    Args:
        data: the encoded file. The format is detected from the content; the member's name does not matter.
        max_pixels: largest width x height; checked on the header, before any pixel is allocated.
        shard, key: named in the error.

    Raises:
        BadSample: unknown format, too many pixels, sides too unequal, too much text, truncated or damaged data.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: the missing part of damaged images would be grey; switch it off"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decoder warns about thousands of files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if (size := _max_text_bytes(data)) > MAX_TEXT_BYTES:
                raise BadSample(shard, key, f"compressed texts of up to {size} bytes, more than {MAX_TEXT_BYTES}")
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
    except UnidentifiedImageError as error:  # its text contains a memory address, which differs between processes
        raise BadSample(shard, key, f"not a readable {', '.join(FORMATS)} image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise BadSample(shard, key, f"{type(error).__name__}: {error}") from error


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or the encoding that a byte order mark names; the mark is no part of the text."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, errors=errors)


def decode_caption(data: bytes, *, shard: str = "", key: str = "") -> str:
    """Decode a caption, replacing invalid bytes and stripping whitespace. BadSample for an overlong word."""
    caption = decode_text(data, "replace").strip()
    longest = max(map(len, caption.split()), default=0)
    if longest > MAX_WORD:
        raise BadSample(shard, key, f"a caption with a word of {longest} characters, more than {MAX_WORD}")
    return caption


def _max_text_bytes(data: bytes) -> int:
    """Upper bound on the inflated size of the text chunks of a PNG, from their lengths; 0 for other formats.

    Python needs up to four bytes per character, which the decoder does not count.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return 0
    at, total = 8, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"zTXt", b"iTXt"):
            total += min(length * _DEFLATE_RATIO, PngImagePlugin.MAX_TEXT_CHUNK)
        at += length + 12
    return total


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated according to its EXIF data; unchanged when that is damaged, since the pixels may be intact."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion turns everything above 255 white
        wide = np.asarray(image.convert("I"))
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours, avoids a warning per image
    return image.convert("RGB")
