"""E3: images that take far more time than their size tells are bad samples; the usual ones are decoded."""

from __future__ import annotations

import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pair_data import encoded, gradient, picture, put, stream
from PIL import Image

from megacid.data import decode
from megacid.data.decode import MAX_SCANS, BadSample, decode_image
from megacid.data.index import load_index


def progressive(side: int, scans: int = 0, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated `scans` times, with segments in front of each."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True, quality=50)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (between + last) * scans + b"\xff\xd9"


def sequential(scans: int) -> bytes:
    """A sequential JPEG of 64 x 64 pixels with one scan per colour, the last of them repeated."""
    data = encoded(Image.new("RGB", (64, 64)), "JPEG")
    at = data.index(b"\xff\xda")
    parts = [b"\xff\xda\0\x08\x01" + bytes([colour, 0 if colour == 1 else 0x11]) + b"\0\x3f\0" for colour in (1, 2, 3)]
    return data[:at] + parts[0] + parts[1] + parts[2] * scans + b"\xff\xd9"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def inserted(form: str, at: int, filling: bytes) -> bytes:
    """A small image with a filling at a place in its header."""
    data = encoded(gradient(), form)
    return data[:at] + filling + data[at:]


def gif(filling: bytes) -> bytes:
    data = encoded(gradient().convert("L"), "GIF")
    return (
        inserted("GIF", 13 + 3 * (2 << (data[10] & 7)), filling) if data[10] & 128 else data[:13] + filling + data[13:]
    )


def bmp(width: int, height: int, runs: bytes) -> bytes:
    """An 8-bit BMP with run-length encoding."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + header + bytes(1024) + runs


def tiff(width: int, height: int, tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """An 8-bit grey TIFF. tags: type, count and value or offset by tag; `data` begins at byte 1000."""
    fields = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1), **tags}
    entries = b"".join(struct.pack("<HHII", tag, *fields[tag]) for tag in sorted(fields))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4)
    return head.ljust(1000, b"\0") + data


def big_tiff(tags: int) -> bytes:
    entry = struct.pack("<HHQQ", 700, 3, 1, 1)
    return b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, tags) + entry * tags


FEW, MANY = 20_000, 21_000
PROFILE = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20)))
PARTS = "headers of more than"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "400 scans": (lambda: progressive(1000, 400), "JPEG with more than 100 scans"),
    "10,000 scans of few pixels": (lambda: progressive(16, 10_000), "JPEG with more than 100 scans"),
    "scans of many pixels": (lambda: progressive(4000, 60), r"JPEG with 70 scans of 4000 x 4000 pixels, more than"),
    "scans behind comments": (lambda: progressive(1000, 400, b"\xff\xfe\0\4\xff\xd9"), "JPEG with more than 100 scans"),
    "scans behind fill bytes": (lambda: progressive(1000, 400, b"\xff\xff\xff"), "JPEG with more than 100 scans"),
    "scans of one colour": (lambda: sequential(10_000), "JPEG with more than 100 scans"),
    "comments before the scan": (lambda: inserted("JPEG", 2, b"\xff\xfe\0\2" * (MANY // 3)), PARTS),
    "comments between scans": (lambda: progressive(16, 1, b"\xff\xfe\0\2" * MANY), PARTS),
    "fill bytes": (lambda: inserted("JPEG", 2, b"\xff" * MANY), PARTS),
    "png of tiny chunks": (lambda: inserted("PNG", 33, chunk(b"abCd", b"") * MANY), PARTS),
    "png of empty pixels": (lambda: inserted("PNG", 33, chunk(b"IDAT", b"") * (MANY // 2)), PARTS),
    "png of profiles": (lambda: inserted("PNG", 33, PROFILE * 20), "compressed texts of up to"),
    "gif of comments": (lambda: gif(b"!\xfe\x01a\0" * (MANY // 4)), PARTS),
    "gif of one long comment": (lambda: gif(b"!\xfe" + b"\x01a" * (MANY // 2) + b"\0"), PARTS),
    "gif of one hidden comment": (lambda: gif(b"!\xf9\0" + b"\x01a" * (MANY // 2) + b"\0"), PARTS),
    "gif of zeros": (lambda: gif(bytes(MANY)), PARTS),
    "bmp of jumps": (lambda: bmp(1000, 1000, b"\0\2\0\0" * (MANY // 2)), PARTS),
    "bmp of ends of lines": (
        lambda: bmp(60_000, 310, b"\1\5\0\0" * 310),
        "with run-length encoding, more than",
    ),
    "tiff of tiles outside": (
        lambda: tiff(8000, 8000, {259: (3, 1, 8), 322: (4, 1, 16), 323: (4, 1, 1 << 22), 324: (4, 1, 1000)}, bytes(99)),
        "tiles of 8000 x 4194304 pixels, more than 64000000",
    ),
    "tiff of a huge tile": (
        lambda: tiff(8, 8, {259: (3, 1, 8), 322: (4, 1, 60_000), 323: (4, 1, 60_000), 324: (4, 1, 1000)}, bytes(99)),
        "tiles of 60000 x 60000 pixels, more than 64000000",
    ),
    "tiff of lzma": (
        lambda: encoded(gradient(), "TIFF", compression="lzma"),
        "TIFF with lzma compression",
    ),
    "tiff of tags": (lambda: big_tiff(MANY), PARTS),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_image_made_to_take_long_is_a_bad_sample(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = BOMBS[case]
    if reason == PARTS:
        monkeypatch.setattr(decode, "MAX_READS", FEW)  # a million take seconds
    with pytest.raises(BadSample, match=f"s/k: .*{reason}"):
        decode_image(make(), shard="s", key="k")


def test_a_million_strips_of_a_tiff_are_read_without_a_list_of_them() -> None:
    """Pillow's own list has one entry for each, of which only the first eight are of this image."""
    strips = np.full(300_000, 1000, "<u4").tobytes()
    tags = {273: (4, 300_000, 2000), 278: (4, 1, 1), 279: (4, 300_000, 2000 + len(strips))}
    data = tiff(8, 8, tags, bytes(range(8)).ljust(1000, b"\0") + strips + np.full(300_000, 8, "<u4").tobytes())
    assert (np.asarray(decode_image(data))[:, :, 0] == np.arange(8)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP"])
def test_bytes_behind_an_image_are_no_reason_to_refuse_it(form: str) -> None:
    """Phones append a video, cameras a second image: any bytes, among them those of a marker of a JPEG."""
    tail = np.random.default_rng(0).bytes(1_500_000) + b"\xff\xda\0\x02" * 1000
    assert decode_image(encoded(gradient(), form) + (b"" if form == "AVIF" else tail)).size == (40, 24)
    if form == "JPEG":
        assert decode_image(progressive(64) + tail).size == (64, 64)


def test_usual_progressive_images_are_decoded() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(noise.convert(mode), "JPEG", progressive=True, quality=90)
        assert data.count(b"\xff\xda") >= 6 and decode_image(data).size == (400, 300)
    assert decode_image(progressive(200, MAX_SCANS - 10)).size == (200, 200)
    assert decode_image(sequential(1)).size == (64, 64)
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 500  # a thumbnail may hold the markers of an image
    assert decode_image(encoded(noise, "JPEG", progressive=True, exif=exif)).size == (400, 300)
    several = encoded(noise, "MPO", save_all=True, append_images=[noise], progressive=True)
    assert decode_image(several).size == (400, 300)
    with pytest.raises(BadSample, match="JPEG with more than 100 scans"):
        scan = several[several.rindex(b"\xff\xda") : -2]
        first = several.index(b"\xff\xda")
        decode_image(several[:first] + scan * 200 + several[first:])


def test_a_bmp_with_run_length_encoding_is_decoded() -> None:
    assert decode_image(bmp(64, 4, b"\x40\5\0\0" * 4 + b"\0\1")).size == (64, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_made_to_take_long_are_replaced_and_counted(tmp_path: Path, workers: int) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(16):
            put(tar, f"k{number}.jpg", progressive(1000, 400) if number == 5 else picture(number))
            put(tar, f"k{number}.txt", str(number).encode())
    batches = list(stream(load_index(tmp_path), workers=workers, total_steps=4))
    assert not any(batch.failure for batch in batches)
    assert {reason for batch in batches for reason in batch.replaced} == {"00000/k5: JPEG with more than 100 scans"}
