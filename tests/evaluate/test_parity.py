"""Parity with CLIP_benchmark's own code, which runs in the environment that tools/clip_benchmark_parity.sh makes."""

from __future__ import annotations

import io
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_data import write_retrieval_set
from offline_data import run, save_model
from PIL import Image
from test_datasets import write_split
from test_multilabel import CLASSES as OBJECTS
from test_multilabel import write_set
from torch import Tensor

from megacid.distributed.stopping import no_progress
from megacid.evaluate.adamw_probe import adamw
from megacid.evaluate.linear_probe import held_out_rows, scored

pytestmark = pytest.mark.parity

COLOURS = 12
BATCH = 64
CAPTIONS = [[f"{size} thing {row}" for size in ("small", "big", "old")[: 1 + row % 3]] for row in range(40)]
PROBE_TOLERANCE = 0.03  # of the linear probe's metrics, for another order of the train images

# The linear probe of CLIP_benchmark asserts that there is a GPU, which python -O skips, and moves all to it.
ON_A_CPU = "import torch; torch.nn.Module.cuda = torch.Tensor.cuda = lambda self: self\n"
COMMAND_LINE = f"{ON_A_CPU}from clip_benchmark.cli import main; main()"
# Takes a folder with the files that CLIP_benchmark keeps features in. The train images stay in the order of the file.
PROBE = f"""{ON_A_CPU}
import json, sys
from clip_benchmark.metrics.linear_probe import evaluate
randperm = torch.randperm
torch.randperm = lambda n, **options: randperm(n, **options) if options else torch.arange(n)
result = evaluate(None, None, None, -1, {BATCH}, 0, 0.1, 10, "", 0, sys.argv[1], "cpu", val_dataloader=[], amp=False)
json.dump(result, open(sys.argv[2], "w"))
"""


def clip_benchmark(program: str, *words: object, cwd: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [os.environ["MEGACID_PARITY_PYTHON"], "-O", "-c", program, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def samples(images: int, random: np.random.Generator) -> list[tuple[bytes, str]]:
    """(png, class id) of pictures in COLOURS colours with noise; class c has more pictures than class c + 1."""
    colour = np.random.default_rng(0).integers(30, 225, (COLOURS, 3))
    result = []
    for label in (random.random(images) ** 1.5 * COLOURS).astype(int):
        noise = 50 * random.standard_normal((8, 8, 3)) + 40 * random.standard_normal(3)
        buffer = io.BytesIO()
        pixels = (colour[label] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 32)).save(buffer, "png")
        result.append((buffer.getvalue(), str(label)))
    return result


def write_colours(root: Path) -> None:
    """A set with the splits train and test, and train in two parts: samples to fit on and held-out ones."""
    random = np.random.default_rng(1)
    train = samples(400, random)
    fit_rows, held_rows = held_out_rows(torch.tensor([int(label) for _, label in train]))
    parts = {"fit": [train[row] for row in fit_rows], "held": [train[row] for row in held_rows]}
    for split, content in {"train": train, "test": samples(333, random), **parts}.items():
        write_split(root / split, [content[: len(content) // 2], content[len(content) // 2 :]])
    (root / "classnames.txt").write_text("\n".join(f"colour {number}" for number in range(COLOURS)) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\nthe {c}\n{c}, a thing\n")


@dataclass(frozen=True)
class Sets:
    """A model with random weights, and the sets on which both programs measure it."""

    model: str
    root: Path

    def ours(self, name: str, task: str) -> dict[str, Any]:
        out = self.root / f"ours-{name}-{task}"
        given = ("--model", self.model, "--out", out, "--batch-size", BATCH, "--device", "cpu", "--tasks", task)
        run("eval", *given, "--dataset-root", self.root / name)
        (file,) = out.glob("*.json")
        return dict(json.loads(file.read_text())["metrics"])

    def theirs(self, name: str, task: str, *options: object) -> dict[str, Any]:
        given = ("eval", "--dataset", f"wds/{name}", "--dataset_root", self.root / name, "--task", task, "--no_amp")
        model = ("--model", self.model, "--pretrained", "", "--num_workers", 0, "--batch_size", BATCH)
        output = self.root / f"theirs-{name}-{task}.json"
        clip_benchmark(COMMAND_LINE, *given, *model, "--output", output, *options, cwd=self.root)
        return dict(json.loads(output.read_text())["metrics"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    root = tmp_path_factory.mktemp("parity")
    write_colours(root / "colours")
    write_set(root / "objects")
    write_retrieval_set(root / "captions", CAPTIONS)
    return Sets(f"local-dir:{save_model(root / 'model', seed=5)}", root)


def test_zero_shot_is_equal_to_the_last_digit(sets: Sets) -> None:
    ours, theirs = sets.ours("colours", "zero_shot"), sets.theirs("colours", "zeroshot_classification")
    print(ours, theirs, sep="\n")
    assert ours == theirs
    assert 0 < ours["acc1"] < ours["acc5"] < 1 and ours["mean_per_class_recall"] != ours["acc1"]


def test_the_mean_average_precision_is_equal_for_the_classes_that_occur(sets: Sets) -> None:
    """CLIP_benchmark counts the class that does not occur as 0, and computes in fp32."""
    ours, theirs = sets.ours("objects", "zero_shot"), sets.theirs("objects", "zeroshot_classification")
    print(ours, theirs, sep="\n")
    of_classes_that_occur = theirs["mean_average_precision"] * len(OBJECTS) / (len(OBJECTS) - 1)
    assert ours["mean_average_precision"] == pytest.approx(of_classes_that_occur, abs=1e-6)


def test_retrieval_recalls_are_equal(sets: Sets) -> None:
    ours = sets.ours("captions", "retrieval")
    theirs = sets.theirs("captions", "zeroshot_retrieval", "--recall_k", 1, 5, 10)
    print(ours, theirs, sep="\n")
    assert {name: np.float32(value) for name, value in ours.items()} == theirs  # it averages in fp32
    assert len(set(ours.values())) > 3


def test_the_linear_probe_is_within_its_tolerance(sets: Sets) -> None:
    """CLIP_benchmark draws an order of the train images, which depends on how the model was built."""
    ours = sets.ours("colours", "linear_probe_adamw")
    splits = ("--train_split", "fit", "--val_split", "held", "--feature_root", sets.root / "features")
    theirs = sets.theirs("colours", "linear_probe", *splits)
    lbfgs = sets.ours("colours", "linear_probe")
    print(ours, theirs, lbfgs, sep="\n")
    names = ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall")
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[name] for name in names}, abs=PROBE_TOLERANCE
    )
    assert {name: ours[name] for name in ("epochs", "seed", "fewshot_k", "normalized")}.items() <= theirs.items()
    assert ours["lp_acc1"] > 0.5  # of the largest class: about 0.2


def features(count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    centre_CD = torch.randn(COLOURS, 24, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    label_N = (torch.rand(count, generator=generator) ** 1.5 * COLOURS).long()
    return F.normalize(centre_CD[label_N] + noise * torch.randn(count, 24, generator=generator), dim=1), label_N


@pytest.mark.parametrize("noise", [1.0, 2.0, 4.0])
def test_the_linear_probe_of_equal_features_in_equal_order_is_equal(tmp_path: Path, noise: float) -> None:
    (train_ND, train_N), (test_ND, test_N) = features(500, 1, noise), features(300, 2, noise)
    fit_rows, held_rows = held_out_rows(train_N)
    splits = {
        "train": (train_ND[fit_rows], train_N[fit_rows]),
        "val": (train_ND[held_rows], train_N[held_rows]),
        "test": (test_ND, test_N),
    }
    for name, (feature_ND, label_N) in splits.items():
        torch.save(feature_ND, tmp_path / f"features_{name}.pt")
        torch.save(label_N, tmp_path / f"targets_{name}.pt")
    clip_benchmark(PROBE, tmp_path, tmp_path / "result.json", cwd=tmp_path)
    theirs = json.loads((tmp_path / "result.json").read_text())
    fitted = adamw(train_ND, train_N, test_ND, COLOURS, no_progress)
    metrics = {f"lp_{name}": value for name, value in scored(fitted.score_NC, test_N).items()}
    print(metrics | fitted.settings, theirs, sep="\n")
    assert metrics | fitted.settings == theirs
