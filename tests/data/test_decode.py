import copy

import numpy as np
import pytest
from pair_data import encoded, gradient
from PIL import Image

from megacid.data import decode
from megacid.data.decode import FORMATS, BadSample, decode_image


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_decodes_to_rgb(form: str) -> None:
    lossy = form in ("JPEG", "WEBP", "AVIF")
    image = decode_image(encoded(gradient(), form, **({"quality": 95} if lossy else {})))
    assert image.mode == "RGB" and image.size == (40, 24)
    error = np.abs(np.asarray(image, int) - np.asarray(gradient(), int))
    assert error.mean() < 6 if lossy else error.max() <= (32 if form == "GIF" else 0)


@pytest.mark.parametrize("form", ["PPM", "EPS", "ICO", "TGA", "PCX", "JPEG2000", "PDF", "SGI", "DDS"])
def test_other_formats_are_refused_whatever_their_name(form: str) -> None:
    with pytest.raises(BadSample, match="s0/k1"):
        decode_image(encoded(gradient(), form), shard="s0", key="k1")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(gradient().convert(mode), form)).mode == "RGB"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_a_cut_jpeg_never_becomes_grey_pixels(share: float) -> None:
    data = encoded(gradient(200, 200), "JPEG", quality=95)
    with pytest.raises(BadSample):
        decode_image(data[: int(len(data) * share)])


def test_too_many_pixels_are_refused_from_the_header() -> None:
    with pytest.raises(BadSample, match="40 x 24 pixels, more than 959"):
        decode_image(encoded(gradient(), "PNG"), max_pixels=959)
    assert decode_image(encoded(gradient(), "PNG"), max_pixels=960).size == (40, 24)


def test_a_decompression_bomb_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # PIL warns above it, and errs above twice as much
    with pytest.raises(BadSample, match="Decompression"):
        decode_image(encoded(gradient(), "PNG"))


def test_exif_orientation_is_respected() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it upright
    image = decode_image(encoded(gradient(), "JPEG", exif=exif))
    assert image.size == (24, 40)


def test_loading_truncated_images_is_not_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encoded(gradient(), "PNG"))


def test_avif_without_its_library_has_one_clear_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(), "AVIF")
    monkeypatch.setattr(decode, "_READABLE", tuple(name for name in FORMATS if name != "AVIF"))
    with pytest.raises(BadSample, match="s/k: an AVIF image, which the installed Pillow cannot decode: install Pillow"):
        decode_image(data, shard="s", key="k")
    with pytest.raises(BadSample, match="s/k: not a readable JPEG, "):
        decode_image(b"\0\0\0\x1cftypheic" + bytes(100), shard="s", key="k")


def test_bad_sample_survives_the_way_out_of_a_worker() -> None:
    error = copy.copy(BadSample("00003", "k", "why"))  # the way of pickling, without it
    assert (error.shard, error.key, error.reason, str(error)) == ("00003", "k", "why", "00003/k: why")
