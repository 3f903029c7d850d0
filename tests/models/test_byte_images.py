"""Embedding and evaluation get bytes from their workers, and give the bits of images that the workers normalise."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_data import write_benchmark
from offline_data import save_model, write_shards
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.utils.data import DataLoader

from megacid.data.index import load_index
from megacid.distributed.stopping import no_progress
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.execution import Execution, image_features
from megacid.models.clip import LoadedClip, load_clip
from megacid.models.student import build_student, loaded_student
from megacid.offline.embed.encoding import encode
from megacid.offline.embed.input import Pairs, as_is

ODD = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 2, 0.25], "interpolation": "bilinear", "resize_mode": "squash", "size": 99}
CLIPS = ["as trained", "odd constants", "student"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    for name, seed in (("as trained", 1), ("odd constants", 2)):
        save_model(folder / name, seed)
    file = folder / "odd constants" / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": ODD}))
    write_shards(folder / "shards")
    write_benchmark(folder / "set")
    return folder


def open_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> LoadedClip:
    if name == "student":
        return loaded_student(build_student("digits-student", embed_dim=32, seed=5).to(dtype), "memory", dtype=dtype)
    return load_clip(f"local-dir:{folder / name}", precision="fp32" if dtype == torch.float32 else "bf16")


def float_transform(clip: LoadedClip) -> Any:
    """The transform of the model that open_clip has built, as it attaches it."""
    config: Any = clip.model.visual.preprocess_cfg
    return image_transform_v2(PreprocessCfg(**config), is_train=False)


def sent_bytes(image: Tensor) -> int:
    """Size of the shared memory in which a worker has sent the images."""
    assert image.is_shared()
    return image.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLIPS)
def test_embeddings_of_bytes_have_the_bits_of_those_of_normalised_images(
    folder: Path, name: str, dtype: torch.dtype
) -> None:
    clip, index = open_model(folder, name, dtype), load_index(folder / "shards")
    batches = []
    for transform in (clip.preprocess_eval, float_transform(clip)):
        pairs = Pairs(index, transform, clip.tokenizer)
        loader = DataLoader(pairs, batch_sampler=[list(range(12, 24))], num_workers=1, collate_fn=as_is)
        batches += list(loader)
    pixels, floats = batches
    values = 11 * 3 * 32 * 32  # one of the 12 is damaged
    assert (sent_bytes(pixels.image), sent_bytes(floats.image)) == (values, 4 * values)
    got, expected = encode(clip, index, pixels), encode(clip, index, floats)
    assert got.image.tobytes() == expected.image.tobytes() and got.text.tobytes() == expected.text.tobytes()


@pytest.mark.parametrize("name", CLIPS)
def test_features_of_an_evaluation_are_those_of_normalised_images(folder: Path, name: str) -> None:
    clip, benchmark = open_model(folder, name), load_benchmark(folder / "set")
    how = Execution(8, 1, progress=lambda describe, total: nullcontext(no_progress))
    splits = [benchmark.split("test", transform) for transform in (clip.preprocess_eval, float_transform(clip))]
    sent = [next(split.batches(8, workers=1))[0] for split in splits]
    assert [sent_bytes(image) for image in sent] == [8 * 3 * 32 * 32, 4 * 8 * 3 * 32 * 32]
    (got, label), (expected, same_label) = (image_features(clip, split, how, no_progress) for split in splits)
    assert len(got) > 20 and got.equal(expected) and label.equal(same_label)
