"""F17, F18: damaged, unusual and hostile pictures are decoded correctly, or replaced in the same way every time."""

from __future__ import annotations

import json
import re
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_data import encoded, gradient, peak_mib, picture, put, same, stream, transform
from PIL import Image, PngImagePlugin

from megacid.data.decode import FORMATS, BadSample, decode_caption, decode_image
from megacid.data.index import ShardIndex, load_index


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- decoded right -----------------------------------------------------------------------------------------------


def test_sixteen_bits_of_grey_keep_their_shades() -> None:
    """PIL's own conversion makes every value above 255 white."""
    wide = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)
    got = pixels(decode_image(encoded(Image.fromarray(wide), "PNG")))
    assert (got == (wide >> 8)[:, :, None]).all()


def test_sixteen_bits_of_colour_keep_their_shades() -> None:
    """PIL cannot write such a file."""
    wide = (np.arange(24 * 40 * 3) * 21).astype(np.uint16).reshape(24, 40, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
    got = pixels(decode_image(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")))
    assert (got == (wide >> 8)).all()


def test_palette_with_transparency_keeps_its_colours_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (4, 1)))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    for form, transparency in (("PNG", b"\0\x80\xff\xff"), ("GIF", 1)):
        got = pixels(decode_image(encoded(image, form, transparency=transparency)))
        assert got[0].tolist() == [[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]] and not len(recwarn)


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", mode) for mode in ("L", "LA", "1", "P", "RGBA")]
    + [("BMP", mode) for mode in ("L", "1", "P", "RGBA")]
    + [("TIFF", mode) for mode in ("L", "LA", "1", "P", "RGBA", "CMYK")]
    + [("GIF", mode) for mode in ("L", "1", "P")],
)
def test_grey_and_transparent_pictures_keep_their_values(form: str, mode: str) -> None:
    image = gradient().convert(mode)
    want = pixels(image.convert("RGB"))
    assert (pixels(decode_image(encoded(image, form))) == want).all()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_of_sixteen_bits_of_grey_keeps_its_shades(compression: str) -> None:
    wide = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)
    got = pixels(decode_image(encoded(Image.fromarray(wide), "TIFF", compression=compression)))
    assert (got == (wide >> 8)[:, :, None]).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_tiff_of_numbers_without_a_range_is_refused(kind: type) -> None:
    data = encoded(Image.fromarray(np.arange(960).reshape(24, 40).astype(kind)), "TIFF")
    with pytest.raises(BadSample, match=r"TIFF with 32-bit \w pixels, expected unsigned"):
        decode_image(data)


def test_cmyk_jpeg_has_its_colours_not_their_negative() -> None:
    flat = Image.new("RGB", (32, 32), (200, 60, 20))
    got = pixels(decode_image(encoded(flat.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(got - [200, 60, 20]).max() < 12


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_one_pixel_is_a_picture(form: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (1, 1), (250, 250, 250)), form))
    assert image.size == (1, 1) and pixels(image).min() > 240


TURNS = {1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"], 6: ["ROTATE_270"],
         7: ["TRANSVERSE"], 8: ["ROTATE_90"]}  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_every_exif_orientation_is_turned_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(form, {})
    got = pixels(decode_image(encoded(gradient(), form, exif=exif, **options)))
    upright = gradient()
    for turn in TURNS[orientation]:
        upright = upright.transpose(Image.Transpose[turn])
    assert got.shape == pixels(upright).shape and np.abs(got - pixels(upright)).max() < (
        20 if form in ("JPEG", "AVIF") else 1
    )


def test_damaged_exif_says_nothing_about_the_pixels() -> None:
    exif = b"Exif\0\0MM\0*" + b"\xff" * 40
    got = decode_image(encoded(gradient(), "JPEG", exif=exif, quality=95))
    assert got.size == (40, 24)


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_used(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), (60 * i, 0, 0)) for i in range(4)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=10, **options)
    assert pixels(decode_image(data)).max() < 8  # the others have 60 or more


# ---- refused -----------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Header, those chunks, and one row of pixels."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" * (1 + 3 * min(width, 64)) * min(height, 64)))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(chunks) + rows + chunk(b"IEND", b"")


def squeezed(mib: int) -> bytes:
    """Zeros of so many MiB, compressed a thousand times, without making them first."""
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(bytes(1 << 20)) for _ in range(mib)]) + packer.flush()


def webp_canvas(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


HARM = {
    "png 20000 x 20000": lambda: png(20000, 20000),
    "png 9000 x 9000": lambda: png(9000, 9000),  # which the decoder alone would make
    "png 2^31 x 1": lambda: png(2**31 - 1, 1),
    "png 1 x 4 million": lambda: png(1, 4_000_000),  # few pixels, until the shorter side is made 224
    "jpeg 65500 x 65500": lambda: _resized_jpeg(65500),
    "webp 16384 x 16384": lambda: webp_canvas(16384),
    "zTXt of 100 MiB": lambda: png(64, 64, chunk(b"zTXt", b"k\0\0" + squeezed(100))),
    "iTXt of 100 MiB": lambda: png(64, 64, chunk(b"iTXt", b"k\0\x01\0\0\0" + squeezed(100))),
    "iCCP of 100 MiB": lambda: png(64, 64, chunk(b"iCCP", b"k\0\0" + squeezed(100))),
    "100 zTXt of 1 MiB": lambda: png(64, 64, *[chunk(b"zTXt", b"k%d\0\0" % i + squeezed(1)) for i in range(100)]),
    # Within the decoder's limit of 64 MiB, but one wide character makes four bytes of each.
    "60 iTXt of 1 MiB": lambda: png(
        64,
        64,
        *[
            chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + zlib.compress(b"\xf0\x9f\x98\x80" + bytes(1_000_000)))
            for i in range(60)
        ],
    ),
    "IDAT of 100 MiB": lambda: png(64, 64).replace(b"IEND", b"IEND")[:-12] + chunk(b"IDAT", squeezed(100)),
}


def _resized_jpeg(side: int) -> bytes:
    data = bytearray(encoded(gradient(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("case", HARM)
def test_a_picture_made_to_fill_the_memory_is_refused_or_harmless(case: str) -> None:
    data = HARM[case]()
    assert len(data) < 1 << 20
    before = peak_mib(reset=True)
    try:
        image = decode_image(data, shard="s", key="k")
    except BadSample as bad:
        # From the header: the memory alone would not show it, which is not touched before there are pixels.
        expected = "s/k: .* pixels" if case.startswith(("png", "jpeg")) else "s/k: "
        assert re.match(expected, str(bad))
    else:
        # Text, profiles and what lies behind the pixels may be passed over; a large picture may not.
        assert case.startswith(("iCCP", "IDAT")) and image.size == (64, 64)
    assert peak_mib() - before < 50


def test_text_limits_of_the_decoder_are_as_they_come() -> None:
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20 and PngImagePlugin.MAX_TEXT_MEMORY <= 64 << 20


def test_texts_that_pictures_have_are_no_reason_to_refuse_them() -> None:
    info = PngImagePlugin.PngInfo()
    for number in range(40):
        info.add_text(f"exif:{number}", "a value " * 12, zip=number % 2 == 0)
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>" * 400, zip=True)
    assert (pixels(decode_image(encoded(gradient(), "PNG", pnginfo=info))) == pixels(gradient())).all()


def test_a_word_without_an_end_is_no_caption() -> None:
    assert decode_caption(b" a \xff red square\n") == "a \ufffd red square"
    assert len(decode_caption(b"word " * 10_000)) == 49_999
    with pytest.raises(BadSample, match="s/k: a caption with a word of 1001 characters, more than 1000"):
        decode_caption(b"x " + b"y" * 1001, shard="s", key="k")


# ---- in the stream -----------------------------------------------------------------------------------------------

GOOD = 40


def bad_files() -> dict[str, bytes]:
    jpeg = encoded(gradient(200, 200), "JPEG", quality=90)
    cuts = {f"cut at {share} %": jpeg[: len(jpeg) * share // 100] for share in (20, 50, 90, 99)}
    return {
        **cuts,
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "html": b"<html><body>404 not found</body></html>",
        "ppm": encoded(gradient(), "PPM"),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "bomb": png(20000, 20000),
        "png without pixels": png(64, 64)[:60],
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """GOOD samples of one colour each, and every bad file between them."""
    folder = tmp_path_factory.mktemp("images") / "shards"
    folder.mkdir()
    bad = list(bad_files().values())
    samples: list[tuple[int, bytes]] = [(number, picture(number)) for number in range(GOOD)]
    for place, data in enumerate(bad):
        samples.insert(place * 4 + 1, (GOOD + place, data))
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, data in samples[shard * 17 : (shard + 1) * 17]:
                put(tar, f"k{number}.jpg", data)
                put(tar, f"k{number}.txt", str(number).encode())
    index = load_index(folder)
    assert index.num_samples == GOOD + len(bad)
    return index


def test_bad_pictures_are_replaced_and_the_trace_is_the_same_however_it_is_read(mixed: ShardIndex) -> None:
    options: dict[str, Any] = {"total_steps": 12, "error_budget": 0.005, "seeded_transform": True}
    whole = list(stream(mixed, **options))
    assert len(whole) == 12 and all(b.image.shape == (8, 3, 4, 4) and b.failure is None for b in whole)
    assert all(b.image[:, 0, 0, 0].long().equal(b.text[:, 0]) for b in whole)
    assert {int(n) for b in whole for n in b.text[:, 0]} == set(range(GOOD))
    named = {sentence.partition(":")[0] for b in whole for sentence in b.replaced}
    assert {name.partition("/")[2] for name in named} == {f"k{GOOD + i}" for i in range(len(bad_files()))}
    for workers in (0, 2):
        for start in (0, 1, 5, 11) if workers else range(12):
            rest = list(stream(mixed, start_step=start, workers=workers, **options))
            assert len(rest) == 12 - start
            assert all(same(a, b) and a.replaced == b.replaced for a, b in zip(whole[start:], rest))
        ranks = [list(stream(mixed, rank=r, world=2, micro_batch=4, workers=workers, **options)) for r in range(2)]
        for one, *parts in zip(whole, *ranks):
            assert one.sample_id.tolist() == [n for part in parts for n in part.sample_id.tolist()]
            assert torch.equal(one.image, torch.cat([part.image for part in parts]))
            assert one.replaced == tuple(s for part in parts for s in part.replaced)


@pytest.mark.parametrize("world", [1, 2])
def test_over_the_budget_the_failure_names_shard_and_key_and_later_batches_are_dummies(
    mixed: ShardIndex, world: int
) -> None:
    for rank in range(world):
        batches = list(stream(mixed, rank=rank, world=world, micro_batch=8 // world, total_steps=12))
        first = next(i for i, b in enumerate(batches) if b.failure)
        failure = batches[first].failure or ""
        assert (
            "bad samples among" in failure
            and f"on rank {rank}" in failure
            and "10 are allowed (error budget 0.001)" in failure
        )
        assert (batches[first].replaced[-1] in failure and "/k4" in failure) or "/k5" in failure
        assert len(batches) == 12 and {b.failure for b in batches[first:]} == {failure}
        assert all(b.sample_id.tolist() == [-1] * (8 // world) for b in batches[first + 1 :])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hundred_bad_ones_in_a_row_are_a_failure(tmp_path: Path, workers: int) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(120):
            put(tar, f"k{number}.jpg", b"<html>")
            put(tar, f"k{number}.txt", b"0")
    batches = list(stream(load_index(tmp_path), workers=workers, error_budget=1.0, total_steps=2))
    assert len(batches) == 2 and batches[0].failure and batches[0].failure == batches[1].failure
    assert batches[0].failure.startswith("100 bad samples in a row, the last one 00000/k")
    assert (
        f"not a readable {', '.join(FORMATS)} image: the data is damaged, see tools/index_shards.py"
        in batches[0].failure
    )
    assert (
        batches[0].image.shape == (8, 3, 4, 4) and not batches[0].image.any() and batches[0].text.tolist() == [[0]] * 8
    )
    assert json.dumps(batches[0].failure)


def test_the_sentence_about_a_bad_sample_is_the_same_in_every_process() -> None:
    """It is compared and logged: no addresses in it."""
    for data in bad_files().values():
        messages = []
        for _ in range(2):
            with pytest.raises(BadSample) as error:
                decode_image(data, shard="s", key="k")
            messages.append(str(error.value))
        assert messages[0] == messages[1] and "0x" not in messages[0]
    assert transform(Image.new("RGB", (4, 4))).shape == (3, 4, 4)


def test_plain_texts_of_a_png_are_read_as_long_as_they_are() -> None:
    """An iTXt that is not compressed is as large as it looks, so many of them are no bomb."""
    texts = [chunk(b"iTXt", b"k%d\0\0\0en\0\0" % i + b"x" * 1200) for i in range(40)]
    assert decode_image(png(64, 64, *texts)).size == (64, 64)
