"""Every run file in configs/ loads, and starts as a dry run with small data in place of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import toy
from train_run import Pipeline, run_train

from megacid.config.load import load_run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(file.stem for file in (ROOT / "configs").glob("*.json"))
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ASSUMED = [name for name in RECIPES if not name.startswith(("digits", "partial_fc"))]


def small(name: str, data: Pipeline) -> list[str]:
    """The changes that make a recipe fit the small data; everything else is as in the file."""
    run = load_run(ROOT / "configs" / f"{name}.json", world=1)
    found = run.megacid.data
    changes: dict[str, Any] = {
        "run.dir": data.root / "recipes", "train_batch_size": 8, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if found.features is not None:
        return [f"{key}={value}" for key, value in (changes | {"data.features": data.root / "features"}).items()]
    paths = {"shards": data.shards, "teacher": data.teacher, "labels": data.labels}
    changes |= {f"data.{key}": value for key, value in paths.items() if getattr(found, key) is not None}
    changes |= {"data.keep": "null", "data.workers": 0, "student.model": "digits-student"}
    if found.labels_per_sample > 1:
        changes["data.labels_per_sample"] = 2
    if run.megacid.student.embed_dim is not None:
        changes["student.embed_dim"] = 32  # that of the clusters
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.fixture(scope="module")
def data(pipeline: Pipeline) -> Pipeline:
    """The shared pipeline with two labels per sample, and feature vectors."""
    from offline_data import run as run_tool_inside

    toy.write_features(pipeline.root / "features")
    labels = pipeline.root / "two-labels"
    run_tool_inside(
        "cluster", "--embeddings", pipeline.teacher, "--out", labels, "--k", 13, "--iterations", 2, "--top-labels", 2
    )
    return Pipeline(pipeline.root, pipeline.shards, pipeline.teacher, labels)


# Distillation, ZeRO 3, several labels with a frozen tower, and features; the others with -m slow.
OFTEN = ("vit_b32_laion225m_8gpu", "vit_l14_zero3", "mlcd_multilabel", "partial_fc_1m")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_starts(data: Pipeline, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [word for change in small(name, data) for word in ("--set", change)]
    run_train(1, ROOT / "configs" / f"{name}.json", "--dry-run", *sets)
    assert "loss of the first micro-batch: " in capfd.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_itself_and_stands_on_the_page(name: str) -> None:
    run = load_run(ROOT / "configs" / f"{name}.json", world=1)
    assert run.megacid.run.name == name and f"`{name}`" in PAGE


@pytest.mark.parametrize("name", ASSUMED)
def test_every_value_that_no_paper_gives_is_marked(name: str) -> None:
    """Either the file says that everything is assumed, or each line that decides a result has the mark."""
    text = (ROOT / "configs" / f"{name}.json").read_text()
    head, body = text.split("train_batch_size", 1)
    if "everything" in head or "only difference. [assumed]" in head:
        return
    lines = ("train_batch_size" + body).splitlines()
    for key in ("train_batch_size", "gradient_clipping", "bf16", "optimizer", "schedule"):
        (line,) = [line for line in lines if re.match(rf"\s*{key}: ", line)]
        assert "[assumed]" in line, line
    steps = next(i for i, line in enumerate(lines) if "total_steps" in line)
    assert "[assumed]" in lines[steps - 1]
