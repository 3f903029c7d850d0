"""Decoding of images and captions from untrusted bytes; every fault becomes a `BadSample`."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

try:
    from PIL import AvifImagePlugin

    _HAS_AVIF = AvifImagePlugin.SUPPORTED
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # every loader worker would start one thread per core
except ImportError:  # Pillow before 11.3
    _HAS_AVIF = False

# Pillow's name of every format that is decoded, with its file extensions. None of their plugins runs another program.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
}
# Of images in formats that are not decoded, for messages.
OTHER_EXTENSIONS = tuple(
    "heic heif hif jxl jp2 j2k jpx jpf svg svgz ico cur psd eps ps pdf tga ppm pgm pbm pnm pfm exr hdr dds qoi pcx xcf "
    "wmf emf raw dng cr2 cr3 nef arw orf rw2 mp4 webm mov".split()
)
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # transforms resize the shorter side to a few hundred pixels: the longer one must not become millions
MAX_TEXT_BYTES = 8 << 20  # of compressed texts and profiles of a PNG once inflated; Pillow would accept 64 MiB of text
MAX_READS = 1_000_000  # by Pillow's Python code, which reads headers piece by piece: a few hundred are usual
MAX_SCANS = 100  # of a JPEG; encoders write about ten
MAX_SCAN_PIXELS = 1_000_000_000  # scans x pixels: each scan of a progressive JPEG visits all pixels
MAX_RUN_LENGTH_PIXELS = 10_000_000  # of a BMP with run-length encoding, which Pillow decodes in Python
MAX_WORD = 1000  # the time of byte-pair encoding grows with the square of this: half a minute for 16,000
_DEFLATE_RATIO = 1032  # the largest possible compression ratio
_TOO_MANY_PARTS = f"headers of more than {MAX_READS} parts"
_READABLE = tuple(name for name in FORMATS if name != "AVIF" or _HAS_AVIF)
_TIFF_COMPRESSIONS = frozenset(
    "raw tiff_lzw tiff_adobe_deflate tiff_deflate packbits jpeg group3 group4 tiff_ccitt".split()
)
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a JPEG segment; the others are fill bytes and have no content
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
# Pillow builds a list of all strips or tiles of an uncompressed TIFF in Python; libtiff reads those it needs.
TiffImagePlugin.READ_LIBTIFF = True
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # its errors are exceptions, too
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_MARKS = tuple(_BYTE_ORDER_MARKS)


class BadSample(Exception):  # noqa: N818  a fault of the data that the loader handles and counts
    """A sample that cannot be used: its shard, its key and the reason."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        # All arguments, so that the exception can be pickled in a worker process.
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


class _BoundedFile(io.BytesIO):
    """A file that raises ValueError after MAX_READS reads: millions of empty chunks or tags would take minutes."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError(_TOO_MANY_PARTS)
        return super().read(size)


def decode_image(data: bytes, *, max_pixels: float = MAX_PIXELS, shard: str = "", key: str = "") -> Image.Image:
    """Decode an image of one of the FORMATS into an upright 8-bit RGB image; of an animation, the first frame.

    Transparency is dropped, not blended, as in CLIP's own preprocessing. The work is bounded by the headers, not by
    a time limit, so that the same samples are bad on every machine.

    Args:
        data: the encoded file. The format is detected from the content; the member's name does not matter.
        max_pixels: largest width x height; checked on the header, before any pixel is allocated.
        shard, key: named in the error.

    Raises:
        BadSample: another format, too many pixels, sides too unequal, more work than an image of its size needs,
            truncated or damaged data.
    """
    with opened_image(data, max_pixels=max_pixels, shard=shard, key=key) as image:
        return upright_rgb(image)


@contextlib.contextmanager
def opened_image(data: bytes, *, max_pixels: float, shard: str, key: str) -> Iterator[Image.Image]:
    """The image of `decode_image` with its header read and checked; an error in the block becomes a BadSample, too."""
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
            # A file of fewer bytes cannot have more parts.
            file = io.BytesIO(data) if len(data) <= MAX_READS else _BoundedFile(data)
            with Image.open(file, formats=_READABLE) as image:
                if (reason := _refusal(image, data, max_pixels)) is not None:
                    raise BadSample(shard, key, reason)
                yield image
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its text contains a memory address, which differs between processes
        reason = f"not a readable {', '.join(FORMATS)} image"
        if data[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" not in _READABLE:
            reason = "an AVIF image, which the installed Pillow cannot decode: install Pillow >= 11.3 with libavif"
        raise BadSample(shard, key, reason) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise BadSample(shard, key, f"{type(error).__name__}: {error}") from error


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or the encoding that a byte order mark names; the mark is no part of the text."""
    if not data.startswith(_MARKS):
        return data.decode("utf-8", errors=errors)
    encoding = next(name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark))
    return data.decode(encoding, errors=errors)


def decode_caption(data: bytes, *, shard: str = "", key: str = "") -> str:
    """Decode a caption, replacing invalid bytes and stripping whitespace. BadSample for an overlong word."""
    caption = decode_text(data, "replace").strip()
    longest = max(map(len, caption.split()), default=0)
    if longest > MAX_WORD:
        raise BadSample(shard, key, f"a caption with a word of {longest} characters, more than {MAX_WORD}")
    return caption


def _refusal(image: Image.Image, data: bytes, max_pixels: float) -> str | None:
    """Why an image whose header was read is not decoded; None when it is."""
    width, height = image.size
    pixels = width * height
    if pixels > max_pixels:
        return f"{width} x {height} pixels, more than {max_pixels:.0f}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} pixels, one side more than {MAX_ASPECT} x the other"
    scans = 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags, compression = image.tag_v2, image.info["compression"]
        if compression not in _TIFF_COMPRESSIONS:
            return f"TIFF with {compression} compression, which is not decoded"
        bits, inverted = tags.get(258, (1,))[0], tags.get(262) == 0 and image.mode.startswith("I")
        if image.mode in ("I", "F") or bits == 12 or inverted:
            return (
                f"TIFF with {bits}-bit {image.mode} pixels, expected unsigned integers of 8 or 16 bits with black as 0"
            )
        # libtiff decodes whole tiles, also where they lie outside of the image.
        sides = [-(-tags[side] // tile) * tile for side, tag in ((256, 322), (257, 323)) if (tile := tags.get(tag))]
        if len(sides) == 2 and sides[0] * sides[1] > max_pixels:
            return f"tiles of {sides[0]} x {sides[1]} pixels, more than {max_pixels:.0f}"
        if compression == "jpeg":
            scans = min(MAX_SCANS, data.count(b"\xff\xda"))  # libtiff ends at a hundred
    elif isinstance(image, JpegImagePlugin.JpegImageFile):
        scans = _scans(image, data)
        if scans > MAX_SCANS:
            return f"JPEG with more than {MAX_SCANS} scans"
    elif image.format == "BMP" and image.info.get("compression") in (1, 2) and pixels > MAX_RUN_LENGTH_PIXELS:
        return f"BMP of {width} x {height} pixels with run-length encoding, more than {MAX_RUN_LENGTH_PIXELS}"
    if scans * pixels > MAX_SCAN_PIXELS:
        return f"JPEG with {scans} scans of {width} x {height} pixels, more than {MAX_SCAN_PIXELS} in all"
    return None


def _scans(image: JpegImagePlugin.JpegImageFile, data: bytes) -> int:
    """Number of scans that the decoder reads of an opened JPEG, counted up to MAX_SCANS + 1."""
    # Pillow has read up to the end of the first scan's header, of at most 16 bytes, and of an MPO has gone elsewhere.
    end = 0 if image.fp is None or image.format == "MPO" else image.fp.tell()
    at, scans = max(0, data.rfind(b"\xff\xda", max(0, end - 16), end)), 0
    for _ in range(MAX_READS):
        found = _MARKER.search(data, at)
        if found is None or data[found.end() - 1] == _END:
            return scans
        marker, at = data[found.end() - 1], found.end()
        if marker == _START:
            continue
        if marker == _SCAN:
            scans += 1
            # The only scan of a sequential JPEG has all components, and no other may follow.
            only = "progressive" not in image.info and data[at + 2 : at + 3] == bytes([image.layers])
            if only or scans > MAX_SCANS:
                return scans
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError(_TOO_MANY_PARTS)


def _max_text_bytes(data: bytes) -> int:
    """Upper bound on the inflated size of texts and profiles of a PNG, from their lengths; 0 for other formats.

    Python needs up to four bytes per character, which the decoder does not count.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return 0
    at, total = 8, 0
    for _ in range(MAX_READS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        # An iTXt is compressed if the byte behind its keyword of at most 79 bytes says so.
        plain = kind == b"iTXt" and data[data.find(b"\0", at + 8, at + 88) + 1 :][:1] == b"\0"
        if kind in (b"zTXt", b"iTXt", b"iCCP") and not plain:
            total += min(length * _DEFLATE_RATIO, PngImagePlugin.MAX_TEXT_CHUNK)
        at += length + 12
    return total


def is_rotated(image: Image.Image) -> bool:
    """Whether the EXIF data of an opened image tell to rotate or mirror it; damaged data do not."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def upright_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, as 8-bit RGB and rotated according to its EXIF data."""
    image.load()
    if is_rotated(image):
        with contextlib.suppress(Exception):  # the pixels may be intact where the EXIF data are damaged
            image = ImageOps.exif_transpose(image)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion turns everything above 255 white
        wide = np.asarray(image.convert("I"))
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours, avoids a warning per image
    return image.convert("RGB")
