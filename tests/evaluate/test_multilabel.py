"""Sets of several labels per image: mean average precision against scikit-learn, ranks, bad labels, the tool."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_ranks
from offline_data import run, save_model
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.linear_probe import choose_strength, fit, hold_out
from megacid.evaluate.zero_shot import MultiLabelScores, class_embeddings, zero_shot_multilabel
from megacid.models.clip import LoadedClip
from megacid.models.student import build_student, loaded_student

QUIET = Execution(batch_size=3, progress=lambda describe, total: nullcontext(no_progress))
CLASSES = ("red", "green", "blue", "never")  # the last one does not occur


def labels_of(images: int) -> np.ndarray:
    """Every combination of the first three classes, also none."""
    row = np.arange(images)
    return np.stack([row & 1, row >> 1 & 1, row >> 2 & 1, 0 * row], axis=1)


def npy(label: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, label, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    """A .npy file without the values that its header promises."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write_set(root: Path, first: bytes | None = None) -> Path:
    """first: in place of the labels of the first test image."""
    random = np.random.default_rng(0)
    for split, images in (("train", 40), ("test", 23)):
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text("1\n")
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for row, label in enumerate(labels_of(images)):
                noise = 60 * random.standard_normal((8, 8, 3))
                buffer = io.BytesIO()
                pixels = (np.array([200, 200, 200]) * label[:3] + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(buffer, "png")
                data = first if first is not None and (split, row) == ("test", 0) else npy(label)
                for ending, content in (("png", buffer.getvalue()), ("npy", data)):
                    info = tarfile.TarInfo(f"s{row:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo with {c}.\n")
    (root / "dataset_type.txt").write_text("multilabel\n")
    return root


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    return loaded_student(build_student("digits-student", embed_dim=32, seed=5), "memory")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "objects")


def measured(clip: LoadedClip, root: Path) -> tuple[dict[str, float], list[list[int]]]:
    found = zero_shot_multilabel(clip, load_benchmark(root, multilabel=True), QUIET)
    return found.metrics(), found.label.tolist()


def test_the_mean_average_precision_is_scikit_learns_of_all_scores(clip: LoadedClip, root: Path) -> None:
    benchmark = load_benchmark(root, multilabel=True)
    split = benchmark.split("test", clip.preprocess_eval)
    image = clip.encode_image(torch.stack([split[row][0] for row in range(len(split))]))
    score = (image @ class_embeddings(clip, benchmark, QUIET).T).double().numpy()
    want = np.mean([average_precision_score(labels_of(23)[:, c], score[:, c]) for c in range(3)])
    metrics, label = measured(clip, root)
    assert label == labels_of(23).tolist()
    assert metrics == {"mean_average_precision": pytest.approx(want, abs=1e-6)} and 0 < want < 1


def test_every_rank_has_the_result_of_a_single_one(clip: LoadedClip, root: Path) -> None:
    whole = measured(clip, root)
    for other in run_ranks(measured, 2, clip, root):
        assert other == whole


def test_the_average_precision_of_a_known_order() -> None:
    score = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    label = torch.tensor([[1, 0], [0, 0], [1, 0]])
    # Class 0: precisions 1 and 2/3 at its two images. Class 1 does not occur.
    assert MultiLabelScores(score, label).metrics()["mean_average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(UserError, match="all 3 samples are without a label"):
        MultiLabelScores(score, 0 * label).metrics()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error_that_says_so(value: float) -> None:
    score, label = torch.tensor([[0.9, 0.1], [value, 0.2], [0.7, 0.3]]), torch.tensor([[1, 0], [0, 1], [1, 0]])
    with pytest.raises(UserError, match="1 of 3 samples have scores that are not finite"):
        MultiLabelScores(score, label).metrics()


def test_few_images_are_enough_to_choose_a_strength_but_not_one() -> None:
    assert [int(hold_out(torch.ones(images, 2)).sum()) for images in (1, 2, 3, 10)] == [0, 1, 1, 2]
    with pytest.raises(UserError, match="number of train samples is 1, expected at least 2"):
        choose_strength(torch.randn(1, 4), torch.tensor([[1, 1]]), num_classes=2)


def test_the_probe_is_one_logistic_regression_for_each_class() -> None:
    generator = torch.Generator().manual_seed(0)
    feature_ND = torch.randn(80, 6, generator=generator)
    label_NC = (feature_ND[:, :3] + torch.randn(80, 3, generator=generator) > 0).long()
    probe = fit(feature_ND, label_NC, num_classes=3, strength=0.5)
    assert probe.converged
    for c in range(3):
        oracle = LogisticRegression(C=0.5, max_iter=10_000, tol=1e-10)
        oracle.fit(feature_ND.double().numpy(), label_NC[:, c].numpy())
        np.testing.assert_allclose(probe.weight[c].numpy(), oracle.coef_[0], atol=1e-4)
        np.testing.assert_allclose(probe.bias[c].item(), oracle.intercept_[0], atol=1e-4)


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (npy(np.ones(3, np.int64)), r"the .npy is of shape \[3\], expected 4 values of 0 or 1"),
        (npy(np.array([0, 1, 2, 0])), "the .npy has the value 2, expected 0 or 1"),
        (npy(np.array([1, -1, 0, 0])), "the .npy has the value -1, expected 0 or 1"),
        (npy(np.array([0, 1, np.nan, 0])), "the .npy has the value nan, expected 0 or 1"),
        (npy(np.array(["0", "1", "0", "0"])), "the .npy is of dtype <U1, expected numbers"),
        (npy(np.array([{}, 1, 0, 0], dtype=object), allow_pickle=True), "the .npy cannot be read"),
        (b"not an array", "the .npy cannot be read"),
        (b"PK\x03\x04garbage", "the .npy cannot be read"),
        (header_of((10**14,)), r"the .npy cannot be read \(the array of shape \(100000000000000,\) needs"),
        (header_of((1 << 20,)) + bytes(8), r"the .npy cannot be read \(the array of shape \(1048576,\) needs"),
    ],
)
def test_bad_labels_are_one_error(clip: LoadedClip, tmp_path: Path, first: bytes, named: str) -> None:
    with pytest.raises(UserError, match=f"0.tar, sample s0000: {named}"):
        measured(clip, write_set(tmp_path / "set", first))


def test_the_tool_measures_zero_shot_and_linear_probe_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacid.evaluate.linear_probe.STRENGTHS", (0.1, 10.0))
    model = save_model(tmp_path / "model", seed=5)
    options = ("--model", f"local-dir:{model}", "--out", tmp_path / "out", "--device", "cpu")
    said = run("eval", *options, "--suite", root.parent)
    results = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    metrics = {result["task"]: result["metrics"] for result in results}
    assert set(metrics) == {"zeroshot_classification", "linear_probe"}
    assert set(metrics["zeroshot_classification"]) == {"mean_average_precision"}
    probe = metrics["linear_probe"]
    assert 0.5 < probe["lp_mean_average_precision"] <= 1 and "held_out_mean_average_precision" in probe
    assert f"mean_average_precision {probe['lp_mean_average_precision']:.4f}" in said
    run("eval", *options, "--dataset-root", root, "--tasks", "linear_probe_pre_projection")
    (file,) = (tmp_path / "out").glob("objects_*_linear_probe_pre_projection.json")
    unprojected = json.loads(file.read_text())
    assert unprojected["task"] == "linear_probe_pre_projection" and unprojected["metrics"].keys() == probe.keys()
    assert unprojected["metrics"] != probe  # of other features
    said = run("eval", *options, "--dataset-root", root, "--tasks", "knn", expect=2)
    assert f"--tasks has 'knn', but {root} is a multilabel set, expected some of zero_shot, linear_probe" in said
    with pytest.raises(UserError, match="says 'multilabel', expected 'classification'"):
        load_benchmark(root)
