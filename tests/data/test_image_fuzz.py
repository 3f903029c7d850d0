"""Mutated images of every format: an image, or the documented error, and nothing on the way."""

from __future__ import annotations

import faulthandler
import logging
import random
import warnings
import zlib
from collections.abc import Iterator

import pytest
from pair_data import encoded, gradient
from PIL import Image

from megacid.data.decode import FORMATS, BadSample, decode_image

HEADER = 80  # bytes at the start that are edited more often: sizes, counts and offsets
LIMIT_S = 300  # a safety net: the stack of a decoder that hangs


def seeds(form: str) -> list[bytes]:
    """Small valid images in the modes, compressions and numbers of frames that the format knows."""
    image, alpha, exif = gradient(), gradient().convert("RGBA"), Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [gradient(), gradient().rotate(180)]}
    return {
        "JPEG": lambda: [
            encoded(image, form, exif=exif),
            encoded(image, form, progressive=True),
            encoded(image.convert("CMYK"), form),
            encoded(image, "MPO", **frames),
        ],
        "PNG": lambda: [
            encoded(image, form, exif=exif),
            encoded(image.convert("P"), form, transparency=1),
            encoded(image.convert("I;16"), form),
            encoded(image, form, **frames),
        ],
        "WEBP": lambda: [
            encoded(image, form, exif=exif),
            encoded(image.convert("RGBA"), form, lossless=True, **frames),
        ],
        "GIF": lambda: [
            encoded(image, form),
            encoded(image.convert("P"), form, transparency=1, comment=b"c", **frames),
        ],
        "BMP": lambda: [encoded(image.convert(mode), form) for mode in ("1", "L", "P", "RGB", "RGBA")],
        "TIFF": lambda: [
            *(encoded(image, form, compression=name, exif=exif) for name in ("raw", "tiff_lzw", "packbits", "jpeg")),
            encoded(image.convert("1"), form, compression="group4"),
            encoded(image.convert("I;16"), form, compression="tiff_adobe_deflate"),
            encoded(image.convert("CMYK"), form, big_tiff=True),
        ],
        "AVIF": lambda: [encoded(image, form, exif=exif), encoded(alpha, form), encoded(image, form, **frames)],
    }[form]()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few edits: bytes, 32-bit numbers, cuts, copies of a part, insertions."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(min(len(out), HEADER) if rng.random() < 0.6 else len(out))
        kind = rng.randrange(6)
        if kind <= 1:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        elif kind == 2:
            number = rng.choice((0, 1, 255, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, len(out)))
            out[at : at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif kind == 3 and len(out) > 40:
            del out[rng.randrange(20, len(out)) :]
        elif kind == 4:
            out[at:at] = out[at : at + rng.randrange(1, 64)] * rng.choice((1, 2, 50))
        else:
            del out[at : at + rng.randrange(1, 16)]
        if not out:
            return b""
    return bytes(out)


def with_valid_checksums(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right again, so that an edit reaches the decoder."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


@pytest.fixture
def stack_of_a_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(LIMIT_S)
    yield
    faulthandler.cancel_dump_traceback_later()


def decode_mutations(form: str, count: int, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng, originals, outcomes = random.Random(f"{form} {seed}"), seeds(form), {"image": 0, "bad": 0}
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in originals:
            decode_image(data)
        for _ in range(count):
            data = mutated(rng.choice(originals), rng)
            if form == "PNG" and rng.random() < 0.7:
                data = with_valid_checksums(data)
            try:
                image = decode_image(data, max_pixels=1_000_000, shard="s", key="k")
            except BadSample as bad:
                outcomes["bad"] += 1
                assert (
                    (bad.shard, bad.key) == ("s", "k")
                    and bad.reason
                    and "0x" not in bad.reason
                    and "\n" not in bad.reason
                )
            else:
                outcomes["image"] += 1
                assert image.mode == "RGB" and 0 < image.width * image.height <= 1_000_000
    assert not caplog.records and min(outcomes.values()) > count // 50, outcomes


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_images_are_an_image_or_a_bad_sample(
    form: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], stack_of_a_hang: None
) -> None:
    decode_mutations(form, 5000, 0, caplog)
    if form != "TIFF":  # libtiff prints a line of its own
        assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("form", FORMATS)
def test_many_mutated_images_are_an_image_or_a_bad_sample(
    form: str, seed: int, caplog: pytest.LogCaptureFixture, stack_of_a_hang: None
) -> None:
    decode_mutations(form, 30_000, seed, caplog)
