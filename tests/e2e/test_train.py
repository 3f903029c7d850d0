"""Whole training runs on forked ranks: resume, elastic ranks, export, and what the trainer says to bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from offline_data import run as run_tool_inside
from safetensors.torch import load_file
from train_run import Pipeline, losses, run_train, tensors, train_rank

from megacid import train
from megacid.checkpoint.state import CheckpointReader
from megacid.config.load import load_run
from megacid.errors import UserError

# ---- resume ------------------------------------------------------------------------------------------------------


# Stages 0 and 1 of two ranks are in the default run with accumulation and bf16, see the two tests that follow.
STAGES = [(1, 1), (2, 2), (2, 3), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (0, 1))]


@pytest.fixture(scope="module")
def two_ranks(pipeline: Pipeline) -> Path:
    """The directory of a finished run on two ranks, to read."""
    run_train(2, pipeline.run_file("two_ranks"))
    return pipeline.root / "runs" / "two_ranks"


@pytest.mark.parametrize(("world", "stage"), STAGES)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(pipeline: Pipeline, world: int, stage: int) -> None:
    """One of them with weight_grad "recomputed", where the optimizer makes the classifier's gradient itself."""
    weight_grad = ("--set", f"classifier.weight_grad={'recomputed' if stage == 2 else 'stored'}")
    through = pipeline.run_file(f"through{world}{stage}", zero_optimization={"stage": stage})
    run_train(world, through, *weight_grad)
    broken = pipeline.run_file(f"broken{world}{stage}", zero_optimization={"stage": stage})
    run_train(world, broken, *weight_grad, "--stop-after", "4", expect=143)
    run_train(world, broken, *weight_grad)
    want, got = (
        tensors(pipeline.root / "runs" / f"{name}{world}{stage}" / "step-00000006") for name in ("through", "broken")
    )
    assert want.keys() == got.keys() and len(want) > 50
    assert [name for name in want if not want[name].equal(got[name])] == []
    assert sorted(losses(pipeline.root / "runs" / f"broken{world}{stage}")) == [2, 4, 6], (
        "tensorboard repeats or misses a step"
    )


def test_accumulated_micro_batches_resume_with_the_same_bits(pipeline: Pipeline) -> None:
    changes: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    changes["zero_optimization"] = {"stage": 0}
    run_train(2, pipeline.run_file("gas_through", **changes))
    run_train(2, pipeline.run_file("gas_broken", **changes), "--stop-after", "3", expect=143)
    run_train(2, pipeline.root / "gas_broken.json")
    want, got = (tensors(pipeline.root / "runs" / name / "step-00000006") for name in ("gas_through", "gas_broken"))
    assert [name for name in want if not want[name].equal(got[name])] == []


def test_a_run_in_four_micro_batches_ends_with_the_weights_of_one(pipeline: Pipeline) -> None:
    """Adam's eps is larger than the rounding of a gradient that is 0, such as that of an attention's key bias."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}}
    for accumulation, weight_grad in ((1, "stored"), (4, "recomputed")):
        changes = {"gradient_accumulation_steps": accumulation, "classifier__weight_grad": weight_grad}
        run_train(1, pipeline.run_file(f"in{accumulation}", optimizer=optimizer, **changes))
    one, four = (pipeline.root / "runs" / f"in{accumulation}" for accumulation in (1, 4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-6)
    want, got = tensors(one / "step-00000006"), tensors(four / "step-00000006")
    for name in want:
        if name.startswith(("param/", "head/")):
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_resumes_with_the_same_bits(pipeline: Pipeline) -> None:
    run_train(2, pipeline.run_file("bf16_through", bf16={"enabled": True}))
    run_train(2, pipeline.run_file("bf16_broken", bf16={"enabled": True}), "--stop-after", "4", expect=143)
    run_train(2, pipeline.root / "bf16_broken.json")
    want, got = (tensors(pipeline.root / "runs" / name / "step-00000006") for name in ("bf16_through", "bf16_broken"))
    assert [name for name in want if not want[name].equal(got[name])] == []


def test_another_number_of_ranks_and_another_zero_stage_go_on_with_the_same_loss(pipeline: Pipeline) -> None:
    """With every class in every step: a rank samples its own share of classes, which depends on the number of ranks."""
    run_train(2, pipeline.run_file("wide", classifier__sample_rate=1.0))
    moved = pipeline.run_file("moved", classifier__sample_rate=1.0)
    run_train(2, moved, "--stop-after", "3", expect=143)
    run_train(1, moved, "--set", "zero_optimization.stage=2")
    want, got = (losses(pipeline.root / "runs" / name) for name in ("wide", "moved"))
    assert got[6] == pytest.approx(want[6], rel=1e-5)


def test_a_damaged_newest_checkpoint_is_passed_over(pipeline: Pipeline) -> None:
    file = pipeline.run_file("damaged")
    run_train(1, file)
    run = pipeline.root / "runs" / "damaged"
    want = tensors(run / "step-00000006")
    victim = run / "step-00000006" / "student-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    run_train(1, file)
    assert "student-00000.safetensors has sha256" in (run / "log.txt").read_text()
    got = tensors(run / "step-00000006")
    assert [name for name in want if not want[name].equal(got[name])] == []


def test_another_setting_is_another_run(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    file = pipeline.run_file("drift")
    run_train(1, file, "--stop-after", "3", expect=143)
    run_train(1, file, "--set", "classifier.scale=8.0", expect=2)
    assert "megacid.classifier.scale: 16.0 -> 8.0" in capfd.readouterr().err
    run_train(1, file, "--resume", "never", expect=2)
    assert "already has checkpoints up to step 3" in capfd.readouterr().err
    run_train(1, file, "--set", "run.log_every=1")


def test_several_labels_per_sample_train_and_need_labels_that_were_written(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    clusters = pipeline.root / "clusters-3"
    run_tool_inside("cluster", "--embeddings", pipeline.teacher, "--out", clusters, "--k", 13, "--top-labels", 3)
    file = pipeline.run_file("mlcd", data__labels=str(clusters), data__labels_per_sample=3, loss__gamma=0.0)
    options = ("--set", "run.log_every=1", "--set", "run.total_steps=30", "--set", "classifier.log_q=true")
    run_train(2, file, *options)
    curve = losses(pipeline.root / "runs" / "mlcd")
    assert len(curve) == 30 and curve[30] < 0.9 * curve[1]
    mean = {"data__labels_per_sample": 3, "loss__gamma": 0.0, "classifier__labels_loss": "mean", "loss__affinity": 0.5}
    for world in (1, 2):
        run_train(world, pipeline.run_file(f"mean{world}", data__labels=str(clusters), **mean))
    curves = [losses(pipeline.root / "runs" / name) for name in ("mean1", "mean2")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][2] != pytest.approx(curve[2], rel=1e-2)
    one = pipeline.run_file("one", data__labels=str(clusters), loss__gamma=0.0)  # the nearest of the three alone
    run_train(1, one, "--stop-after", "1", expect=143)
    for name, changes, said in (
        ("many", {"data__labels_per_sample": 4, "loss__gamma": 0.0}, "has 3 labels per sample, expected 4"),
        ("kl", {"data__labels_per_sample": 3}, '"megacid.loss.gamma" is 0.5, expected one label for the KL'),
    ):
        run_train(1, pipeline.run_file(name, data__labels=str(clusters), **changes), "--dry-run", expect=2)
        assert said in capfd.readouterr().err


def test_checkpoints_are_listed_verified_shown_and_give_their_class_rows(
    pipeline: Pipeline, two_ranks: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(two_ranks, tmp_path / "run"))  # this test damages it
    newest = run / "step-00000006"
    assert run_tool_inside("ckpt", "list", run).count("ok") == 2
    assert "all bytes match the manifest" in run_tool_inside("ckpt", "verify", newest)
    said = run_tool_inside("ckpt", "show", run)
    assert "optimizer/exp_avg" in said and '"step": 6' in said and '"num_classes": 13' in said
    run_tool_inside("ckpt", "export", run, "--out", tmp_path / "rows.npy")
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (13, 32) and np.array_equal(rows, tensors(newest)["head/weight"].numpy())
    # The rows start other runs, from one file and from per-rank files as insightface writes them.
    for rank, part in enumerate(torch.from_numpy(rows).split([5, 4, 4])):
        torch.save({"weight": part.clone()}, tmp_path / f"softmax_fc_gpu_{rank}.pt")
    for world, name, init in ((1, "again", tmp_path / "rows.npy"), (2, "published", tmp_path)):
        file = pipeline.run_file(name, classifier__init=str(init), classifier__lr=0.0)
        run_train(world, file, "--stop-after", "1", expect=143)
        begun = tensors(pipeline.root / "runs" / name / "step-00000001")["head/weight"]
        assert np.array_equal(begun.numpy(), rows), name
    (newest / "classifier-00001.safetensors").write_bytes(b"damaged")
    assert "classifier-00001.safetensors has 7 bytes" in run_tool_inside("ckpt", "list", run, expect=1)
    assert "not a valid checkpoint" in run_tool_inside("ckpt", "verify", newest, expect=2)
    assert "has no checkpoints" in run_tool_inside("ckpt", "list", tmp_path, expect=2)


def test_published_per_rank_files_become_one_file_of_rows(tmp_path: Path) -> None:
    whole = torch.randn(11, 4)
    for rank, part in enumerate(whole.split([4, 4, 3])):
        torch.save({"state_dict_softmax_fc": {"weight": part.clone()}}, tmp_path / f"checkpoint_gpu_{rank}.pt")
    run_tool_inside("ckpt", "import", tmp_path, "--out", tmp_path / "rows.npy")
    assert np.array_equal(np.load(tmp_path / "rows.npy"), whole.numpy())
    (tmp_path / "checkpoint_gpu_1.pt").unlink()
    said = run_tool_inside("ckpt", "import", tmp_path, "--out", tmp_path / "other.npy", expect=2)
    assert "none of rank 1" in said
    assert not (tmp_path / "other.npy").exists()


def test_the_classes_as_a_whole_are_reported_at_every_checkpoint(two_ranks: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(two_ranks / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("classes/never_hit")] == [3, 6]
    assert 0 <= events.Scalars("classes/never_hit")[1].value < 1
    assert events.Histograms("classes/hits")[-1].histogram_value.num == 13
    for name in ("accuracy", "largest_negative", "positive_share", "filtered", "sampled"):
        assert len(events.Scalars(f"classifier/{name}")) == 3


# ---- bad input: one error, exit code 2, nothing written ----------------------------------------------------------

BAD = {
    "unknown key": (["--set", "classifier.sample_rat=0.1"], 'did you mean "sample_rate"'),
    "mistyped DeepSpeed key": (["--set", "train_batch_sise=8"], 'did you mean "train_batch_size"'),
    "mistyped ZeRO key": (["--set", "zero_optimization.stag=1"], 'did you mean "stage"'),
    "wrong type": (["--set", "run.total_steps=many"], '"many", expected an integer'),
    "out of range": (["--set", "classifier.sample_rate=1.5"], "is 1.5, expected <= 1"),
    "batches": (["--set", "train_micro_batch_size_per_gpu=5"], "expected train_batch_size 16"),
    "fp16": (["--set", 'fp16={"enabled": true}'], "expected bf16 or fp32"),
    "no clipping": (["--set", "gradient_clipping=auto"], "is \"auto\""),
    "no teacher directory": (["--set", "data.teacher=/nowhere/teacher"], "/nowhere/teacher"),
    "no shards": (["--set", "data.shards=/nowhere/shards"], "/nowhere/shards"),
    "more than the data": (["--set", "train_batch_size=4096"], "global batch of 4096"),
    "teacher width": (["--set", "student.embed_dim=48"], "embed_dim"),
    "unknown model": (["--set", "student.model=ViT-Z-99"], "ViT-Z-99"),
    "no terms": (["--set", 'loss={"alpha": 1.0}'], "every weight"),
    "labels needed": (["--set", "data.labels=null"], "needs labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_that_names_it(pipeline: Pipeline, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    options, said = BAD[case]
    name = "bad_" + case.replace(" ", "_")
    run_train(2, pipeline.run_file(name), *options, "--dry-run", expect=2)
    error = capfd.readouterr().err
    assert said in error
    assert error.count("error: ") == 1 and "Traceback" not in error, error
    assert not (pipeline.root / "runs" / name).exists()


def test_labels_of_other_shards_are_refused(
    pipeline: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline.shards, other)
    shutil.rmtree(other / "index", ignore_errors=True)
    sorted(other.glob("*.tar"))[-1].unlink()
    run_train(1, pipeline.run_file("foreign"), "--set", f"data.shards={other}", "--dry-run", expect=2)
    error = capfd.readouterr().err
    assert str(other) in error and str(pipeline.teacher) in error


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.json"
    file.write_text('{"train_batch_size": 8, "train_batch_size": 16, "megacid": {}}')
    with pytest.raises(UserError, match="written twice"):
        load_run(file, world=1)


def test_a_run_directory_in_use_is_refused(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    from megacid.training.lifecycle import RunLock

    held = RunLock(pipeline.root / "runs" / "held")
    run_train(1, pipeline.run_file("held"), expect=2)
    assert "is in use by process" in capfd.readouterr().err
    held.release()


def test_dry_run_says_what_the_run_needs_and_writes_nothing(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    run_train(2, pipeline.run_file("dry"), "--dry-run")
    said = capfd.readouterr().err
    assert "estimated MiB of rank 0" in said and "classifier rows" in said and "labelled_share" in said
    assert re.search(r"collectives of a step: 1\d; a rank sends [\d.]+ MiB in a ring: teacher embeddings [\d.]+", said)
    assert re.search(r"time of a step: [\d.]+ ms, the prediction of a model .* not a measurement: forward [\d.]+", said)
    assert not (pipeline.root / "runs" / "dry").exists()


def test_persistent_nan_ends_the_run_and_keeps_the_last_good_checkpoint(pipeline: Pipeline) -> None:
    """A learning rate that explodes: the guard skips, then gives up with its own exit code."""
    file = pipeline.run_file("nan", run__save_every=1)
    run_train(1, file, "--stop-after", "2", expect=143)
    want = tensors(pipeline.root / "runs" / "nan" / "step-00000002")
    assert run_ranks(
        _nan_main,
        2,
        ["--deepspeed_config", str(file), "--set", "run.save_every=100", "--set", "guard.max_consecutive_skips=2"],
        timeout_s=120,
    ) == [65, 65]
    got = tensors(pipeline.root / "runs" / "nan" / "step-00000002")
    assert all(want[name].equal(got[name]) for name in want)
    assert not (pipeline.root / "runs" / "nan" / "step-00000006").exists()


def _nan_main(argv: list[str]) -> int:
    """The loss of rank 1 alone is not a number from the first step on; both ranks must take the same way out."""
    from megacid.losses import Objective

    original = Objective.__call__

    def poisoned(self: Objective, *args: Any) -> Any:
        loss, terms = original(self, *args)
        return (loss * float("nan") if dist.get_rank() == 1 else loss), terms

    Objective.__call__ = poisoned  # type: ignore[method-assign]
    return train_rank(argv)


def test_a_trained_run_exports_and_evaluates(two_ranks: Path, tmp_path: Path) -> None:
    """What the trainer wrote is what the export holds, and stock open_clip loads it."""
    import open_clip

    run_tool_inside("export", "--run", two_ranks, "--out", tmp_path / "export", "--name", "small")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    reader = CheckpointReader(two_ranks / "step-00000006")
    for name, parameter in model.named_parameters():
        assert parameter.detach().reshape(-1).equal(reader.tensor("param", name).reshape(-1)), name
    assert load_file(tmp_path / "export" / "open_clip_model.safetensors").keys() >= {
        name for name, _ in model.named_parameters()
    }


def test_print_config_is_json_with_every_default(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--deepspeed_config", str(pipeline.run_file("printed")), "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train_micro_batch_size_per_gpu"] == 16 and printed["megacid"]["classifier"]["momentum"] == 0.9
