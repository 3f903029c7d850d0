"""The linear probe by CLIP_benchmark's recipe: optimiser, batches, search, seeds, ranks, the tool."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmark_data import TEST, TRAIN, write_benchmark
from harness import run_ranks
from offline_data import run, save_model
from test_multilabel import write_set
from torch import Tensor, nn
from torch.utils.data import DataLoader

import megacid.evaluate.adamw_probe as module
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.evaluate.adamw_probe import WEIGHT_DECAYS, adamw, choose_weight_decay, fit
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.linear_probe import held_out_rows
from megacid.evaluate.tasks import evaluate
from megacid.models.clip import LoadedClip
from megacid.models.student import build_student, loaded_student

CLASSES, WIDTH = 6, 10
QUIET = Execution(batch_size=8, progress=lambda describe, total: nullcontext(no_progress))


def clusters(samples: int, seed: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Unit rows [N, D] around CLASSES fixed directions, and their classes [N]."""
    centre_CD = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(CLASSES, (samples,), generator=generator)
    noise_ND = noise * torch.randn(samples, WIDTH, generator=generator)
    return F.normalize(centre_CD[label_N] + noise_ND, dim=1), label_N


def test_weights_are_those_of_adamw_on_a_shuffling_loader_of_single_samples() -> None:
    """150 samples are three batches, the last of them smaller."""
    feature_ND, label_N = clusters(150, 0)
    linear = fit(feature_ND, label_N, num_classes=CLASSES, weight_decay=1e-3, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = nn.Linear(WIDTH, CLASSES)
        optimizer = torch.optim.AdamW(want.parameters(), weight_decay=1e-3)
        samples: Any = list(zip(feature_ND, label_N))
        batches: DataLoader[Any] = DataLoader(samples, batch_size=64, shuffle=True)
        for step in range(30):
            if step % 3 == 0:
                epoch = iter(batches)
            image, label = next(epoch)
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 30))
            optimizer.zero_grad()
            F.cross_entropy(want(image), label).backward()
            optimizer.step()
    torch.testing.assert_close(linear.weight, want.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(linear.bias, want.bias.detach(), rtol=0, atol=1e-6)


def test_a_seed_decides_the_bits_and_torchs_generator_keeps_its_state() -> None:
    feature_ND, label_N = clusters(100, 0)
    options: dict[str, Any] = {"num_classes": CLASSES, "weight_decay": 0.1}
    first = fit(feature_ND, label_N, **options, seed=1).weight
    torch.rand(5)
    state = torch.random.get_rng_state()
    assert torch.equal(fit(feature_ND, label_N, **options, seed=1).weight, first)
    assert not torch.equal(fit(feature_ND, label_N, **options, seed=2).weight, first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("peak", [0, 1, 41, 95, 96])
def test_the_search_finds_the_peak_of_an_accuracy_with_a_single_one(monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
    tried: list[float] = []

    def fit_nothing(*_: Any, weight_decay: float, **__: Any) -> nn.Module:
        tried.append(weight_decay)
        return nn.Identity()

    def accuracy(*_: Any) -> dict[str, float]:
        return {"acc1": 1 - abs(WEIGHT_DECAYS.index(tried[-1]) - peak) / 200}

    monkeypatch.setattr(module, "fit", fit_nothing)
    monkeypatch.setattr(module, "scored", accuracy)
    feature_ND, label_N = clusters(50, 0)
    given = feature_ND, label_N, held_out_rows(label_N)
    assert choose_weight_decay(*given, num_classes=CLASSES) == (WEIGHT_DECAYS[peak], 1.0)
    assert len(tried) == len(set(tried)) <= 15
    assert (WEIGHT_DECAYS[0], WEIGHT_DECAYS[-1], len(WEIGHT_DECAYS)) == (1e-6, 100.0, 97)
    monkeypatch.setattr(module, "scored", lambda *_: {"acc1": 0.5})
    assert choose_weight_decay(*given, num_classes=CLASSES) == (WEIGHT_DECAYS[0], 0.5)


def test_the_final_fit_has_the_held_out_samples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPANS", ())
    sizes: list[int] = []

    def counted(feature_ND: Tensor, label_N: Tensor, **options: Any) -> nn.Linear:
        sizes.append(len(feature_ND))
        assert len(feature_ND) == len(label_N)
        return fit(feature_ND, label_N, **options)

    monkeypatch.setattr(module, "fit", counted)
    (train_ND, train_N), (test_ND, test_N) = clusters(200, 1, noise=0.3), clusters(100, 2, noise=0.3)
    fitted = adamw(train_ND, train_N, test_ND, CLASSES, no_progress)
    assert sizes[-1] == 200 and 150 < sizes[0] < 170 and set(sizes[:-1]) == {sizes[0]}
    assert (fitted.score_NC.argmax(dim=1) == test_N).double().mean() > 0.9  # chance: 0.17
    assert fitted.held_out > 0.9 and not fitted.score_NC.requires_grad
    with pytest.raises(UserError, match="no class twice"):
        adamw(train_ND[:1], train_N[:1], test_ND, CLASSES, no_progress)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("sets") / "colours")


def measured(clip: LoadedClip, root: Path) -> dict[str, Any]:
    return evaluate("linear_probe_adamw", clip, load_benchmark(root), QUIET)["metrics"]


def test_the_tool_has_clip_benchmarks_names_and_one_result_on_all_ranks(root: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=5)
    options = ("eval", "--model", f"local-dir:{model}", "--out", tmp_path, "--batch-size", 8, "--device", "cpu")
    said = run(*options, "--dataset-root", root, "--tasks", "linear_probe_adamw")
    (file,) = tmp_path.glob("colours_*_linear_probe_adamw.json")
    result = json.loads(file.read_text())
    metrics = result["metrics"]
    assert result["task"] == "linear_probe_adamw" and f"acc1 {metrics['lp_acc1']:.4f}" in said
    assert 0.4 < metrics["lp_acc1"] <= 1  # chance: 0.2
    assert metrics["weight_decay"] in WEIGHT_DECAYS and 0 < metrics["held_out_acc1"] <= 1
    fixed = {"epochs": 10, "seed": 0, "fewshot_k": -1, "normalized": True}
    assert fixed.items() <= metrics.items()
    assert (metrics["train_samples"], metrics["test_samples"]) == (TRAIN, TEST)
    clip = loaded_student(build_student("digits-student", embed_dim=32, seed=5), "memory")
    whole = measured(clip, root)
    assert whole == metrics
    assert run_ranks(measured, 2, clip, root) == [whole, whole]


def test_a_set_of_several_labels_per_image_is_refused(tmp_path: Path) -> None:
    model, objects = save_model(tmp_path / "model", seed=5), write_set(tmp_path / "objects")
    options = ("--model", f"local-dir:{model}", "--out", tmp_path, "--dataset-root", objects, "--device", "cpu")
    said = run("eval", *options, "--tasks", "linear_probe_adamw", expect=2)
    assert f"--tasks has 'linear_probe_adamw', but {objects} is a multilabel set, expected some of zero_shot" in said
