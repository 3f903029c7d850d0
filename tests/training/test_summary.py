"""The closing summary shows the last evaluation and no loss that is not a number; utilization follows the clock."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy

from megacid.config.load import load_run
from megacid.distributed.parallel import Parallel
from megacid.training import metrics as metrics_module
from megacid.training.metrics import Metrics


def test_summary_has_the_last_evaluation_and_utilization_is_a_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(toy.run_file(tmp_path, "end", run__trackers=["tensorboard"]), world=1)
    run.directory.mkdir(parents=True)
    now = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    metrics = Metrics(run, Parallel(0, 2, 0, torch.device("cpu"), None), 0, flops=40e12)
    written: dict[int, dict[str, Any]] = {}
    scalars = metrics._trackers.scalars  # type: ignore[union-attr]

    def both(values: dict[str, float], step: int) -> None:
        written[step] = values
        scalars(values, step)

    metrics._trackers.scalars = both  # type: ignore[union-attr, method-assign]
    now[0] += 2.0
    rates = {"train/lr": 1e-3, "train/grad_norm": 1.0}
    metrics.log(0, torch.tensor(1.5), {}, rates)
    assert written[1]["train/tflops_per_gpu"] == pytest.approx(10.0) and "train/mfu" not in written[1]
    metrics._peak_tflops = 50.0  # of a known GPU
    now[0] += 4.0
    metrics.log(1, torch.tensor(math.nan), {}, rates)
    assert written[2]["train/mfu"] == pytest.approx(0.1)
    metrics.write({"eval/digits/acc1": 0.25, "other": 1.0}, 0)
    metrics.write({"eval/digits/acc1": 0.5}, 1)
    with caplog.at_level("INFO", logger="megacid"):
        metrics.close_bar()
        metrics.summarize(steps=3, skipped=1)
    assert "last logged loss none, last evaluation at step 2: eval/digits/acc1 0.5000" in caplog.text
    assert "1 steps skipped" in caplog.text
    text = (run.directory / "train_summary.json").read_text()
    summary = SimpleNamespace(**json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))
    assert summary.last_loss is None and summary.last_evaluation == {"step": 2, "eval/digits/acc1": 0.5}
    assert summary.samples_per_second == pytest.approx(3 * 8 / 6.0)  # the third step was not logged
    assert summary.seconds == 6.0 and summary.checkpoint is None
