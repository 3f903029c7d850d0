"""B2: which members of a sample are its image, by their extension."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from pair_data import encoded, gradient, put
from PIL import Image
from test_lost_samples import pairs, write

from megacid.data.decode import FORMATS, OTHER_EXTENSIONS, decode_image
from megacid.data.index import ShardReader, load_index
from megacid.data.tar_samples import IMAGE_EXTENSIONS
from megacid.errors import UserError


def test_every_extension_is_an_image_also_in_capitals(tmp_path: Path) -> None:
    assert {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"} <= set(IMAGE_EXTENSIONS)
    names = [name for e in IMAGE_EXTENSIONS for name in (f"{e}1.{e}", f"{e}1.txt", f"{e}2.{e.upper()}", f"{e}2.txt")]
    write(tmp_path / "0.tar", names)
    index = load_index(tmp_path)
    assert index.num_samples == 2 * len(IMAGE_EXTENSIONS) and index.dropped == {}
    Image.init()
    assert all(Image.EXTENSION[f".{e}"] == form for form, names in FORMATS.items() for e in names)
    assert not set(IMAGE_EXTENSIONS) & set(OTHER_EXTENSIONS)


@pytest.mark.parametrize("extension", ["heic", "JXL", "svg", "psd", "ppm"])
def test_images_that_are_not_decoded_are_counted_by_their_extension(tmp_path: Path, extension: str) -> None:
    others = pairs([f"h{i}" for i in range(12)], (extension, "txt"))
    write(tmp_path / "0.tar", pairs([f"k{i}" for i in range(20)]) + others)
    reason = f"sample without an image but with a .{extension.lower()}, which is not decoded"
    with pytest.raises(UserError, match=f"12 of 32 samples cannot be used.*: {reason} .12 times, such as h0") as error:
        load_index(tmp_path)
    assert "convert these files to JPEG, PNG or WebP" in str(error.value)
    index = load_index(tmp_path, allow_bad=True)
    assert index.num_samples == 20 and index.dropped == {reason: 12}


@pytest.mark.parametrize(
    "order", [("gif", "jpg", "txt"), ("jpg", "txt", "tiff"), ("avif", "png", "jpg", "txt", "webp")]
)
def test_of_several_images_of_a_sample_the_usual_one_is_used(tmp_path: Path, order: tuple[str, ...]) -> None:
    write(tmp_path / "0.tar", pairs(["a", "b"], order))
    index = load_index(tmp_path)
    assert index.table(0).keys == ["a", "b"] and index.dropped == {}
    data = (tmp_path / "0.tar").read_bytes()
    for row, key in enumerate("ab"):
        assert data[int(index.table(0).image[row, 0]) - 512 :].startswith(f"{key}.jpg\0".encode())


def test_an_image_that_is_not_decoded_next_to_one_that_is_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", pairs(["a", "b"], ("heic", "jpg", "svg", "txt")))
    index = load_index(tmp_path)
    assert index.num_samples == 2 and index.dropped == {}


def test_the_content_and_not_the_name_decides_how_an_image_is_decoded(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, form in enumerate(("PNG", "BMP", "TIFF")):
            put(tar, f"k{number}.jfif", encoded(gradient(), form))
            put(tar, f"k{number}.txt", b"a")
    reader = ShardReader(load_index(tmp_path))
    for row in range(3):
        assert (np.asarray(decode_image(reader.read(0, row, "image"))) == np.asarray(gradient())).all()
