"""Compiled towers and the NHWC memory format train the same student, and change no name in a checkpoint.

inductor takes a minute of CPU per graph on some hosts, so the default tests have torch's aot_eager as the backend: the
same tracing and differentiation with eager kernels. The slow ones have inductor.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from pair_data import write_shards
from small_student import SmallRun, run_file, small_student
from torch import nn
from toy import differing, tensors
from train_run import train_rank

from megacid.config.load import load_run
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models import compiled
from megacid.models.clip import PixelNormalization, StudentSpec
from megacid.models.compiled import check_compiler, compile_towers, eager_towers
from megacid.models.freezing import frozen_parameters
from megacid.models.student import Student
from megacid.training.components import build_components
from megacid.training.evaluation import StudentCopy
from megacid.training.run_settings import changed_settings


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_file(tmp_path_factory.mktemp("compile"))


def plain(student: Student) -> None:
    """A student with all that a compiler may break: patch and attention dropout, frozen parameters."""
    student.clip.visual.patch_dropout.prob = 0.5
    for tower in (student.clip.visual.transformer, student.clip.transformer):
        tower.resblocks = tower.resblocks[:1]  # half the compile time
    for module in student.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.1
    student.freeze(frozen_parameters(student.clip, ["transformer.resblocks.0.mlp.*"], ("image", "text")))


def with_checkpointing(student: Student) -> None:
    plain(student)
    student.clip.set_grad_checkpointing(True)


def compiled_run(file: Path, settings: list[str], checkpointing: bool) -> dict[str, Any]:
    """Steps of an eager and of a compiled student; a resume of the compiled one; replays of a micro-batch."""
    prepare = with_checkpointing if checkpointing else plain

    def prepare_compiled(student: Student) -> None:
        prepare(student)
        compile_towers(student)

    eager, run = SmallRun(file, settings, prepare), SmallRun(file, settings, prepare_compiled)
    losses = [[r.step() for _ in range(2)] for r in (eager, run)]
    resumed = SmallRun(file, settings, prepare_compiled)
    with eager_towers(True):
        resumed.load(run.state(), run.updates)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    continued = run.step(), resumed.step()
    with torch.no_grad():
        images = [run.engine(*run.inputs(0), seed=seed).image for seed in (5, 6)]
    images.append(run.engine(*run.inputs(0), seed=5).image.detach())
    return {
        "losses": losses, "continued": continued, "states": (run.state(), resumed.state()), "images": images,
        "graphs": graphs, "breaks": dict(torch._dynamo.utils.counters["graph_break"]), "names": set(eager.state()),
    }  # fmt: skip


CASES = [(1, 2, "aot_eager", False)]
MORE = [(1, 0, "inductor", False), (2, 1, "inductor", False), (2, 2, "inductor", True), (2, 0, "aot_eager", True)]


@pytest.mark.parametrize(
    ("world", "stage", "backend", "checkpointing"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE],
)
def test_compiled_towers_train_the_same_student_and_resume_and_replay_exactly(
    file: Path, world: int, stage: int, backend: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)  # the ranks are forked
    settings = [f"zero_optimization.stage={stage}", f"train_batch_size={world}"]
    for got in run_ranks(compiled_run, world, file, settings, checkpointing, timeout_s=900):
        assert got["losses"][1] == pytest.approx(got["losses"][0], rel=2e-5)
        assert got["continued"][0] == got["continued"][1]
        before, after = got["states"]
        assert differing(before, after) == [] and set(before) == got["names"]
        assert got["graphs"] >= 2 and got["breaks"] == {}
        without_graph, other_seed, with_graph = got["images"]
        assert torch.allclose(without_graph, with_graph, rtol=0, atol=1e-6)
        assert not torch.allclose(without_graph, other_seed, rtol=0, atol=1e-3)


def test_the_copy_that_evaluates_a_student_is_eager() -> None:
    student = small_student()
    compile_towers(student)
    assert student.clip.visual._compiled_call_impl is not None
    for other in (StudentCopy(student).student, copy.deepcopy(student)):
        assert all(module._compiled_call_impl is None for module in other.modules())


def test_compiling_at_stage_3_is_refused_and_a_started_run_keeps_its_settings(file: Path) -> None:
    with pytest.raises(UserError, match=r'"megacid.student.compile" is true at .*stage" 3, .*: use stage 2, or remove'):
        load_run(file, ["student.compile=true", "zero_optimization.stage=3", "bf16=null"], world=1)
    run = load_run(file, [], world=1)
    for key in ("compile", "channels_last"):
        other = load_run(file, [f"student.{key}=true"], world=1)
        changed = changed_settings(other, {"resolved": run.resolved()})
        assert changed == [f"megacid.student.{key}: False -> True"]


def build_without_compiler(file: Path) -> str:
    run = load_run(file, ["student.compile=true", "data.shards=nowhere"], world=2)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        build_components(run, Parallel(rank, world, rank, torch.device("cpu"), torch.distributed.group.WORLD))
    except UserError as error:
        return str(error)
    return "built"


def test_a_host_without_compiler_is_one_error_on_every_rank_before_the_data(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("cpu", "cuda"):
        check_compiler(torch.device(device))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="gcc or clang was not found: install one, set the variable CC to it"):
        check_compiler(torch.device("cuda"))
    first, second = run_ranks(build_without_compiler, 2, file)
    assert first == second and "needs a compiler, and g++ was not found: install" in first
    program = tmp_path / "my-compiler"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    check_compiler(torch.device("cpu"))


def resnet(student: Student) -> None:
    student.clip.visual = small_student(layers=[1, 1, 1, 1], width=8).clip.visual


def runs_in_both_formats(file: Path, settings: list[str]) -> list[dict[str, Any]]:
    """Two steps of a ResNet student with contiguous and with channels-last images; the formats inside of the tower."""
    results = []
    for channels_last in (False, True):
        run = SmallRun(file, settings, resnet)
        normalize = PixelNormalization(StudentSpec("digits-student"), "cpu", channels_last=channels_last)
        text = [run.inputs(step)[1] for step in range(2)]
        pixels = [torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8) for _ in text]
        run.inputs = lambda step: (normalize(pixels[step]), text[step])  # type: ignore[method-assign]  # noqa: B023
        formats: list[bool] = []

        def see(module: nn.Module, args: tuple[torch.Tensor], formats: list[bool] = formats) -> None:
            if module.training and min(args[0].shape[1:]) > 1:  # of a 1 x 1 image both formats have the same strides
                formats.append(args[0].is_contiguous(memory_format=torch.channels_last))

        for module in run.engine.module.clip.visual.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_pre_hook(see)
        torch.manual_seed(0)
        results.append({"losses": [run.step(), run.step()], "formats": formats, "state": run.state()})
    return results


@pytest.mark.parametrize(("world", "stage"), [(1, 3), *(pytest.param(2, s, marks=pytest.mark.slow) for s in range(4))])
def test_channels_last_images_stay_so_in_a_resnet_and_give_the_same_student(file: Path, world: int, stage: int) -> None:
    settings = [f"zero_optimization.stage={stage}", f"train_batch_size={world}"]
    for contiguous, last in run_ranks(runs_in_both_formats, world, file, settings):
        assert not any(contiguous["formats"]) and all(last["formats"])
        assert len(last["formats"]) == len(contiguous["formats"]) > 20
        (first, second), (expected, then) = last["losses"], contiguous["losses"]
        assert first == pytest.approx(expected, rel=1e-5)
        assert second == pytest.approx(then, rel=1e-3)  # AdamW's first update divides small gradients by themselves
        assert all(tensor.is_contiguous() for tensor in last["state"].values())


@pytest.mark.slow
def test_a_compiled_run_with_gradient_caching_stopped_in_the_middle_ends_with_the_same_bits(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    write_shards(tmp_path / "shards")
    settings = [
        "data.teacher=null", "data.labels=null", "classifier=null", 'loss={"contrastive": 1}', "run.trackers=[]",
        f"data.shards={tmp_path}/shards", f"run.dir={tmp_path}", "run.total_steps=4", "run.save_every=2",
        "train_batch_size=8", "train_micro_batch_size_per_gpu=4", "student.compile=true", "student.patch_dropout=0.5",
        "student.channels_last=true",
    ]  # fmt: skip
    for name, stops in (("unbroken", [[]]), ("resumed", [["--stop-after", "2"], []])):
        for stop in stops:
            words = [word for setting in [*settings, f"run.name={name}"] for word in ("--set", setting)]
            run_ranks(train_rank, 1, ["--deepspeed_config", str(file), *words, *stop], timeout_s=300)
    want, got = (tensors(tmp_path / name / "step-00000004") for name in ("unbroken", "resumed"))
    assert differing(want, got) == [] and len(want) > 50
