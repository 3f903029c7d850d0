"""Schedule, guard and the run file's arithmetic."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from megacid.config.load import load_run
from megacid.config.renamed import RENAMED
from megacid.config.sections import GuardConfig, ScheduleConfig
from megacid.errors import UserError
from megacid.training.guard import Guard, TooManySkips, Verdict
from megacid.training.metrics import peak_memory_mib
from megacid.training.run_settings import check_packages, check_same_settings, flat, write_config
from megacid.training.schedule import learning_rate_share, parameter_groups

ROOT = Path(__file__).resolve().parents[2]


def test_warm_up_is_linear_and_cosine_ends_at_the_final_share() -> None:
    schedule = ScheduleConfig(warmup_steps=4, final_share=0.1)
    shares = [learning_rate_share(step, 20, schedule) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0 and all(a > b for a, b in itertools.pairwise(shares[4:]))
    assert shares[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_share(20, 20, schedule) == pytest.approx(0.1)
    assert learning_rate_share(19, 20, ScheduleConfig(kind="constant")) == 1.0


def test_vectors_and_scalars_do_not_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, free = parameter_groups(module, 0.2)
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.2
    assert [p.ndim for p in free["params"]] == [1, 1, 1] and free["weight_decay"] == 0.0


def _decide(loss: float, norm: float, rows: list[float]) -> Verdict:
    import torch.distributed as dist

    return Guard(1.0, GuardConfig()).decide(
        0, torch.tensor(loss), torch.tensor(norm), torch.tensor(rows[dist.get_rank()]), lambda: (False, "")
    )


def test_the_clipping_norm_counts_student_and_every_class_shard() -> None:
    for verdict in run_ranks(_decide, 2, 1.0, 3.0, [7.0, 9.0]):
        assert verdict.apply and verdict.grad_norm == pytest.approx(5.0)
        assert verdict.clip_scale == pytest.approx(1 / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "norm", "rows"),
    [
        (1.0, 3.0, [1.0, math.nan]),
        (math.inf, 3.0, [1.0, 1.0]),
        (1.0, math.nan, [1.0, 1.0]),
        (1.0, 1.0, [math.inf, 1.0]),
    ],
)
def test_one_rank_that_is_not_finite_makes_all_ranks_skip(loss: float, norm: float, rows: list[float]) -> None:
    assert [verdict.apply for verdict in run_ranks(_decide, 2, loss, norm, rows)] == [False, False]


def test_the_guard_gives_up_after_consecutive_skips_only() -> None:
    guard = Guard(0.0, GuardConfig(max_consecutive_skips=2))
    good, bad = (torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(math.nan), torch.tensor(2.0))
    assert not guard.decide(0, *bad, None, lambda: (False, "")).apply
    assert guard.decide(1, *good, None, lambda: (False, "")) == Verdict(True, 2.0, 1.0, 1.0)
    assert not guard.decide(2, *bad, None, lambda: (False, "")).apply
    with pytest.raises(TooManySkips, match="2 steps in a row up to step 3"):
        guard.decide(3, *bad, None, lambda: (False, ""))


def test_the_guard_gives_up_when_too_many_of_the_last_thousand_steps_were_skipped() -> None:
    def run(every: int) -> int:
        """The step at which it gives up when each `every`-th step is bad; 5000 when it does not."""
        guard = Guard(0.0, GuardConfig(max_consecutive_skips=3, max_skipped_share=0.01))
        for step in range(5000):
            loss = torch.tensor(math.nan if step % every == 0 else 1.0)
            try:
                guard.decide(step, loss, torch.tensor(1.0), None, lambda: (False, ""))
            except TooManySkips as error:
                assert "11 of the last 1000 steps" in str(error)
                return step
        return 5000

    assert run(90) == 90 * 10 and run(100) == 5000


@pytest.mark.parametrize("policy", ["off", "skip", "lower", "abort"])
def test_a_spike_is_judged_by_median_and_deviation_and_the_state_travels(policy: Any) -> None:
    config = GuardConfig(spike=policy, spike_deviations=8.0)
    guard, norm = Guard(0.0, config), torch.tensor(1.0)
    losses = [5.0 + 0.1 * math.sin(7.0 * step) for step in range(60)]  # deviation about 0.07
    for step, loss in enumerate(losses):
        if step == 30:  # in another process after a resume, by way of JSON
            state = json.loads(json.dumps(guard.state()))
            guard = Guard(0.0, config)
            guard.load_state(state)
        assert (
            guard.decide(step, torch.tensor(loss, dtype=torch.float64), norm, None, lambda: (False, "")).clip_scale
            == 1.0
        )
    limit = guard._spike_limit()
    assert limit is None if policy == "off" else limit == pytest.approx(5.0 + 8 * 0.07, abs=0.1)
    if policy == "abort":
        with pytest.raises(TooManySkips, match=r"step 60 has loss 500.*guard.spike is abort"):
            guard.decide(60, torch.tensor(500.0), norm, None, lambda: (False, ""))
        return
    verdict = guard.decide(60, torch.tensor(500.0), norm, None, lambda: (False, ""))
    assert (verdict.apply, verdict.clip_scale) == {"off": (True, 1.0), "skip": (False, 0.0), "lower": (True, 0.1)}[
        policy
    ]
    assert guard.skipped == (policy == "skip")


@pytest.mark.parametrize(
    ("installed", "works"),
    [("0.19.8", True), ("0.19.10+abc", True), ("0.19.7", False), ("0.19", False), ("0.20.0", False), ("none", False)],
)
def test_a_deepspeed_that_would_ignore_a_key_is_refused_at_the_start(
    installed: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert '"deepspeed>=0.19.8,<0.20"' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr("megacid.training.run_settings.versions", lambda: {"deepspeed": installed})
    if works:
        check_packages()
        return
    with pytest.raises(UserError, match=rf"DeepSpeed {installed} is installed, expected >= 0\.19\.8 and < 0\.20"):
        check_packages()


PATHS = ["run.dir", "data.shards", "data.teacher", "data.labels", "data.keep", "student.pretrained", "classifier.init"]


@pytest.mark.parametrize("key", PATHS)
def test_a_home_directory_is_expanded_in_every_path_and_a_variable_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of-a-test")
    file, (section, name) = ROOT / "configs" / "digits_cpu.json", key.split(".")
    run = load_run(file, [f"{key}=~/x"], world=1)
    assert getattr(getattr(run.megacid, section), name) == "/home/of-a-test/x"
    variables, user = "variables are not expanded", "there is no such user"
    for path, reason in (("$HOME/x", variables), ("a/${X}", variables), ("~nobody-here/x", user)):
        with pytest.raises(UserError, match=f'"megacid.{key}" is .* expected a path, and .*{reason}'):
            load_run(file, [f"{key}={path}"], world=1)


def test_every_run_file_of_the_project_is_good() -> None:
    files = sorted((ROOT / "configs").glob("*.json"))
    assert len(files) >= 3
    for file in files:
        run = load_run(file, world=2)
        assert json.loads(json.dumps(run.resolved()))["megacid"]["run"]["name"]


def test_a_run_that_was_started_before_a_setting_existed_had_its_default(tmp_path: Path) -> None:
    file = ROOT / "configs" / "digits_cpu.json"
    run = load_run(file, world=1)
    write_config(run, tmp_path, 1)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["resolved"]["megacid"]["classifier"]["log_q"]
    del saved["resolved"]["megacid"]["data"]["labels_per_sample"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_same_settings(run, tmp_path)
    with pytest.raises(UserError, match=r"megacid\.classifier\.log_q: False -> True"):
        check_same_settings(load_run(file, ["classifier.log_q=true"], world=1), tmp_path)


def test_a_renamed_key_is_one_line_that_says_what_to_write(tmp_path: Path) -> None:
    file = ROOT / "configs" / "digits_cpu.json"
    expected = '"megacid.classifier.mode" was renamed: write "megacid.classifier.weight_grad": "recomputed" instead'
    with pytest.raises(UserError) as error:
        load_run(file, ["classifier.mode=slab"], world=1)
    assert str(error.value) == expected
    known = flat(load_run(file, world=1).resolved())
    assert all(new.key in known and old not in known for old, new in RENAMED.items())


def test_a_run_that_was_started_under_an_old_key_goes_on_under_the_new_one(tmp_path: Path) -> None:
    file = ROOT / "configs" / "digits_cpu.json"
    run = load_run(file, ["classifier.weight_grad=recomputed"], world=1)
    write_config(run, tmp_path, 1)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["resolved"]["megacid"]["classifier"].pop("weight_grad") == "recomputed"
    saved["resolved"]["megacid"]["classifier"]["mode"] = "slab"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_same_settings(run, tmp_path)
    with pytest.raises(UserError, match="weight_grad: 'recomputed' -> 'stored'"):
        check_same_settings(load_run(file, world=1), tmp_path)


def test_set_reaches_both_halves_of_the_run_file() -> None:
    file = ROOT / "configs" / "digits_cpu.json"
    run = load_run(
        file,
        ["classifier.sample_rate=0.25", "megacid.run.seed=7", "zero_optimization.stage=2", "run.name=other"],
        world=2,
    )
    assert (run.megacid.classifier.sample_rate, run.megacid.run.seed, run.zero_stage, run.megacid.run.name) == (
        0.25,
        7,
        2,
        "other",
    )
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load_run(file, ["classifier"], world=2)


def test_peak_memory_is_that_of_the_process_not_of_the_one_that_started_it() -> None:
    """A sweep starts its runs; their memory must not be the sweep's."""
    ask = "from megacid.training.metrics import peak_memory_mib; print(peak_memory_mib())"
    mine = torch.ones(300 * 2**18)  # 300 MiB, so that this process is larger than a fresh one that has imported torch
    paths = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", ask], env=paths, capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < peak_memory_mib() - 0.5 * mine.numel() * 4 / 2**20
