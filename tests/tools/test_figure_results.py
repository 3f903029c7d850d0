"""tools/figures.py results and curves: the numbers that reach the figures, and files that are no results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_data import run
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("matplotlib")

from figure_kinds import results as tool
from figure_kinds.curves import TAGS, choose_tags, curves_figure, read_curves
from figure_kinds.labels import Source, check_distinct, source
from megacid.errors import UserError
from megacid.evaluate.tasks import write_result
from megacid.offline.figure_style import add_legend, figure_style, new_figure

SETS = {"voc2007_multilabel": 0.8, "vtab/pets": 0.7, "food101": 0.9, "own": 0.5}


def write(
    folder: Path, weights: str = "new", values: dict[str, float] = SETS, task: str = "linear_probe", **metrics: float
) -> Path:
    """Results of one model, as tools/eval.py writes them."""
    for dataset, value in values.items():
        name = "lp_mean_average_precision" if "voc" in dataset else "lp_acc1"
        found = {"dataset": dataset, "model": "ViT-B-32", "pretrained": weights, "task": task, "language": "en"}
        file = folder / f"{dataset.replace('/', '_')}_{weights}_{task}.json"
        write_result(file, {**found, "metrics": {name: value, "test_samples": 7, **metrics}})
    return folder


def table(*folders: Path, datasets: list[str] | None = None) -> tool.Table:
    found = tool.read_results([Source(None, str(folder)) for folder in folders], "linear_probe")
    return tool.tabulate(found, tool.METRICS["linear_probe"], datasets)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tool.Table:
    old = {name: value - 0.1 for name, value in SETS.items()}
    write(tmp_path / "new", task="knn", knn_acc1=0.1)  # another task in the same directory
    return table(write(tmp_path / "new"), write(tmp_path / "old", "old", old))


def test_bars_and_radar_have_the_values_of_the_results_in_the_order_of_the_suite(two: tool.Table) -> None:
    assert two.models == ["ViT-B-32, new", "ViT-B-32, old"]
    assert two.datasets == ["food101", "voc2007_multilabel", "vtab/pets", "own"]
    assert two.names == ["food101", "voc2007_multilabel\n(mAP)", "pets", "own"]
    with figure_style():
        bars, radar = tool.bars_figure(two, "top-1").axes[0], tool.radar_figure(two, "top-1").axes[0]
    widths = [patch.get_width() for patch in bars.patches]
    mean = (90 + 70 + 50) / 3  # without the mean average precision
    assert widths == pytest.approx([90, 80, 70, 50, mean, 80, 70, 60, 40, mean - 10])
    assert [label.get_text() for label in bars.get_yticklabels()] == [*two.names, "mean of 3"]
    assert {text.get_text() for text in bars.texts} >= {"90.0", "40.0", f"{mean:.1f}"}
    lines = [np.asarray(line.get_ydata()) for line in radar.lines]
    np.testing.assert_allclose(lines, [[90, 80, 70, 50, 90], [80, 70, 60, 40, 80]])
    low, high = radar.get_ylim()
    assert low < 40 and high > 90
    colours = [line.get_color() for line in radar.lines]
    assert colours[0] != colours[1]


def test_datasets_chooses_and_orders_the_sets(two: tool.Table, tmp_path: Path) -> None:
    chosen = table(tmp_path / "new", tmp_path / "old", datasets=["own", "food101"])
    np.testing.assert_allclose(chosen.percent, [[50, 90], [40, 80]])
    with pytest.raises(UserError, match=r"--datasets has 'food', .* did you mean \"food101\"\?"):
        table(tmp_path / "new", datasets=["food"])


def test_a_model_without_a_set_of_the_others_is_an_error_that_names_it(two: tool.Table, tmp_path: Path) -> None:
    (tmp_path / "old" / "vtab_pets_old_linear_probe.json").unlink()
    with pytest.raises(UserError, match=r"ViT-B-32, old has no result on vtab/pets, .* --datasets food101 voc2007"):
        table(tmp_path / "new", tmp_path / "old")
    only = write(tmp_path / "other", "other", {"cars": 0.5})
    with pytest.raises(
        UserError, match=r"evaluate it with tools/eval\.py, since no data set has results of all models$"
    ):
        table(tmp_path / "new", only)


def test_two_results_of_a_model_that_differ_are_an_error_and_equal_ones_are_not(tmp_path: Path) -> None:
    assert len(table(write(tmp_path / "a"), write(tmp_path / "b")).models) == 1
    with pytest.raises(UserError, match=r"different results of ViT-B-32, new on food101"):
        table(tmp_path / "a", write(tmp_path / "c", values={"food101": 0.4}))


def test_results_of_clip_benchmark_have_our_names_of_sets_tasks_and_models(tmp_path: Path) -> None:
    export = f"local-dir:{tmp_path / 'student'}"
    metrics = {"lp_acc1": 0.6, "weight_decay": 0.1, "epochs": 10}
    names = {
        "theirs": {"dataset": "wds/vtab/pets", "model": export, "pretrained": "", "task": "linear_probe"},
        "ours": {"dataset": "vtab/pets", "model": "student", "pretrained": export, "task": "linear_probe_adamw"},
        "l-bfgs": {"dataset": "vtab/pets", "model": "student", "pretrained": export, "task": "linear_probe"},
    }
    for name, of_result in names.items():
        own = {"lp_acc1": 0.8, "C": 1.0} if name == "l-bfgs" else metrics
        write_result(tmp_path / "all" / f"{name}.json", {**of_result, "metrics": own, "language": "en"})
    sources = [Source(None, str(tmp_path / "all"))]
    by_adamw = tool.read_results(sources, "linear_probe_adamw")
    assert by_adamw == {"student": {"vtab/pets": metrics}}
    assert tool.tabulate(by_adamw, tool.METRICS["linear_probe_adamw"]).percent.tolist() == [[60.0]]
    assert tool.read_results(sources, "linear_probe") == {"student": {"vtab/pets": {"lp_acc1": 0.8, "C": 1.0}}}
    with pytest.raises(UserError, match="no result of linear_probe, only of linear_probe_adamw"):
        tool.read_results([Source(None, str(tmp_path / "all" / "theirs.json"))], "linear_probe")


@pytest.mark.parametrize("sets", [["food101", "cars"], ["food101", "food101"]])
def test_exports_whose_folders_have_one_name_are_two_models(tmp_path: Path, sets: list[str]) -> None:
    found = {"model": "student", "task": "linear_probe", "metrics": {"lp_acc1": 0.5}}
    files = [str(tmp_path / f"{name}.json") for name in ("a", "b")]
    for name, dataset, file in zip(("a", "b"), sets, files):
        write_result(
            Path(file), {"dataset": dataset, "pretrained": f"local-dir:{tmp_path / name / 'student'}", **found}
        )
    message = r"'student' has results of 2 models \(\S+/a/student; \S+/b/student\).*LABEL=PATH"
    with pytest.raises(UserError, match=message):
        tool.read_results([Source(None, file) for file in files], "linear_probe")
    assert list(tool.read_results([Source(file, file) for file in files], "linear_probe")) == files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is missing or no JSON object"),
        ("{", "is missing or no JSON object"),
        ('{"digest": "d", "arm": "plain", "metrics": {}}', "has no valid 'dataset'"),
        ('{"dataset": "a", "model": "m", "pretrained": "p", "task": "t", "metrics": 1}', "has no valid 'metrics'"),
    ],
)  # fmt: skip
def test_a_file_of_another_schema_is_named(tmp_path: Path, content: str, message: str) -> None:
    (write(tmp_path / "new") / "z.json").write_text(content)
    with pytest.raises(UserError, match=rf"z\.json {message}, expected a result of tools/eval.py"):
        table(tmp_path / "new")


def test_empty_directories_other_tasks_and_missing_metrics_are_errors(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none has no result of linear_probe: run tools/eval.py"):
        table(tmp_path / "none")
    with pytest.raises(UserError, match="no result of linear_probe, only of knn"):
        table(write(tmp_path / "knn", task="knn"))
    found = tool.read_results([Source(None, str(write(tmp_path / "new")))], "linear_probe")
    with pytest.raises(UserError, match=r"a result on food101 has no acc7, .* such as one of lp_acc1"):
        tool.tabulate(found, ["acc7"])
    with pytest.raises(UserError, match=r"test_samples of ViT-B-32, new on food101 is 7, expected a share from 0 to 1"):
        tool.tabulate(found, ["test_samples"])


def test_a_label_names_one_model(tmp_path: Path) -> None:
    write(tmp_path / "all", "old"), write(tmp_path / "all")
    with pytest.raises(UserError, match=r"the label 'ours' has results of 2 models \(.*new; .*old\)"):
        tool.read_results([Source("ours", str(tmp_path / "all"))], "linear_probe")
    files = [tmp_path / "all" / f"{name}_linear_probe.json" for name in ("own_new", "food101_old")]
    with pytest.raises(UserError, match=r"the label 'ours' has results of 2 models"):
        tool.read_results([Source("ours", str(file)) for file in files], "linear_probe")
    file = tmp_path / "all" / "own_new_linear_probe.json"
    assert list(tool.read_results([source(f"ours={file}")], "linear_probe")) == ["ours"]
    with_sign = tmp_path / "lr=1"
    with_sign.mkdir()
    assert source(str(with_sign)) == Source(None, str(with_sign))
    with pytest.raises(UserError, match="two of the sources are called 'a'"):
        check_distinct(["a", "b", "a"])


def test_the_command_writes_equal_files_and_no_radar_of_two_sets(two: tool.Table, tmp_path: Path) -> None:
    for out in ("first", "again"):
        words = (f"old={tmp_path / 'old'}", f"new={tmp_path / 'new'}", "--datasets", "own", "food101")
        output = run("figures", "results", *words, "--out", tmp_path / out)
        printed = [line for line in output.splitlines() if line.startswith(str(tmp_path))]
        assert [Path(path).name for path in printed] == [f"fig1b_bars.{ending}" for ending in ("png", "svg", "pdf")]
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    svg = (tmp_path / "first" / "fig1b_bars.svg").read_text()
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", svg)
    output = run("figures", "results", tmp_path / "nothing", "--out", tmp_path / "third", expect=2)
    assert "nothing is missing or no JSON object" in output and not (tmp_path / "third").exists()


def test_long_names_fit_into_the_legend() -> None:
    with figure_style():
        figure, axes = new_figure(5, 2)
        lines = {f"an architecture, the {'long ' * 4}name of run {n}": axes[0, 0].plot([n])[0] for n in range(5)}
        add_legend(figure, lines, "lower")
        figure.draw_without_rendering()
        box, plot = figure.legends[0].get_window_extent(), axes[0, 0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 < plot.y0 and plot.height > 0.5 * 2 * figure.dpi


# ---- curves ----------------------------------------------------------------------------------------------------------


def write_run(run: Path, **tags: Any) -> Path:
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for tag, values in tags.items():
            for step, value in enumerate(values, 1):
                writer.add_scalar(tag.replace("__", "/"), value, 10 * step)
    return run


def test_curves_are_those_of_the_runs_and_a_missing_scalar_has_no_line(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", train__grad_norm=[3.0, 1.0, 2.0], train__instance=[5.0, 4.0], other=[1.0])
    runs = {"first": read_curves(first), "second": read_curves(write_run(tmp_path / "b", train__grad_norm=[0.5] * 3))}
    titles = choose_tags(runs, None)
    assert (
        list(titles) == ["train/instance", "train/grad_norm"] and titles["train/grad_norm"] == TAGS["train/grad_norm"]
    )
    with figure_style():
        figure = curves_figure(runs, titles)
    instance, norm = figure.axes
    assert [line.get_ydata().tolist() for line in norm.lines] == [[3, 1, 2], [0.5, 0.5, 0.5]]
    assert [line.get_xdata().tolist() for line in instance.lines] == [[10, 20]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["first", "second"]
    assert list(choose_tags(runs, ["other"])) == ["other"]


def test_runs_without_scalars_and_unknown_tags_are_errors(tmp_path: Path) -> None:
    runs = {"a": read_curves(write_run(tmp_path / "a", other=[1.0]))}
    with pytest.raises(UserError, match=r"--tags has 'othr', which no run has: did you mean \"other\"\?"):
        choose_tags(runs, ["othr"])
    with pytest.raises(UserError, match="pass --tags, some of other"):
        choose_tags(runs, None)
    with pytest.raises(UserError, match="tensorboard has no scalars"):
        read_curves(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    output = run("figures", "curves", tmp_path / "a", tmp_path / "a", "--out", tmp_path / "out", expect=2)
    assert "two of the sources are called 'a'" in output
