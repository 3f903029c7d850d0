import copy

import numpy as np
import pytest
from pair_data import encoded, gradient
from PIL import Image

from megacid.data.decode import BadSample, decode_image


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_decode_to_rgb(form: str) -> None:
    image = decode_image(encoded(gradient(), form, **({} if form == "PNG" else {"quality": 95})))
    assert image.mode == "RGB" and image.size == (40, 24)
    error = np.abs(np.asarray(image, int) - np.asarray(gradient(), int))
    assert error.max() == 0 if form == "PNG" else error.mean() < 6


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
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


def test_bad_sample_survives_the_way_out_of_a_worker() -> None:
    error = copy.copy(BadSample("00003", "k", "why"))  # the way of pickling, without it
    assert (error.shard, error.key, error.reason, str(error)) == ("00003", "k", "why", "00003/k: why")
