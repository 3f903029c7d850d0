"""Projections fitted to the teacher equal a ridge regression, and help on samples that they were not fitted to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from small_student import run_file
from torch import Tensor, nn

from megacid.config.load import load_run
from megacid.data.batch import Batch, DataBudgetError, Positions
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models.clip import register_models
from megacid.models.student import Student, build_student
from megacid.training import dry_run
from megacid.training.open_data import Data
from megacid.training.projection_fit import RIDGE, fit_projections

WIDTH, MICRO, FITTED, ALL = 24, 5, 203, 300
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 2},  # its projection has a bias
}


def model(folder: Path, kind: str) -> str:
    config = {"embed_dim": 40, "vision_cfg": VISION[kind], "text_cfg": TEXT}
    (folder / f"fitted-{kind}.json").write_text(json.dumps(config))
    register_models(folder)
    return f"fitted-{kind}"


def samples(student: Student) -> Batch:
    """Samples whose teacher is a linear function of the student's features, with noise."""
    g = torch.Generator().manual_seed(4)
    image, text = torch.randn(ALL, *student.image_shape, generator=g), torch.randint(1, 64, (ALL, 8), generator=g)
    student.eval()
    with torch.no_grad():
        features = student.clip.encode_image(image), student.clip.encode_text(text)
    student.train()
    rows = [x.std(dim=0).mean() * torch.randn(ALL, WIDTH, generator=g) * 0.3 for x in features]
    rows = [r + x @ torch.randn(x.shape[1], WIDTH, generator=g) for r, x in zip(rows, features)]
    teacher = [nn.functional.normalize(r, dim=-1) for r in rows]
    return Batch(image, text, None, teacher[0], teacher[1], torch.arange(ALL))


class Stream:
    def __init__(self, batch: Batch, plan: Positions, failure: str | None = None) -> None:
        self.batch, self.plan, self.failure = batch, plan, failure

    def __iter__(self) -> Iterator[Batch]:
        for positions in self.plan:
            part = self.batch._map(lambda x, at=[p % ALL for p in positions]: x[at])
            yield replace(part, failure=self.failure)

    def statistics(self) -> dict[str, Any]:
        return {"kept": ALL}


def fit(student: Student, batch: Batch, failure: str | None = None) -> None:
    parallel = Parallel(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), dist.group.WORLD)
    data = Data(
        lambda start: Stream(batch, Positions(1, 1, 1, 0, 1, 0, 1)),
        samples=lambda plan: Stream(batch, plan, failure if parallel.rank == 1 else None),
    )
    fit_projections(student, data, SimpleNamespace(micro_batch=MICRO), parallel, samples=FITTED)  # type: ignore[arg-type]


def weights_and_cosines(name: str) -> dict[str, Tensor]:
    """The projections after the fit, their inputs, and the cosines to the teacher before and after it."""
    student = build_student(name, embed_dim=WIDTH, seed=1)
    batch = samples(student)
    assert batch.teacher_image is not None and batch.teacher_text is not None

    @torch.no_grad()
    def cosines() -> Tensor:
        out = student.eval()(batch.image[FITTED:], batch.text[FITTED:])
        student.train()
        targets = batch.teacher_image[FITTED:], batch.teacher_text[FITTED:]  # type: ignore[index]
        return torch.stack([(own * target).sum(dim=-1).mean() for own, target in zip(out[:2], targets)])

    found = {"before": cosines()}
    fit(student, batch)
    assert student.training
    return found | {"after": cosines()} | {n: p.detach().clone() for n, p in student.clip.named_parameters()}


def ridge(x: np.ndarray, t: np.ndarray, bias: bool) -> np.ndarray:
    """The regression by an augmented least-squares problem, whose normal equations are never formed."""
    penalty = np.sqrt(RIDGE * np.mean(np.sum(x * x, axis=0)))
    rows = np.hstack([penalty * np.eye(x.shape[1]), np.zeros((x.shape[1], int(bias)))])
    x = np.hstack([x, np.ones((len(x), int(bias)))])
    return np.linalg.lstsq(np.vstack([x, rows]), np.vstack([t, np.zeros((len(rows), t.shape[1]))]), rcond=None)[0]


@pytest.mark.parametrize(("kind", "world"), [("vit", 1), ("vit", 2), ("resnet", 2)])
def test_the_fit_is_a_ridge_regression_and_raises_the_cosine_of_other_samples(
    kind: str, world: int, tmp_path: Path
) -> None:
    name = model(tmp_path, kind)
    first, *others = run_ranks(weights_and_cosines, world, name)
    for other in others:
        assert all(torch.equal(value, other[key]) for key, value in first.items())
    assert (first["after"] > first["before"] + 0.3).all(), (first["before"], first["after"])
    # Nothing else has changed, and the projections are those of the reference.
    student = build_student(name, embed_dim=WIDTH, seed=1).eval()
    batch = samples(student)
    image, text = "visual.proj" if kind == "vit" else "visual.attnpool.c_proj.weight", "text_projection"
    changed = {key for key, value in student.clip.named_parameters() if not torch.equal(value, first[key])}
    assert changed == {image, text} | ({"visual.attnpool.c_proj.bias"} if kind == "resnet" else set())
    x_image, x_text = projection_inputs(student.eval(), batch)
    assert batch.teacher_image is not None and batch.teacher_text is not None
    want = ridge(x_image, batch.teacher_image[:FITTED].double().numpy(), kind == "resnet")
    if kind == "resnet":
        np.testing.assert_allclose(first["visual.attnpool.c_proj.bias"], want[-1], rtol=1e-4, atol=1e-5)
        want = want[:-1].T
    np.testing.assert_allclose(first[image], want, rtol=1e-4, atol=1e-5)
    want = ridge(x_text, batch.teacher_text[:FITTED].double().numpy(), False)
    np.testing.assert_allclose(first[text], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def projection_inputs(student: Student, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of both projections, from the layers before them."""
    clip, seen = student.clip, {}
    pool = clip.visual.ln_post if hasattr(clip.visual, "ln_post") else clip.visual.attnpool  # type: ignore[union-attr]
    pool.register_forward_hook(lambda module, args, out: seen.update(image=out, pool=args[0]))
    clip.ln_final.register_forward_hook(lambda module, args, out: seen.update(text=out))  # type: ignore[union-attr]
    student(batch.image[:FITTED], batch.text[:FITTED])
    text = seen["text"][torch.arange(FITTED), batch.text[:FITTED].argmax(dim=-1)]
    if pool is not getattr(clip.visual, "attnpool", None):
        return seen["image"][:, 0].double().numpy(), text.double().numpy()
    pool.c_proj = nn.Linear(64, 64)  # the output of attention, unchanged
    nn.init.eye_(pool.c_proj.weight)
    nn.init.zeros_(pool.c_proj.bias)
    return pool(seen["pool"]).double().numpy(), text.double().numpy()


def refusals(name: str) -> list[str]:
    said = []
    student = build_student(name, embed_dim=WIDTH, seed=1)
    batch = samples(student)
    for changed, failure, kind in (
        (replace(batch, teacher_text=None), None, UserError),
        (batch, "a damaged shard", DataBudgetError),
    ):
        with pytest.raises(kind) as caught:
            fit(build_student(name, embed_dim=WIDTH, seed=1), changed, failure)
        said.append(str(caught.value))
    return said


def test_captions_that_the_teacher_lacks_and_a_failure_of_one_rank_are_errors_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(refusals, 2, model(tmp_path, "vit"))
    assert first == second and "data.teacher has no text embeddings" in first[0] and first[1] == "a damaged shard"


def test_a_tower_without_a_linear_projection_is_named(tmp_path: Path) -> None:
    VISION["mlp"] = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "mlp"}
    with pytest.raises(AssertionError, match=r"the image tower ends with visual.head.mlp.fc1.bias, .*one linear"):
        run_ranks(weights_and_cosines, 1, model(tmp_path, "mlp"))


def test_a_dry_run_reports_unreadable_samples_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise DataBudgetError("a damaged shard")

    monkeypatch.setattr(dry_run, "build_train_state", damaged)
    args = SimpleNamespace(resume="auto", fork=None)
    with pytest.raises(DataBudgetError, match="a damaged shard"):
        dry_run.dry_run(load_run(run_file(tmp_path), [], world=1), args, Parallel(0, 1, 0, torch.device("cpu"), None))  # type: ignore[arg-type]
