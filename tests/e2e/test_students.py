"""Settings of the student in whole training runs: from the first start through a resume to the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy import differing
from train_run import Pipeline, run_train, tensors

from megacid.evaluate.export import student_from_run
from megacid.models.student import build_student


def said(run: Path, words: str) -> list[str]:
    return [line for line in (run / "log.txt").read_text().splitlines() if words in line]


def wide_weights(pipeline: Pipeline) -> str:
    """Weights of another width than the teacher's."""
    file = pipeline.root / "wide.pt"
    torch.save({"state_dict": build_student("digits-student", embed_dim=48, seed=9).clip.state_dict()}, file)
    return str(file)


def test_fitted_and_frozen_weights_go_through_a_resume_to_the_export(pipeline: Pipeline) -> None:
    weights = wide_weights(pipeline)
    options: dict[str, Any] = {"student__pretrained": weights, "student__projection_init": "teacher"}
    options |= {"student__freeze": ["visual.*"], "student__layer_decay": 0.8, "gradient_accumulation_steps": 2}
    options["run__total_steps"] = 3
    whole, pieces = (pipeline.run_file(name, **options) for name in ("fitted-whole", "fitted-pieces"))
    run_train(2, whole)
    run_train(2, pieces, "--stop-after", "1", expect=143)
    run_train(2, pieces)
    runs = pipeline.root / "runs"
    want, got = (tensors(runs / name / "step-00000003") for name in ("fitted-whole", "fitted-pieces"))
    assert differing(want, got) == []
    exported, first = student_from_run(runs / "fitted-pieces")[0].clip.state_dict(), torch.load(weights)["state_dict"]
    same = {
        name for name, value in exported.items() if value.shape == first[name].shape and torch.equal(value, first[name])
    }
    assert same == {name for name in first if name.startswith("visual.") and name != "visual.proj"}
    (line,) = said(runs / "fitted-pieces", "projections fitted to the teacher's embeddings of 72 samples")
    assert all(float(part.split()[-1]) > 20 for part in line.split("explain")[1].split(" %")[:2]), line
    assert len(said(runs / "fitted-pieces", "not loaded: text_projection, visual.proj")) == 2  # at each start
