"""Images stay uint8 until they are on the device, where they get the bits of open_clip's own float transform."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from open_clip.transform import image_transform_v2
from pair_data import SIZES, write_shards
from PIL import Image
from torch import Tensor

from megacid import train
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.data.batch import Batch
from megacid.data.loader import PairStream
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models import clip
from megacid.models.clip import PixelNormalization, StudentSpec, preprocess_cfg, train_transform
from megacid.models.output import StudentOutput
from megacid.training.components import make_student
from megacid.training.gradient_cache import GradientCache
from megacid.training.memory import report_memory
from megacid.training.open_data import Data, open_data
from megacid.training.run_settings import check_same_settings, write_config
from megacid.training.state import build_train_state

CPU = torch.device("cpu")
STUDENTS = {
    "CLIP": StudentSpec("ViT-B-32"),
    "another size": StudentSpec("ViT-B-32", image_size=75),
    "a squashed image": StudentSpec("ViT-B-16-SigLIP", pretrained="webli"),
    "mean 0, std 1": StudentSpec("MobileCLIP-S1", pretrained="datacompdr"),
    "a small model": StudentSpec("digits-student"),
}


def float_transform(student: Any, augment: str) -> Any:
    return image_transform_v2(preprocess_cfg(student), is_train=augment != "none")


@pytest.mark.parametrize("augment", ["none", "random_resized_crop"])
@pytest.mark.parametrize("name", STUDENTS)
def test_pixels_normalised_on_the_device_are_the_bits_of_the_float_transform(name: str, augment: Any) -> None:
    student, random = STUDENTS[name], np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((300, 256), (64, 90), (224, 224))
    ]
    found = []
    for transform in (train_transform(student, augment), float_transform(student, augment)):
        torch.manual_seed(0)
        found.append(torch.stack([transform(image) for image in images]))
    pixels, expected = found
    assert pixels.dtype == torch.uint8 and expected.dtype == torch.float32
    normalize = PixelNormalization(student, "cpu")
    for strides in (torch.contiguous_format, torch.channels_last):
        images_BCHW = normalize(pixels.contiguous(memory_format=strides))
        assert images_BCHW.equal(expected) and images_BCHW.is_contiguous()


def local_model(folder: Path, **preprocess: Any) -> StudentSpec:
    folder.mkdir()
    config = {"model_cfg": clip.model_config("digits-student"), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / clip.WEIGHTS_FILE).write_bytes(b"")
    return StudentSpec(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "preprocess",
    [
        {"mean": 0.25, "std": 3},
        {"mean": [0.1], "std": [1, 2, 3]},
        {"mean": [0, 0, 0], "std": [1, 1, 1]},
        {"std": 1e-30},
    ],
    ids=str,
)
def test_every_value_of_a_byte_is_normalised_as_by_open_clip(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    student = local_model(tmp_path / "model", **preprocess)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    *_, to_tensor, normalize = float_transform(student, "none").transforms
    expected = normalize(to_tensor(pixels[0].permute(1, 2, 0).numpy()))
    assert PixelNormalization(student, "cpu")(pixels)[0].equal(expected)


@pytest.mark.parametrize("preprocess", [{"std": [0.5, 0, 0.5]}, {"std": 1e-50}, {"mean": [0.5] * 4}], ids=str)
def test_constants_that_cannot_normalise_are_one_line_at_the_start(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"preprocess_cfg of local-dir:.* has mean .* and std .*, expected three numbers"
    ):
        PixelNormalization(local_model(tmp_path / "model", **preprocess), "cpu")


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_open_clip_whose_transform_ends_otherwise_is_one_line(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    def shortened(*args: Any, **options: Any) -> Any:
        transform = image_transform_v2(*args, **options)
        transform.transforms = transform.transforms[: -1 - steps]
        return transform

    monkeypatch.setattr(clip, "image_transform_v2", shortened)
    for use in (lambda student: train_transform(student, "none"), lambda student: PixelNormalization(student, "cpu")):
        with pytest.raises(UserError, match="expected its last steps to be ToTensor and Normalize"):
            use(StudentSpec("ViT-B-32"))


# ---- from the shards to the student ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    write_shards(folder / "shards")
    block = {
        "run": {"name": "pixels", "total_steps": sum(SIZES.values()) // 8, "dir": str(folder)},
        "student": {"model": "digits-student"},
        "data": {"shards": str(folder / "shards"), "augment": "random_resized_crop"},
        "loss": {"contrastive": 1.0},
    }
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    tree = {"train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": optimizer, "megacid": block}
    (folder / "run.json").write_text(json.dumps(tree))
    return folder


def load(root: Path, *settings: str) -> RunFile:
    return load_run(root / "run.json", list(settings), world=1)


def alone(group: Any = None) -> Parallel:
    return Parallel(0, 1, 0, CPU, group)


def float_batches(data: Data, run: RunFile) -> list[Batch]:
    """The same stream with open_clip's own transform, read in this process."""
    stream = data.stream(0)
    assert isinstance(stream, PairStream)
    transform = float_transform(run.megacid.student, run.megacid.data.augment)
    return list(PairStream(stream.sources, stream.plan, replace(stream.options, transform=transform, workers=0)))


@pytest.mark.parametrize("settings", [(), ("data.workers=2",), ("data.workers=2", "data.prefetch=1")], ids=str)
def test_what_a_worker_sends_is_one_byte_per_value(root: Path, settings: tuple[str, ...]) -> None:
    run = load(root, *settings)
    data = open_data(run, alone())
    whole, expected = list(data.stream(0)), float_batches(data, run)
    assert data.normalize is not None and len(whole) == len(expected) == 3
    for batch, floats in zip(whole, expected):
        assert batch.image.dtype == torch.uint8 and batch.image.shape == (8, 3, 32, 32)
        assert batch.image.untyped_storage().nbytes() == 8 * 3 * 32 * 32
        assert batch.image.is_shared() == (run.megacid.data.workers > 0)  # the memory that the worker has written
        assert data.normalize(batch.image).equal(floats.image)
    rest = list(data.stream(1))
    assert [b.image.tolist() for b in rest] == [b.image.tolist() for b in whole[1:]]


@pytest.mark.parametrize(("settings", "factor"), [((), None), (("workers=2",), 2), (("workers=2", "prefetch=5"), 5)])
def test_prefetch_reaches_the_workers(
    root: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], factor: int | None
) -> None:
    from megacid.data import loader

    found = []

    class Recorded(loader.DataLoader[Any]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(self.prefetch_factor)

    monkeypatch.setattr(loader, "DataLoader", Recorded)
    next(iter(open_data(load(root, *(f"data.{word}" for word in settings)), alone()).stream(0)))
    assert found == [factor]


def test_prefetch_may_change_in_a_run(root: Path, tmp_path: Path) -> None:
    write_config(load(root), tmp_path, 1, None)
    check_same_settings(load(root, "data.workers=2", "data.prefetch=5"), tmp_path)


def images_of_a_step(root: Path, settings: list[str]) -> dict[str, list[Tensor]]:
    """The images of one step: what the gradient cache keeps, what the student gets, and the float transform's."""
    kept: list[Tensor] = []

    class Recorded(GradientCache):
        def add(self, out: StudentOutput) -> None:
            kept.append(self.batches[len(kept)].image)
            super().add(out)

    train.GradientCache = Recorded  # type: ignore[misc]  in the forked rank only
    run = load(root, *settings)
    state = build_train_state(run, alone(dist.group.WORLD))
    seen: list[Tensor] = []
    state.student.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    metrics: Any = SimpleNamespace(waited_for_data=lambda seconds: None)
    train.accumulate(0, state, iter(state.data.stream(0)), metrics, lambda phase: None)
    return {"kept": kept, "seen": seen, "floats": [batch.image for batch in float_batches(state.data, run)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_are_kept_as_bytes_and_the_student_gets_normalised_images(root: Path, dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    settings = ["gradient_accumulation_steps=2", "zero_optimization.stage=1", f"bf16.enabled={str(bf16).lower()}"]
    (found,) = run_ranks(images_of_a_step, 1, root, settings)
    assert [image.dtype for image in found["kept"]] == [torch.uint8] * 2
    first, second = (image.to(dtype) for image in found["floats"][:2])
    assert len(found["seen"]) == 3
    for image, expected in zip(found["seen"], (first, second, first)):  # the second forward comes last
        assert image.dtype == dtype and image.equal(expected)


def test_the_memory_of_images_in_flight_is_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for settings, words in (((), ""), (("workers=3", "prefetch=4"), "0.3 MiB = 3 workers x 4 x 8 x 3 x 32 x 32 bytes")):
        caplog.clear()
        run = load(root, *(f"data.{word}" for word in settings))
        report_memory(run, make_student(run, Data(lambda start: None)), None, alone())  # type: ignore[arg-type,return-value]
        assert ("shared memory of the images" in caplog.text) == bool(words) and words in caplog.text
