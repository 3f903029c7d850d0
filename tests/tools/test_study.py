"""tools/study.py: what a study file asks for, what is done again, the report, bad input; with -m slow all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_data import run as run_tool_inside
from PIL import Image
from train_run import Pipeline

import launching
import study as tool
from megacid.data.index import load_index
from megacid.data.side_tables import KeepTable
from megacid.errors import UserError
from sample_tars import write_retrieval
from study_file import load_study
from study_plan import Plan
from study_report import KEPT, REMOVED, Finished, best_rate, interval, load_results, next_rate, report
from synthesize import encode

ROOT = Path(__file__).resolve().parents[2]
ICONS = ROOT / "configs" / "study" / "icons.json"
CORE = ["plain", "mse", "affinity", "instance", "cluster", "instance-cluster"]


def icons_plan(out: Path = Path("out"), path: Path = ICONS) -> Plan:
    return Plan(load_study(path), out, Path("data/icons"), "digest of the corpus")


# ---- the planner -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # run files of a study are relative


def test_every_arm_of_the_icon_study_is_a_valid_run_file_and_differs_from_the_others() -> None:
    plan = icons_plan()
    arms = plan.file.chosen([])
    digests = {arm: plan.run(arm, plan.rates(arm)[0], 0).digest for arm in arms}
    assert len(set(digests.values())) == len(arms) > 30
    assert plan.file.chosen(["core"]) == CORE
    assert plan.file.chosen(["core", "plain"]) == CORE, "an arm is trained once"
    assert plan.run("mse", 1e-3, 0).settings["megacid.loss.mse"] == 2.0
    method = plan.run("instance-cluster", 2e-3, 5)
    assert "megacid.loss.contrastive" not in method.settings and method.settings["megacid.loss.instance"] == 1.0
    assert method.settings["megacid.classifier.sample_rate"] == 0.25, "from the arm that it is like"
    assert method.name == "instance-cluster-lr-0.002-seed-5"


def test_the_arms_that_one_is_compared_with_are_trained_too() -> None:
    assert icons_plan().file.chosen(["balanced-20"]) == ["balanced-20", "instance-cluster", "random-20"]


def test_stages_come_after_what_they_need_and_once() -> None:
    plan = icons_plan()
    assert [stage.name for stage in plan.stages(["plain"])] == ["teacher"]
    assert [stage.name for stage in plan.stages(CORE)] == ["teacher", "embeddings", "clusters/k4096"]
    before = [stage.name for stage in plan.stages(["balanced-before", "random-43.7"])]
    assert before == [
        "teacher", "embeddings", "subsets/balanced-before",
        "clusters/k4096-of-balanced-before", "clusters/k4096", "subsets/balanced-43.7", "subsets/random-43.7",
    ]  # fmt: skip
    changes = plan.run("balanced-before", 1e-3, 0).changes
    assert 'data.keep="out/subsets/balanced-before"' in changes, "clusters of a subset train on that subset"
    assert 'data.labels="out/clusters/k4096-of-balanced-before"' in changes
    names = [stage.name for stage in plan.stages(plan.file.chosen([]))]
    assert len(names) == len(set(names))


def test_a_digest_depends_on_settings_and_earlier_stages_and_not_on_paths(tmp_path: Path) -> None:
    one = icons_plan().run("instance-cluster", 2e-3, 0)
    assert icons_plan(tmp_path).run("instance-cluster", 2e-3, 0).digest == one.digest
    assert icons_plan().run("instance-cluster", 2e-3, 1).digest != one.digest
    text = ICONS.read_text().replace("k4096: {k: 4096,", "k4096: {k: 2048,")
    (tmp_path / "other.json").write_text(text)
    other = icons_plan(path=tmp_path / "other.json")
    assert other.run("instance-cluster", 2e-3, 0).digest != one.digest
    assert other.run("instance", 2e-3, 0).digest == icons_plan().run("instance", 2e-3, 0).digest


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = ICONS.read_text()
    assert text.count(old) == 1, old
    (tmp_path / "study.json").write_text(text.replace(old, new))
    return tmp_path / "study.json"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mse: {teacher: true, set', 'mse: {techer: true, set', 'unknown key "techer": did you mean "teacher"'),
        ('like: "instance", rates', 'like: "instanse", rates', "contrastive-instance.like is 'instanse'"),
        ('base: "plain"', 'base: "plane"', 'base is \'plane\', which'),
        ('base: "plain"', "", 'has no "base", expected it'),
        ('seeds: [0, 1, 2]', "seeds: []", "seeds"),
        ('rates: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]', "rates: [0.0]", "rates"),
        ('"loss.mse=2.0"', '"loss.mse=2.0", "run.seed=3"', "the study sets run.seed itself"),
        ('"loss.mse=2.0"', '"loss.mes=2.0"', 'arm mse: unknown key "megacid.loss.mes": did you mean "mse"'),
        ('balanced-20: {share: 0.8, clusters: "k4096"}', "balanced-20: {share: 0.8}", "has only a share, expected"),
        ('random-20: {random_as', 'random-20: {cells: 4, random_as', "random-20 has cells, expected none"),
        ('random_as: "balanced-20"', 'random_as: "random-60"', "expected a subset with a share"),
        ('of: "balanced-before"', 'of: "random-60"', "clusters.k4096-of-balanced-before.of is 'random-60', expected a"),
        ('cells: 256', 'cells: 0', "subsets.balanced-before.cells"),
        ('cells: 256', 'cells: 256, clusters: "k256"', "subsets.balanced-before has clusters and cells, expected one"),
        ('cells: 256', 'cells: 256, one_of: "family"', "subsets.balanced-before has cells and one_of, expected one"),
        ('cells: 256', 'cells: 256, link: "chains"', "subsets.balanced-before.link"),
        ('k256: {k: 256}', "k256: {k: 0}", "clusters.k256.k"),
        ('k256: {k: 256}', "k256: 256", "clusters.k256 is 256, expected a block"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_study_file_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        icons_plan(path=edited(tmp_path, old, new)).run("mse", 1e-3, 0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_arms_a_missing_corpus_and_no_results_are_one_line(tmp_path: Path) -> None:
    words = ("study", ICONS, "--out", tmp_path / "out")
    assert "--arms has 'cor', which" in run_tool_inside(*words, "--arms", "cor", expect=2)
    missing = run_tool_inside(*words, "--corpus", tmp_path, expect=2)
    assert f"{tmp_path} has no folder train, expected the output of tools/prepare_icons.py" in missing
    assert "has no results" in run_tool_inside(*words, "--report", expect=2)
    assert not (tmp_path / "out").exists()


# ---- what is done again ----------------------------------------------------------------------------------------------

SMALL_ARMS = """
    core: {
      plain: {set: ["student.embed_dim=64"]}
      mse: {teacher: true, set: ["loss.mse=1.0"]}
    }
    method: {
      cluster: {
        teacher: true, clusters: "k5", rates: [1e-3]
        set: ["loss.cluster=0.1", "loss.beta=1.0", "classifier.sample_rate=0.5"]
      }
      random: {like: "cluster", subset: "random", against: ["balanced"]}
      balanced: {like: "cluster", subset: "balanced"}
      before: {like: "cluster", clusters: "k3", against: ["balanced"]}
    }
"""


def small_study(root: Path, steps: int = 4) -> Path:
    """A study file with its run files; the corpus is `root`."""
    for name in ("teacher", "student"):
        block = {
            "run": {"name": name, "total_steps": steps, "save_every": 2, "log_every": 2},
            "student": {"model": "digits-student"}, "data": {"shards": "data"}, "loss": {"contrastive": 1.0},
        }  # fmt: skip
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
        tree = {"train_batch_size": 16, "gradient_clipping": 1.0, "optimizer": optimizer, "megacid": block}
        (root / f"{name}.json").write_text(json.dumps(tree))
    (root / "study.json").write_text(
        f"""{{
        corpus: "{root}", teacher: "{root}/teacher.json", student: "{root}/student.json"
        ranks: 1, seeds: [3, 4], rates: [1e-3, 2e-3], base: "plain"
        validation: ["classes"], test: ["retrieval"]
        clusters: {{k5: {{k: 5}}, k3: {{k: 3, of: "first"}}}}
        subsets: {{
          balanced: {{share: 0.5, clusters: "k5"}}, random: {{random_as: "balanced"}}
          first: {{share: 0.5, cells: 4, keep: "medoid"}}
        }}
        arms: {{{SMALL_ARMS}}}
        }}"""
    )
    return root / "study.json"


@pytest.fixture
def corpus(pipeline: Pipeline, tmp_path: Path) -> Path:
    """The scenes of the shared pipeline with a classification and a retrieval set."""
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "train").symlink_to(pipeline.shards)
    (root / "classes").symlink_to(pipeline.shards.parent / "test")
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    write_retrieval(
        root / "retrieval", [(encode(Image.fromarray(p), "png"), f"caption {n}") for n, p in enumerate(pictures)]
    )
    return root


class Processes:
    """Takes the place of the processes that a study starts: notes them, and writes the scores of the evaluation."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self.score, self.started, self.fail_at = score, list[str](), ""

    def __call__(self, words: Sequence[str], log: Path, what: str, environment: dict[str, str]) -> None:
        self.started.append(log.stem)
        if log.stem == self.fail_at:
            raise KeyboardInterrupt
        arguments = dict(pairwise(words))
        if "eval.py" in words[1]:
            out, run = Path(arguments["--out"]), Path(arguments["--run"]).name
            out.mkdir(parents=True, exist_ok=True)
            name = Path(arguments["--dataset-root"]).name
            result = {"dataset": name, "metrics": {"acc1": self.score(run), "count": 3}}
            (out / f"{name}.json").write_text(json.dumps(result))


def scored(run: str) -> float:
    rate, seed = (float(run.split(f"-{key}-")[1].split("-")[0]) if f"-{key}-" in run else 0 for key in ("lr", "seed"))
    return 0.1 + 100 * rate * (1 if run.startswith("mse") else -1) + seed / 100


def test_rates_are_chosen_on_validation_and_what_is_finished_is_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(scored)
    monkeypatch.setattr(launching, "run_logged", processes)  # run_tool_inside imports the tool anew
    out = tmp_path / "out"
    words = ("study", small_study(corpus), "--out", out, "--arms", "core")
    processes.fail_at = "mse-lr-0.001-seed-3"
    run_tool_inside(*words, expect=130)
    processes.fail_at = ""
    before, processes.started = processes.started, []
    assert before == [
        "teacher", "export", "embeddings", "teacher-classes",
        "plain-lr-0.001-seed-3", "plain-lr-0.001-seed-3-classes", "plain-lr-0.002-seed-3",
        "plain-lr-0.002-seed-3-classes", "plain-lr-0.001-seed-4", "plain-lr-0.001-seed-4-classes",
        "mse-lr-0.001-seed-3",
    ]  # fmt: skip
    output = run_tool_inside(*words)
    assert [name for name in processes.started if not name.endswith("-classes")] == [
        "mse-lr-0.001-seed-3", "mse-lr-0.002-seed-3", "mse-lr-0.002-seed-4",
    ], "the best rate is another one for each arm"  # fmt: skip
    assert "| `mse` | 0.002 | 0.001, 0.002 | 2 | 33.50 ± " in output
    assert run_tool_inside(*words, "--report").strip() in output

    processes.started = []
    run_tool_inside(*words, "--test")
    chosen = ["teacher", *(f"{arm}-seed-{seed}" for arm in ("plain-lr-0.001", "mse-lr-0.002") for seed in (3, 4))]
    assert processes.started == [f"{name}-retrieval" for name in chosen], "the test sets of the chosen runs alone"
    processes.started = []
    assert "### Test sets" in run_tool_inside(*words, "--test") and not processes.started, "evaluated once"
    result = json.loads((out / "results" / "mse-lr-0.002-seed-4.json").read_text())
    assert result["metrics"] == {"validation": {"acc1": scored("mse-lr-0.002-seed-4")}, "test": {"acc1": 0.34}}
    assert result["settings"]["megacid.loss.mse"] == 1.0 and result["versions"]["torch"] and result["test_date"]

    small_study(corpus, steps=6)
    assert "has the digest" in run_tool_inside(*words, expect=2) and not processes.started


def test_metrics_of_seldom_concepts_are_told_from_those_of_others(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_study(corpus)
    path.write_text(path.read_text().replace('["classes"]', '["classes", "seldom-test"]'))
    processes = Processes(lambda run: 0.25 if processes.started[-1].endswith("seldom-test") else 0.5)
    monkeypatch.setattr(tool, "run_logged", processes)
    runner = tool.Runner(Plan(load_study(path), tmp_path, corpus, "digest"))
    assert runner.evaluate("plain", "validation") == {"acc1": 0.5, "seldom_acc1": 0.25}


def test_balance_before_clustering_copies_no_pairs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: dict[str, list[str]] = {}
    monkeypatch.setattr(launching, "run_logged", lambda words, log, *rest: commands.update({log.stem: list(words)}))
    runner = tool.Runner(Plan(load_study(small_study(corpus)), tmp_path, corpus, "digest"))
    monkeypatch.setattr(tool, "run_logged", launching.run_logged)
    for stage in runner.plan.stages(["before"]):
        runner.stage(stage)
    assert list(commands) == ["teacher", "export", "embeddings", "subsets-first", "clusters-k3"]
    balance, cluster = (" ".join(commands[name]) for name in ("subsets-first", "clusters-k3"))
    assert "--cells 4" in balance and "--keep medoid" in balance and "--clusters" not in balance
    assert f"--embeddings {tmp_path}/embeddings" in cluster and f"--keep {tmp_path}/subsets/first" in cluster
    assert not any("--reshard" in words for words in commands.values())


# ---- the report ------------------------------------------------------------------------------------------------------


def result(arm: str, seed: int, rate: float, acc1: float) -> dict[str, Any]:
    metrics = {"validation": {"acc1": acc1, "lp_acc1": acc1 / 2}}
    return {
        "digest": "d", "arm": arm, "seed": seed, "rate": rate, "metrics": metrics, "date": f"2026-01-0{seed + 1}",
        "seconds": {"training_wall": 1800.0, "training_cpu": 3600.0}, "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2.14"},
    }  # fmt: skip


def results_of_two_arms() -> list[dict[str, Any]]:
    plain, method = (0.10, 0.12, 0.17), (0.30, 0.31, 0.35)
    found = [result("plain", seed, 1e-3, value) for seed, value in enumerate(plain)]
    found += [result("instance", seed, 2e-3, value) for seed, value in enumerate(method)]
    for arm, best in (("plain", 1e-3), ("instance", 2e-3)):
        found += [result(arm, 0, rate, 0.01) for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3) if rate != best]
    return found


def test_intervals_and_paired_differences_are_those_of_students_t() -> None:
    found = interval([10.0, 12.0, 17.0])
    assert found is not None
    # mean 13; deviations -3, -1, 4: variance 26 / 2; t(0.975, 2 degrees of freedom) = 4.30265
    assert found[0] == 13.0 and found[1] == pytest.approx(4.30265 * math.sqrt(13 / 3), rel=1e-5)
    assert interval([10.0]) is None
    file = load_study(ICONS)
    differences = Finished(results_of_two_arms(), file).differences("instance", "plain", "validation", "acc1")
    assert differences == pytest.approx([20, 19, 18])
    from scipy import stats

    low, high = stats.ttest_rel([30, 31, 35], [10, 12, 17]).confidence_interval(0.95)
    paired = interval(differences)
    assert paired is not None and (paired[0] - paired[1], paired[0] + paired[1]) == pytest.approx((low, high))
    text = report(results_of_two_arms(), file, CORE)
    assert "| `plain` | 0.001 | 0.0005, 0.001, 0.002, 0.004, 0.008 | 3 | 13.00 ± 8.96 | 6.50 ± 4.48 |\n" in text
    assert "| `instance` | `plain` | 3 | +19.00 ± 2.48 | +9.50 ± 1.24 |\n" in text
    stages = "the stages of the study: 0.0 minutes, 0.0 minutes of CPU time"
    assert f"14 students: 7.0 hours, 14.0 hours of CPU time; {stages}. a CPU, 2 cores, torch 2.14" in text


def test_what_subsets_hold_and_what_balance_removed_are_tables_of_the_report() -> None:
    stage = {**result("plain", 0, 1e-3, 0.1), "stage": "subsets/balanced-43.7"}
    del stage["arm"], stage["rate"]
    kept = dict.fromkeys(KEPT, 0.25) | {"pairs": 2345}
    removed = dict.fromkeys(REMOVED, 0.125) | {"pairs": 1234, "largest_group": 5067}
    file, arms = load_study(ICONS), ["plain", "balanced-43.7"]
    text = report([*results_of_two_arms(), {**stage, "kept": kept, "removed": removed}], file, arms)
    assert "| `balanced-43.7` | 2,345 | 25.0 | 25.0 | 25.0 |" in text
    assert "| `balanced-43.7` | 1,234 | 12.5 | 12.5 | 12.5 | 12.5 | 12.5 | 5,067 |" in text
    drawn = report([*results_of_two_arms(), {**stage, "kept": kept}], file, arms)
    assert "| `balanced-43.7` | 2,345 |" in drawn and "| removed |" not in drawn
    assert "### Subsets" not in report([*results_of_two_arms(), stage], file, arms)
    assert "### Subsets" not in report([*results_of_two_arms(), {**stage, "kept": kept}], file, CORE), "of these arms"


def test_an_arm_without_all_rates_is_not_reported_and_one_seed_has_no_interval() -> None:
    file, found = load_study(ICONS), results_of_two_arms()
    assert "instance" not in report([r for r in found if (r["arm"], r["rate"]) != ("instance", 4e-3)], file, CORE)
    lower = [r for r in found if r["rate"] < 4e-3]
    assert "| `plain` | 0.001 | 0.0005, 0.001, 0.002 | 3 |" in report(lower, file, CORE)
    assert "| 10.00 (one seed) |" in report([r for r in found if not r["seed"]], file, CORE)


def test_rates_are_tried_from_the_middle_until_the_best_has_no_untried_neighbour() -> None:
    def tried(score: dict[float, float]) -> list[float]:
        results: list[dict[str, Any]] = []
        while (rate := next_rate(tuple(score), results, "acc1")) is not None:
            results.append(result("plain", 0, rate, score[rate]))
        return [found["rate"] for found in results]

    assert tried({1.0: 1, 2.0: 2, 3.0: 5, 4.0: 4, 5.0: 9}) == [3, 4, 2], "a local maximum"
    assert tried({5.0: 5, 4.0: 4, 3.0: 3, 2.0: 2, 1.0: 1}) == [3, 4, 5], "any order, up to the edge"
    assert tried({1.0: 5, 2.0: 4, 3.0: 3, 4.0: 2, 5.0: 1}) == [3, 4, 2, 1], "down to the edge"
    assert tried({1.0: 1, 2.0: 1}) == [1, 2] and tried({1.0: 1}) == [1]


def test_the_best_rate_of_equal_ones_is_the_lowest_and_an_unknown_metric_is_named() -> None:
    tried = [result("plain", 0, rate, 0.5) for rate in (4e-3, 1e-3)]
    assert best_rate(tried, "acc1") == 1e-3
    with pytest.raises(UserError, match=r'"tune_on" is .acc., expected a metric .* acc1, lp_acc1'):
        best_rate(tried, "acc")


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json has no digest"):
        load_results(tmp_path)


# ---- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_study_trains_resumes_and_reports(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("study", small_study(corpus), "--out", out, "--arms", "random", "before", "--test")
    output = run_tool_inside(*words)
    for arm in ("teacher", "random", "balanced", "before"):
        assert f"| `{arm}` |" in output
    assert "| `random` | `balanced` | 2 |" in output
    kept = {
        name: KeepTable(out / "subsets" / name, load_index(str(corpus / "train"))) for name in ("balanced", "random")
    }
    assert kept["balanced"].counts.sum() == kept["random"].counts.sum()
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run_tool_inside(*words)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files
    results = load_results(out / "results")
    assert all(entry["seconds"]["training_cpu"] > 0 for entry in results if "rate" in entry)
    assert all(
        "retrieval" not in name for entry in results if "metrics" in entry for name in entry["metrics"]["validation"]
    )
