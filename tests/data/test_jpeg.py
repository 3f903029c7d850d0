"""data.decoder: simplejpeg decodes JPEGs to the bits of Pillow, torch resizes them nearly alike, bad stays bad."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pair_data import encoded, put
from PIL import Image, ImageFilter
from torchvision.transforms import CenterCrop

from megacid.config.load import load_run
from megacid.data import jpeg
from megacid.data.batch import Batch
from megacid.data.decode import BadSample, decode_image
from megacid.data.jpeg import Jpeg, decode_jpeg, image_reader, open_image
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models.clip import StudentSpec, train_transform
from megacid.models.pixels import TensorResize
from megacid.training.open_data import open_data
from megacid.training.watchdog import decoded_sample

CPU = torch.device("cpu")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise over a few coloured areas, about as smooth as a photograph."""
    random = np.random.default_rng(seed)
    noise = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    areas = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(areas, noise.filter(ImageFilter.GaussianBlur(1.5)), 0.4)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(40, 24), "JPEG", exif=exif)


PLAIN = {
    "4:2:0": encoded(photo(61, 47), "JPEG", quality=90, subsampling=2),
    "4:2:2": encoded(photo(61, 47), "JPEG", quality=90, subsampling=1),
    "4:4:4": encoded(photo(61, 47), "JPEG", quality=90, subsampling=0),
    "low quality": encoded(photo(200, 120), "JPEG", quality=5),
    "progressive": encoded(photo(61, 47), "JPEG", progressive=True),
    "RGB without conversion": encoded(photo(40, 24), "JPEG", keep_rgb=True),
    "grey": encoded(photo(61, 47).convert("L"), "JPEG"),
    "upright by EXIF": rotated(1),
    "one pixel": encoded(photo(1, 1), "JPEG"),
    "one column": encoded(photo(1, 90), "JPEG"),
}
ODD = {
    "CMYK": encoded(photo(40, 24).convert("CMYK"), "JPEG"),
    "rotated by EXIF": rotated(6),
    "mirrored by EXIF": rotated(2),
    "several pictures": encoded(photo(40, 24), "MPO", save_all=True, append_images=[photo(40, 24, 1)]),
    "PNG": encoded(photo(40, 24), "PNG"),
    "WebP": encoded(photo(40, 24), "WEBP"),
}
BAD = {
    "empty": b"",
    "a text": b"no image",
    "cut in the header": PLAIN["4:2:0"][:100],
    "cut in the pixels": PLAIN["4:2:0"][: len(PLAIN["4:2:0"]) // 2],
    "cut at the end": PLAIN["4:2:0"][:-2],
    "12 bits": PLAIN["4:2:0"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "too many pixels": encoded(photo(300, 300), "JPEG"),
    "too narrow": encoded(Image.new("RGB", (1, 250)), "JPEG"),
}


def pixels_or_reason(read: Any, data: bytes) -> Any:
    """What a reader makes of a file: shape and bytes of the pixels, or why it is a bad sample."""
    try:
        image = read(data, max_pixels=80_000, shard="s", key="k")
        pixels = image.pixels(1) if isinstance(image, Jpeg) else np.array(image)
        return pixels.shape, pixels.tobytes()
    except BadSample as bad:
        return str(bad)


@pytest.mark.parametrize("name", [*PLAIN, *ODD, *BAD])
def test_either_decoder_gives_the_same_pixels_or_the_same_reason(name: str) -> None:
    data = (PLAIN | ODD | BAD)[name]
    expected = pixels_or_reason(decode_image, data)
    assert isinstance(expected, str) == (name in BAD)
    assert pixels_or_reason(open_image, data) == expected
    if name in PLAIN | ODD:
        assert isinstance(open_image(data), Jpeg) == (name in PLAIN)


def test_damaged_jpegs_are_as_bad_as_for_pillow() -> None:
    random, kinds = np.random.default_rng(0), set()
    originals = [PLAIN["4:2:0"], PLAIN["progressive"], PLAIN["grey"], ODD["rotated by EXIF"]]
    for number in range(100):
        data = bytearray(originals[number % len(originals)])
        for at in random.integers(0 if number % 2 else 300, len(data), random.integers(1, 4)):
            data[at] = random.integers(256)
        expected = pixels_or_reason(decode_image, bytes(data))
        assert pixels_or_reason(open_image, bytes(data)) == expected, f"mutation {number}"
        kinds.add(type(expected))
    assert kinds == {str, tuple}


def test_what_simplejpeg_warns_about_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(jpeg, "decode_image", lambda *args, **options: asked.append(options) or decode_image(*args))
    data = PLAIN["4:2:0"][:-40] + b"\xff\xd9"  # an end mark, but pixels are missing
    image = open_image(data, max_pixels=9_000, shard="s", key="k")
    assert isinstance(image, Jpeg) and image.pixels(2).shape == (47, 61, 3)
    assert asked == [{"max_pixels": 9_000, "shard": "s", "key": "k"}]
    intact = dataclasses.replace(image, data=PLAIN["4:2:0"])
    assert intact.pixels(2).shape == (24, 31, 3) and len(asked) == 1


def test_the_watchdog_names_the_jpeg_that_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def decode(*args: Any, **options: Any) -> Any:
        found.append(decoded_sample(sys._getframe()))
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=decode))
    decode_jpeg(Jpeg(b"", (1, 1), 1, "00003", "cat"), 1, shard="00003", key="cat")
    assert found == [", decoding 00003/cat"]


# ---- resizing --------------------------------------------------------------------------------------------------------

STUDENTS = {
    "CLIP": StudentSpec("ViT-B-32"),
    "another size": StudentSpec("ViT-B-32", image_size=75),
    "a squashed image": StudentSpec("ViT-B-16-SigLIP", pretrained="webli"),
    "bilinear": StudentSpec("MobileCLIP-S1", pretrained="datacompdr"),
}


def resized(student: Any, augment: Any, decoder: Any, data: bytes) -> np.ndarray:
    torch.manual_seed(3)
    return train_transform(student, augment, decoder)(image_reader(decoder)(data)).numpy().astype(int)


@pytest.mark.parametrize("augment", ["none", "random_resized_crop"])
@pytest.mark.parametrize("name", STUDENTS)
def test_torch_resizes_the_same_crop_to_nearly_the_same_bytes(name: str, augment: Any) -> None:
    for size, form in (((256, 256), "JPEG"), ((400, 300), "JPEG"), ((150, 251), "PNG")):
        data = encoded(photo(*size), form)
        expected = resized(STUDENTS[name], augment, "pillow", data)
        found = resized(STUDENTS[name], augment, "simplejpeg", data)
        difference = np.abs(found - expected)
        assert found.shape == expected.shape and difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize("augment", ["none", "random_resized_crop"])
def test_a_scaled_jpeg_is_close_to_the_whole_one(augment: Any) -> None:
    for side in (500, 1000):
        data = encoded(photo(side, side - 20), "JPEG", quality=90)
        expected = resized(STUDENTS["CLIP"], augment, "simplejpeg", data)
        found = resized(STUDENTS["CLIP"], augment, "simplejpeg_scaled", data)
        assert found.shape == expected.shape and 0 < np.abs(found - expected).mean() < 2


@pytest.mark.parametrize(
    ("size", "factor"),
    [((224, 224), 1), ((447, 448), 1), ((448, 448), 2), ((1792, 895), 2), ((896, 2000), 4), ((1792, 1792), 8),
     ((4000, 4000), 8)],
)  # fmt: skip
def test_a_jpeg_is_scaled_as_far_as_the_crop_allows(size: tuple[int, int], factor: int) -> None:
    asked = []

    def pixels(factor: int) -> np.ndarray:
        asked.append(factor)
        return np.zeros((-(-size[1] // factor), -(-size[0] // factor), 3), np.uint8)

    for decoder in ("simplejpeg", "simplejpeg_scaled"):
        image: Any = SimpleNamespace(size=size, pixels=pixels)
        assert train_transform(STUDENTS["CLIP"], "none", decoder)(image).shape == (3, 224, 224)  # type: ignore[arg-type]
    assert asked == [1, factor]


def test_a_transform_that_torch_does_not_repeat_is_refused() -> None:
    with pytest.raises(
        UserError, match=r'"megacid.data.decoder" is other than "pillow", but .* is CenterCrop, expected'
    ):
        TensorResize([CenterCrop(8)], scaled=False)


# ---- from the run file to the batches --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpeg")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for number in range(24):
            data = encoded(photo(90, 80, number), "PNG" if number % 5 == 0 else "JPEG", quality=90)
            put(tar, f"k{number}.jpg", data[: 300 if number in (4, 11) else None])
            put(tar, f"k{number}.txt", b"a picture")
    block = {
        "run": {"name": "jpeg", "total_steps": 4, "dir": str(folder)},
        "student": {"model": "digits-student"},
        "data": {"shards": str(folder / "shards"), "augment": "random_resized_crop", "error_budget": 0.01},
        "loss": {"contrastive": 1.0},
    }
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    tree = {"train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": optimizer, "megacid": block}
    (folder / "run.json").write_text(json.dumps(tree))
    return folder


def batches(root: Path, *settings: str, start: int = 0) -> list[Batch]:
    run = load_run(root / "run.json", list(settings), world=1)
    return list(open_data(run, Parallel(0, 1, 0, CPU, None)).stream(start))


@pytest.mark.parametrize("decoder", ["simplejpeg", pytest.param("simplejpeg_scaled", marks=pytest.mark.slow)])
def test_batches_depend_on_the_setting_alone(root: Path, decoder: str) -> None:
    pillow = batches(root)
    alone = batches(root, f"data.decoder={decoder}")
    for others in (
        batches(root, f"data.decoder={decoder}", "data.workers=2"),
        batches(root, f"data.decoder={decoder}"),
    ):
        assert all(a.image.equal(b.image) and a.replaced == b.replaced for a, b in zip(alone, others, strict=True))
    rest = batches(root, f"data.decoder={decoder}", start=2)
    assert all(a.image.equal(b.image) for a, b in zip(alone[2:], rest, strict=True))
    # The same samples are bad, for the same reasons, and the crops are those of Pillow.
    assert [(b.sample_id.tolist(), b.replaced) for b in alone] == [(b.sample_id.tolist(), b.replaced) for b in pillow]
    assert any(batch.replaced for batch in pillow)
    for a, b in zip(alone, pillow):
        assert a.image.dtype == torch.uint8 and not a.image.equal(b.image)
        assert (a.image.int() - b.image.int()).abs().float().mean() < (0.05 if decoder == "simplejpeg" else 2.5)


def test_a_missing_simplejpeg_is_one_line_before_the_data_are_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    missing = f"data.shards={tmp_path / 'absent'}"
    with pytest.raises(UserError, match=r'"megacid.data.decoder" is "simplejpeg", which needs simplejpeg .*: pip'):
        batches(root, "data.decoder=simplejpeg", missing)
    with pytest.raises(UserError, match="absent"):
        batches(root, missing)
