"""Every key of the "megacid" block changes the settings of a run, or is refused with the reason why it cannot."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import toy
from faultplan import Fault, FaultPlan
from harness import run_ranks

import sweep
from megacid.config.conditions import Needs, ineffective
from megacid.config.load import load_run
from megacid.config.schema import SECTIONS, MegacidConfig
from megacid.errors import UserError
from megacid.training import cli
from megacid.training.run_settings import check_same_settings, write_config

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs" / "digits_cpu.json"
NO_CLUSTER = "loss.cluster=0 loss.beta=null loss.gamma=null data.labels=null classifier=null"

# What is set for nothing -> what the message says would make it count. All on configs/digits_cpu.json.
FOR_NOTHING = {
    "student.hidden=64": "without data.features",
    f"student.projection_init=teacher data.teacher=null {NO_CLUSTER} loss.instance=0 loss.contrastive=1": (
        "without a term that reads it"
    ),
    "data.worker_timeout_s=60": "without data.workers > 0",
    "data.prefetch=4": "without data.workers > 0",
    "data.cache_dir=/nvme/cache": "without a URL in data.shards, teacher, labels or keep (or sources)",
    "data.cache_gb=10 data.shards=s3://bucket/laion": "without data.cache_dir",
    "data.cache_dir=/nvme/cache data.shards=pipe:fetch://00000.tar": "without a URL in data.shards",
    "data.block_shards=8 data.shards=pipe:00000.tar": "without data.shards without pipe:, or data.features",
    "data.shuffle_buffer=8": "without pipe: in data.shards",
    "loss.cluster_temperature=2 loss.gamma=0": "without loss.gamma > 0",
    "loss.temperature=0.07 loss.instance=0 data.labels=x": "without loss.contrastive or loss.instance or loss.affinity",
    "loss.form=sigmoid loss.instance=0": "without loss.contrastive or loss.instance > 0",
    "classifier.margin_grad=straight_through": "without classifier.m1 > 1 or classifier.m2 > 0",
    "classifier.precision=fp32 classifier.impl=torch": 'without a classifier.impl other than "torch"',
    "classifier.log_q=true classifier.sample_rate=1": "without classifier.sample_rate < 1",
    "classifier.static_shapes=true classifier.sample_rate=1": "without classifier.sample_rate < 1",
    "classifier.lazy=decay classifier.sample_rate=1": "without classifier.sample_rate < 1",
    "classifier.labels_loss=mean": "without data.labels_per_sample > 1",
    "loss.affinity_temperature=0.02": "without loss.affinity > 0",
    "classifier.betas=[0.9,0.99] classifier.optimizer=sgd": 'without classifier.optimizer "adamw"',
    "classifier.eps=1e-6 classifier.optimizer=sgd": 'without classifier.optimizer "adamw"',
    "classifier.momentum=0.8": 'without classifier.optimizer "sgd"',
    "classifier.m2=0.3 loss.alpha=0 loss.gamma=0": "without loss.alpha or loss.gamma > 0",
    "schedule.final_share=0.1 schedule.kind=constant": 'without schedule.kind "cosine" or "wsd"',
    "schedule.decay_share=0.1": 'without schedule.kind "wsd"',
    "schedule.decay_shape=linear": 'without schedule.kind "wsd"',
    "guard.spike_deviations=5": 'without a guard.spike other than "off"',
    "loss.cluster=0 loss.gamma=null loss.beta=null classifier=null": "without loss.cluster > 0",
    "loss.cluster=0 loss.gamma=null loss.beta=null data.labels=null": "without loss.cluster > 0",
    f"{NO_CLUSTER} loss.alpha=2": "without loss.cluster > 0",
    f"{NO_CLUSTER} loss.instance=0 loss.contrastive=1": "without a term that reads it (loss.instance, loss.mse, loss",
}


@pytest.mark.parametrize("changes", FOR_NOTHING)
def test_a_setting_without_effect_is_refused_with_what_would_make_it_count(changes: str) -> None:
    with pytest.raises(UserError, match="which has no effect") as error:
        load_run(DIGITS, changes.split(), world=1)
    assert FOR_NOTHING[changes] in str(error.value) and "\n" not in str(error.value)
    # What the message says to pass is enough, and the run is the same without the setting.
    remedy = shlex.split(str(error.value).rpartition("or pass ")[2].replace("--set ", ""))
    load_run(DIGITS, [*changes.split(), *remedy], world=1)


def test_one_message_names_everything_that_an_ablation_has_to_remove() -> None:
    with pytest.raises(UserError) as error:
        load_run(DIGITS, ["loss.cluster=0"], world=1)
    said = str(error.value)
    assert said.endswith("--set data.labels=null --set loss.beta=null --set loss.gamma=null --set classifier=null")
    run = load_run(DIGITS, ["loss.cluster=0", *(word for word in NO_CLUSTER.split())], world=1)
    assert run.megacid.classifier == SECTIONS["classifier"]() and run.megacid.data.labels is None


def test_a_value_that_is_the_default_is_accepted() -> None:
    load_run(
        DIGITS, [*NO_CLUSTER.split(), "loss.alpha=1.0", "classifier.scale=64", "guard.spike_deviations=10"], world=1
    )


def test_null_removes_a_key_of_either_half_and_only_from_the_command_line() -> None:
    assert "bf16" not in load_run(DIGITS, ["bf16.enabled=true", "bf16=null"], world=1).deepspeed
    assert load_run(DIGITS, ["loss.gamma=null"], world=1).megacid.loss.gamma == 0
    with pytest.raises(UserError, match=r'"megacid.student.model" is missing'):
        load_run(DIGITS, ["student.model=null"], world=1)


def test_a_run_begun_with_settings_without_effect_goes_on_without_them(tmp_path: Path) -> None:
    """Earlier versions accepted them."""
    run = load_run(DIGITS, NO_CLUSTER.split(), world=1)
    write_config(run, tmp_path, 1, None)
    saved = json.loads((tmp_path / "config.json").read_text())
    block = saved["resolved"]["megacid"]
    saved["resolved"] |= {"steps_per_print": 10, "comms_logger": {"enabled": True}, "dump_state": True}
    block["loss"]["gamma"], block["data"]["labels"], block["classifier"]["scale"] = 1.0, "clusters", 32.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_same_settings(run, tmp_path)
    block["loss"]["instance"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"other settings \(megacid\.loss\.instance: 2\.0 -> 1\.0\)"):
        check_same_settings(run, tmp_path)


# ---- every key -----------------------------------------------------------------------------------------------------

FIELDS = [(section, name) for section, model in SECTIONS.items() for name in model.model_fields]


def others(section: str, name: str, value: Any) -> list[Any]:
    """Other valid values of a field that has this one."""
    kind = SECTIONS[section].model_fields[name].annotation
    if get_origin(kind) is Literal:
        return [word for word in get_args(kind) if word != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple):
        return [other for other in ([0.5, 0.5], ["image"], []) if other != list(value)]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value / 2 + 0.125, 0.5]
    return [3, "other"]  # of a number or of a path that is null; the other one is refused for its type


@pytest.mark.parametrize("source", ["shards", "features"])
@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda part: part)
def test_every_key_changes_the_settings_or_is_refused_with_a_reason(
    tmp_path: Path, source: str, section: str, name: str
) -> None:
    file = DIGITS if source == "shards" else toy.run_file(tmp_path, "toy")
    base = load_run(file, world=1)
    value = getattr(getattr(base.megacid, section), name)
    for other in others(section, name, value):
        if other == value:
            continue
        try:
            run = load_run(file, [f"{section}.{name}={json.dumps(other)}"], world=1)
        except UserError as error:
            assert f"{section}.{name}" in str(error) or name in str(error), error
            assert "\n" not in str(error)
            continue
        assert run.resolved() != base.resolved()
        assert ineffective(MegacidConfig, run.megacid) == []


def _train_and_record(file: str) -> list[tuple[str, str]]:
    """Train; the settings that were read after the run file was checked, as (section, key)."""
    read: set[tuple[str, str]] = set()

    def recorder(section: str, keys: set[str]) -> Any:
        def get(self: Any, name: str) -> Any:
            if name in keys:
                read.add((section, name))
            return object.__getattribute__(self, name)

        return get

    for section, model in SECTIONS.items():
        model.__getattribute__ = recorder(section, set(model.model_fields))  # type: ignore[method-assign]
    load = cli.load_run

    def load_and_forget(*args: Any, **options: Any) -> Any:
        run = load(*args, **options)
        read.clear()
        return run

    cli.load_run = load_and_forget
    bad_step = FaultPlan(Fault("train:batch", "nan_batch", rank=0, step=22))
    assert toy.train_here(["--deepspeed_config", file], bad_step.to_json()) == 0
    return sorted(read)


def test_the_trainer_reads_every_key_that_a_run_on_features_may_set(tmp_path: Path) -> None:
    """A key that nothing reads has no effect, whatever its conditions say."""
    toy.write_features(tmp_path / "features")
    file = toy.run_file(tmp_path, "read", guard__spike="skip")
    (read,) = run_ranks(_train_and_record, 1, str(file), timeout_s=120)
    block = load_run(file, world=1).megacid
    unread = set()
    for section, name in FIELDS:
        needs = [need for need in SECTIONS[section].model_fields[name].metadata if isinstance(need, Needs)]
        if all(need.holds(block) for need in needs) and (section, name) not in read:
            unread.add((section, name))
    assert unread == {("data", "shards"), ("data", "sources")}  # the other kinds of data


def test_the_runs_of_the_demo_have_no_setting_without_effect() -> None:
    script = (ROOT / "tools" / "demo.sh").read_text()
    no_cluster = re.search(r"^no_cluster=\((.*)\)$", script, re.MULTILINE)
    assert no_cluster is not None
    runs = re.findall(r"^    train(?:_student)? (\w+) (configs/\w+\.json)(.*)$", script, re.MULTILINE)
    assert len(runs) == 5
    for _, file, words in runs:
        changes = words.replace('"${no_cluster[@]}"', no_cluster[1]).replace("$((teacher_steps / 5))", "1")
        changes = changes.replace("$out/", "runs/demo/")
        changes = shlex.split(changes.replace('"$teacher_steps"', "5"))[1::2]
        load_run(ROOT / file, changes, world=2)


def test_a_sweep_up_to_all_classes_drops_what_needs_sampling() -> None:
    args = argparse.Namespace(set=["classifier.log_q=true", "classifier.lazy=decay"], out=Path("sweep"))
    for rate, kept in ((0.5, True), (1.0, False)):
        changes = sweep.assignments(args, sweep.Point("rate", rate, 0), Path("features"))
        block = load_run(ROOT / "configs" / "partial_fc_sweep.json", changes, world=1).megacid.classifier
        assert block.log_q is kept and block.lazy == ("decay" if kept else "none")


# What has no effect by the conditions of the schema: on this run file -> these changes.
NO_EFFECT_ON_FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw over all classes": (
        {"classifier__sample_rate": 1.0, "schedule__kind": "constant", "student__layers": 0},
        {"classifier__log_q": True, "classifier__lazy": "decay", "classifier__margin_grad": "straight_through",
         "classifier__momentum": 0.5, "schedule__final_share": 0.5, "guard__spike_deviations": 1.0,
         "student__hidden": 7, "loss__temperature": 0.5, "loss__form": "sigmoid",
         "loss__cluster_temperature": 3.0},
    ),
    "sgd": ({"classifier__optimizer": "sgd"}, {"classifier__betas": [0.1, 0.2], "classifier__eps": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_EFFECT_ON_FEATURES)
def test_what_is_refused_for_its_lack_of_effect_changes_no_bit_of_a_checkpoint(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, changes = NO_EFFECT_ON_FEATURES[case]
    toy.write_features(tmp_path / "features")
    short = {"run__total_steps": 6, "run__save_every": 6}
    with_it = toy.run_file(tmp_path, "with", **base, **changes, **short)
    with pytest.raises(UserError, match="has no effect") as error:
        load_run(with_it, world=1)
    assert all(key.replace("__", ".") in str(error.value) for key in changes)
    monkeypatch.setattr("megacid.config.schema.check_effects", lambda block: None)  # the ranks are forked
    for file in (with_it, toy.run_file(tmp_path, "without", **base, **short)):
        assert toy.train_toy(1, file) == [0]
    got, want = (toy.tensors(tmp_path / "runs" / name / "step-00000006") for name in ("with", "without"))
    assert toy.differing(want, {name: got[name] for name in want}) == []
