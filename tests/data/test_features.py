"""Feature vectors as training data: the stream, the tower over them, and what the run file may not ask of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_data import RUN
from pair_data import PLAN

from megacid.config.load import load_run
from megacid.data.batch import Batch, Positions
from megacid.data.features import FeatureSet, FeatureStream
from megacid.errors import UserError
from megacid.models.feature_tower import FeatureTower

SIZES = (9, 7, 8)
CLASSES, DIM = 5, 3


def write_features(root: Path, **meta_fields: Any) -> Path:
    """Three files; every value of a row is its global number, its label the number modulo the classes."""
    start = 0
    for folder in ("features", "labels"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate(SIZES):
        rows = np.arange(start, start + size)
        np.save(root / "features" / f"features_{number:05d}.npy", np.repeat(rows[:, None], DIM, 1).astype(np.float16))
        np.save(root / "labels" / f"labels_{number:05d}.npy", (rows % CLASSES).astype(np.int32))
        start += size
    meta = {"made_by": "synthesize", "source": {"seed": 0}, "classes": CLASSES, "dim": DIM, **meta_fields}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "set")


def stream(folder: Path, **changes: int) -> FeatureStream:
    return FeatureStream(FeatureSet(folder), Positions(**{**PLAN, **changes}), seed=1, block_shards=2)


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.sample_id.tolist() for batch in batches]


# ---- the stream --------------------------------------------------------------------------------------------------


def test_feature_label_and_id_belong_together_and_an_epoch_is_complete(folder: Path) -> None:
    seen: list[int] = []
    for batch in stream(folder):
        assert batch.image.dtype == torch.float32 and batch.text.dtype == torch.int64
        assert batch.image.equal(batch.sample_id[:, None].float().expand(-1, DIM))
        assert batch.label is not None and batch.label.equal(batch.sample_id % CLASSES)
        assert batch.text.shape == (8, 0) and batch.teacher_image is None and batch.teacher_text is None
        seen += batch.sample_id.tolist()
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:] and seen[:24] != list(range(24))


@pytest.mark.parametrize("world,micro,accumulation", [(2, 4, 1), (4, 2, 1), (1, 2, 4), (2, 2, 2)])
def test_global_batches_of_features_do_not_depend_on_ranks_or_micro_batches(
    folder: Path, world: int, micro: int, accumulation: int
) -> None:
    expected = ids(list(stream(folder)))
    ranks = [
        ids(list(stream(folder, world=world, rank=rank, micro_batch=micro, accumulation=accumulation)))
        for rank in range(world)
    ]
    for step in range(6):
        parts = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(world)]
        assert [row for part in parts for row in part] == expected[step]


def test_features_resume_from_the_step_alone(folder: Path) -> None:
    assert ids(list(stream(folder, start_step=4))) == ids(list(stream(folder)))[4:]
    assert len(stream(folder, start_step=4, accumulation=2, micro_batch=4)) == 4


def test_a_label_out_of_range_is_a_failure_that_names_its_row(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    labels = np.load(broken / "labels" / "labels_00001.npy")
    labels[3] = CLASSES
    np.save(broken / "labels" / "labels_00001.npy", labels)
    batches = list(stream(broken))
    first = next(i for i, batch in enumerate(batches) if batch.failure)
    assert len(batches) == 6 and first < 3 and {batch.failure for batch in batches[:first]} <= {None}
    for batch in batches[first:]:
        assert batch.failure and "labels_00001.npy row 3 has label 5, expected 0 .. 4" in batch.failure
        assert batch.image.shape == (8, DIM) and batch.label is not None and batch.label.tolist() == [-1] * 8
    assert 12 in batches[first].sample_id.tolist() and batches[first].image.any()
    assert not any(batch.image.any() for batch in batches[first + 1 :])


def test_a_file_that_is_cut_while_it_is_read_is_a_failure_not_a_crash(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    batches = iter(stream(broken))
    os.truncate(broken / "features" / "features_00001.npy", 130)
    (failure,) = {batch.failure for batch in batches} - {None}
    assert "features_00001.npy ends before row" in failure


def spoil(root: Path, case: str) -> None:
    labels, features = root / "labels" / "labels_00001.npy", root / "features" / "features_00001.npy"
    if case == "label dtype":
        np.save(labels, np.zeros(7, np.int64))
    elif case == "rows":
        np.save(labels, np.zeros(6, np.int32))
    elif case == "missing":
        labels.unlink()
    elif case == "feature dtype":
        np.save(features, np.zeros((7, DIM), np.float32))
    elif case == "width":
        np.save(features, np.zeros((7, DIM + 1), np.float16))
    elif case == "torn":
        features.write_bytes(features.read_bytes()[:-8])
    elif case == "other tool":
        (root / "meta.json").write_text(json.dumps({"made_by": "embed", "dim": DIM}))
    elif case == "unfinished":
        (root / "meta.json").unlink()
    else:
        shutil.rmtree(root / "features")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("label dtype", "labels_00001.npy is int64 (7,), expected int32 (7)"),
        ("rows", "labels_00001.npy is int32 (6,), expected int32 (7)"),
        ("missing", "labels_00001.npy is not a readable .npy array"),
        ("feature dtype", "features_00001.npy is float32 (7, 3), expected float16 (n, 3)"),
        ("width", "features_00001.npy is float16 (7, 4), expected float16 (n, 3)"),
        ("torn", "features_00001.npy is not a readable .npy array"),
        ("other tool", "was made by 'embed', expected class-labelled features"),
        ("unfinished", "has no meta.json"),
        ("no files", "has no features/features_*.npy, so there is no train split"),
    ],
)
def test_files_that_do_not_fit_are_refused_at_the_start(folder: Path, tmp_path: Path, case: str, message: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    spoil(broken, case)
    with pytest.raises(UserError) as error:
        FeatureSet(broken)
    assert message in str(error.value)


def test_more_than_the_rows_and_a_missing_test_split_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="has 24 rows, expected at least one global batch of 32"):
        stream(folder, global_batch=32, micro_batch=32)
    with pytest.raises(UserError, match="no test split: --test-per-class above 0"):
        FeatureSet(folder, "test")


def test_clusters_and_true_classes_are_told_apart(tmp_path: Path) -> None:
    clustered = write_features(tmp_path / "clustered", made_by="sweep", true_classes=9)
    (clustered / "true_labels").mkdir()
    for number, size in enumerate(SIZES):
        np.save(clustered / "true_labels" / f"labels_{number:05d}.npy", np.full(size, 8, np.int32))
    clusters, true = FeatureSet(clustered), FeatureSet(clustered, true_labels=True)
    assert (clusters.clustered, clusters.classes, true.classes) == (True, CLASSES, 9)
    rows = np.array([0, 11, 23])
    assert clusters.take_labels(rows).tolist() == [0, 1, 3] and true.take_labels(rows).tolist() == [8, 8, 8]


# ---- the tower ---------------------------------------------------------------------------------------------------


def test_the_towers_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = FeatureTower(6, 4, hidden=8, layers=2, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = (FeatureTower(6, 4, hidden=8, layers=2, seed=seed).state_dict() for seed in (3, 4))
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["projection.weight"].equal(other["projection.weight"])


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_every_parameter_of_the_tower_gets_a_gradient_and_the_output_is_normalised(layers: int) -> None:
    tower = FeatureTower(6, 4, hidden=8, layers=layers)
    image = torch.randn(5, *tower.image_shape, generator=torch.Generator().manual_seed(0))
    out = tower(image, torch.empty(5, tower.text_length, dtype=torch.int64))
    torch.testing.assert_close(out.image.norm(dim=1), torch.ones(5))
    assert out.text.shape == (5, 0) and out.logit_scale.shape == ()
    (out.image @ torch.randn(4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert sum(1 for name, _ in tower.named_parameters() if name.endswith("weight")) == 2 * layers + 1


# ---- the run file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.shards=tars", "are both set ('tars', 'somewhere'), expected exactly one"),
        ("data.features=null", "are null, expected exactly one"),
        ("data.teacher=t", "\"megacid.data.teacher\" is 't', which has no effect without data.shards: remove it"),
        ("data.labels=l", "\"megacid.data.labels\" is 'l', which has no effect without data.shards: remove it"),
        ("data.keep=k", '"megacid.data.keep" is'),
        ("data.augment=random_resized_crop", "\"megacid.data.augment\" is 'random_resized_crop'"),
        (
            "data.workers=2",
            '"megacid.data.workers" is 2, which has no effect without data.shards (or sources): remove it',
        ),
        ("student.grad_checkpointing=true", "remove it, or pass --set student.grad_checkpointing=null"),
        ("student.image_size=32", '"megacid.student.image_size" is 32'),
        ("student.embed_dim=null", '"megacid.student.embed_dim" is null, expected the width'),
        ("student.model=ViT-B-32", 'but the data are features: write "feature-mlp"'),
        ("loss.contrastive=1", '"megacid.loss.contrastive" is 1.0, which has no effect'),
        ("loss.mse=1", '"megacid.loss.mse" is 1.0'),
        ("loss.beta=0.5", '"megacid.loss.beta" is 0.5'),
        ("loss.gamma=0.5", '"megacid.loss.gamma" is 0.5'),
        ("classifier.init=centroids", 'but data.features has none: write "random"'),
        ("student.hidden=0", '"megacid.student.hidden" is 0, expected > 0'),
        ("student.layers=-1", '"megacid.student.layers" is -1, expected >= 0'),
    ],
)
def test_a_run_file_that_asks_features_for_what_they_lack_is_refused(tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RUN))
    load_run(file, world=1)
    with pytest.raises(UserError) as error:
        load_run(file, [change], world=1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.model=feature-mlp", "is 'feature-mlp' but the data are shards"),
        (
            "student.hidden=64",
            '"megacid.student.hidden" is 64, which has no effect without data.features: remove it',
        ),
        ("student.layers=1", '"megacid.student.layers" is 1'),
    ],
)
def test_the_towers_settings_are_refused_beside_shards(tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "run.json"
    block = {**RUN["megacid"], "student": {"model": "ViT-B-32"}, "data": {"shards": "tars", "labels": "clusters"}}
    file.write_text(json.dumps({**RUN, "megacid": block}))
    load_run(file, world=1)
    with pytest.raises(UserError) as error:
        load_run(file, [change], world=1)
    assert message in str(error.value)
