"""The notebook of the demo's result runs on the files that tools/demo.sh leaves, and its tables say what they say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import summary
from megacid.evaluate.tasks import json_file, write_result
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.report import decision_report, planted_reports
from megacid.storage.atomic import write_json_atomic

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "demo_result.ipynb"
TAGS = ("train/contrastive", "train/instance", "train/cluster/student_ce", "classifier/target_cosine")
ACCURACIES = dict(zip(summary.RUNS, (0.98, 0.96, 0.94, 0.95, 0.93)))


def write_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo's output, by the functions that write it, without the training."""
    from torch.utils.tensorboard import SummaryWriter

    for name, accuracy in ACCURACIES.items():
        run = demo / name
        (run / "eval").mkdir(parents=True)
        trained = {"seconds": 40.0, "samples_per_second": 600.0, "steps": 200, "world": 2}
        write_json_atomic(run / "train_summary.json", trained)
        config = {"megacid": {"run": {"seed": 0}}, "zero_optimization": {"stage": 1}}
        write_json_atomic(run / "config.json", {"resolved": config})
        for task, metrics in (
            ("zeroshot_classification", {"acc1": accuracy}),
            ("linear_probe", {"lp_acc1": accuracy, "test_samples": 359}),
        ):
            write_result(json_file(run / "eval", "digits", "export", task), {"task": task, "metrics": metrics})
        with SummaryWriter(str(run / "tensorboard")) as writer:
            for tag in (TAGS[0],) if name in ("teacher", "student_plain") else TAGS[1:]:
                for step in (20, 40):
                    writer.add_scalar(tag, 1 / step, step)
    keep, representative = np.array([True, False, True, True]), np.array([0, 0, 2, 3])
    decision = Decision(keep, representative, 0.25, [(0.0, 1.0), (0.25, 0.75), (2.0, 0.25)], 4, representative)
    label = np.array([0, 0, 1, 1])
    report = decision_report(decision, label, 2, 0.75) | planted_reports(np.array([0, 0, 1, 2]), decision, label)
    (demo / "balance").mkdir()
    write_json_atomic(demo / "balance" / "report.json", report)
    (demo / "figures").mkdir()
    for name in ("fig2a_perceptual", "fig2d_clusters"):
        Image.effect_noise((80, 20), 60).save(demo / "figures" / f"{name}.png")
    (demo / "times.tsv").write_text("data\t5\nteacher\t87\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["summary.py", "--demo", str(demo)])
        assert summary.main() == 0


def outputs(cell: Any) -> list[dict[str, Any]]:
    return [output["data"] for output in cell.get("outputs", ()) if "data" in output]


def test_notebook_shows_tables_and_curves_of_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "runs" / "demo", monkeypatch)
    folder = shutil.copytree(NOTEBOOK.parent, tmp_path / "examples")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    shown = {cell["id"]: outputs(cell) for cell in notebook.cells}
    (table,) = (data["text/markdown"] for data in shown["table"])
    for accuracy in ACCURACIES.values():
        assert table.count(f"| {100 * accuracy:.1f} % (") == 2
    assert "| teacher | 98.0 % (96.0 to 99.0) |" in table  # Wilson's interval of 359 images
    (balance,) = (data["text/markdown"] for data in shown["balance-plot"] if "text/markdown" in data)
    assert "3 of 4 samples are kept." in balance and "| removal recall | 1 |" in balance
    pictures = {name: sum("image/png" in data for data in found) for name, found in shown.items()}
    expected = {"accuracy-plot": 1, "curves": 1, "balance-plot": 1, "figures": 2, "time-plot": 1}
    assert {name: number for name, number in pictures.items() if number} == expected


def test_notebook_without_a_demo_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (setup,) = (cell["source"] for cell in notebook.cells if cell["id"] == "setup")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"summary\.json is missing: run bash tools/demo\.sh"):
        exec(setup, {})


def test_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_notebook_names_metrics_that_the_trainer_writes() -> None:
    page = (ROOT / "docs" / "how-to" / "metrics.md").read_text()
    source = "".join(cell["source"] for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    tags = re.findall(r'"((?:train|classifier)/[\w/]+)"', source)
    assert set(TAGS) < set(tags)
    assert not [tag for tag in tags if f"`{tag}`" not in page]
