"""Loss and gradients of a step do not depend on how the batch is divided into micro-batches, ranks and ZeRO parts."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from harness import run_ranks
from torch import Tensor, nn
from train_run import Pipeline

from megacid import failpoints, train
from megacid.config.load import load_run
from megacid.data.batch import Batch, Positions
from megacid.distributed.engine import Engine
from megacid.distributed.parallel import Parallel
from megacid.models.clip import StudentSpec, model_config
from megacid.models.freezing import frozen_parameters
from megacid.models.student import SIGLIP_LOGITS, Student
from megacid.training.components import Components, make_classifier, make_objective
from megacid.training.evaluation import Evaluation
from megacid.training.memory import _batch
from megacid.training.open_data import Data
from megacid.training.state import TrainState, with_engine

BATCH, WIDTH, CLASSES, TOKENS = 16, 24, 41, 64
CPU = torch.device("cpu")


def whole_batch(step: int) -> Batch:
    """The samples of one step; some have no label."""
    g = torch.Generator().manual_seed(step)

    def unit() -> Tensor:
        return nn.functional.normalize(torch.randn(BATCH, WIDTH, generator=g), dim=-1)

    return Batch(
        torch.randn(BATCH, 3, 32, 32, generator=g),
        torch.randint(1, TOKENS, (BATCH, 16), generator=g),
        torch.randint(-1, 9, (BATCH,), generator=g),
        unit(),
        unit(),
        torch.arange(BATCH) + step * BATCH,
    )


def micro_batches(state: TrainState, steps: int) -> Iterator[Batch]:
    run, parallel = state.run, state.parallel
    sizes = (run.global_batch, run.micro_batch, run.accumulation)
    for positions in Positions(*sizes, parallel.rank, parallel.world, 0, steps):
        batch, own = whole_batch(positions[0] // BATCH), [position % BATCH for position in positions]
        yield batch._map(lambda x, own=own: x[own].clone())


def small_student(patch_dropout: float = 0.0, head_width: int = 32, sigmoid: bool = False) -> Student:
    config = model_config("digits-student") | {"embed_dim": WIDTH} | (SIGLIP_LOGITS if sigmoid else {})
    config["vision_cfg"] |= {"patch_dropout": patch_dropout, "head_width": head_width}
    config["text_cfg"]["vocab_size"] = TOKENS
    torch.manual_seed(3)
    clip = open_clip.CLIP(**config, output_dict=True, nonscalar_logit_scale=True)
    return Student(clip, StudentSpec("digits-student", WIDTH, None, None, None), config)


def build_state(file: Path, settings: list[str], dropout: bool = False, freeze: tuple[str, ...] = ()) -> TrainState:
    parallel = Parallel(dist.get_rank(), dist.get_world_size(), dist.get_rank(), CPU, dist.group.WORLD)
    run = load_run(file, settings, world=parallel.world).with_embed_dim(WIDTH)
    # PyTorch has another attention without graph for an even number of heads.
    sigmoid = run.megacid.loss.form == "sigmoid"
    student = small_student(run.megacid.student.patch_dropout or 0.0, 48 if freeze else 32, sigmoid)
    student.clip.set_grad_checkpointing(run.megacid.student.grad_checkpointing)
    if dropout:
        for module in [m for m in student.modules() if isinstance(m, nn.Sequential) and hasattr(m, "c_proj")]:
            module.append(nn.Dropout(0.2))
    if freeze:
        student.freeze(frozen_parameters(student.clip, freeze, ("image", "text")))
        student.train()
    data = Data(stream=lambda start: None, num_classes=CLASSES if run.megacid.loss.cluster else None)  # type: ignore[arg-type,return-value]
    head, row_optimizer = make_classifier(run, data, WIDTH, parallel)
    objective, evaluation = make_objective(run, head, parallel), Evaluation(run, [], student, parallel)
    return with_engine(Components(run, data, student, head, row_optimizer, objective, evaluation), parallel)


def gradients(engine: Engine, head: Any) -> dict[str, Tensor]:
    """Of every parameter, and of the class rows of this rank by global class."""
    found = {}
    for name, p in engine.module.named_parameters():
        grad = p.grad if engine.stage == 0 else safe_get_full_grad(p)
        if grad is not None:
            found[name] = grad.detach().clone()
    if head is not None:
        rows, grad = head.row_grad()
        found["rows"] = torch.zeros(CLASSES, WIDTH).index_copy_(0, rows + head.class_start, grad)
        dist.all_reduce(found["rows"])
    return found


def train_steps(file: Path, settings: list[str], steps: int = 2) -> list[dict[str, Any]]:
    """What `train_step` computes in each step, and the number of forwards."""
    state = build_state(file, settings)
    found: list[dict[str, Any]] = []
    forwards: list[int] = []
    state.student.register_forward_hook(lambda *_: forwards.append(1))
    failpoints.hooks["train:gradients"] = lambda engine, head, **_: found.append({"gradients": gradients(engine, head)})
    batches, metrics = micro_batches(state, steps), SimpleNamespace(waited_for_data=lambda seconds: None)
    for step in range(steps):
        lifecycle = SimpleNamespace(asked_after=lambda step: False)
        output, verdict = train.train_step(step, state, batches, metrics, lambda phase: None, lifecycle)  # type: ignore[arg-type]
        assert verdict.apply
        found[-1] |= {"forwards": len(forwards), "loss": output.loss, "norm": torch.tensor(verdict.grad_norm)}
        found[-1] |= {"clip": torch.tensor(verdict.clip_scale), **output.terms}
        forwards.clear()
    return found


def assert_same(want: list[dict[str, Any]], got: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    """Every number and every gradient within `tolerance`, relative to its size."""
    for step, (one, other) in enumerate(zip(want, got, strict=True)):
        assert one.keys() == other.keys() and one["gradients"].keys() == other["gradients"].keys()
        for name in one.keys() - {"gradients", "forwards"}:
            assert abs(one[name] - other[name]) <= tolerance * abs(one[name]), (step, name, one[name], other[name])
        whole = torch.cat([grad.flatten() for grad in one["gradients"].values()]).norm()
        for name, grad in one["gradients"].items():
            assert (grad - other["gradients"][name]).norm() <= tolerance * whole, (step, name)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nowhere = Path("nowhere")
    pipeline = Pipeline(tmp_path_factory.mktemp("cache"), nowhere, nowhere, nowhere)
    return pipeline.run_file("cache", classifier__init="random", gradient_clipping=0.5)


def division(accumulation: int, stage: int) -> list[str]:
    return [f"gradient_accumulation_steps={accumulation}", f"zero_optimization.stage={stage}"]


@pytest.fixture(scope="module")
def one_batch(file: Path) -> list[dict[str, Any]]:
    (found,) = run_ranks(train_steps, 1, file, division(1, 0))
    assert found[0]["gradients"]["clip.logit_scale"].abs() > 1e-3 and found[0]["clip"] < 0.5
    return found


ALL = list(itertools.product((1, 2, 4), (1, 2, 4), (0, 1, 2, 3)))
COVERING = [(1, 4, 2), (2, 2, 0), (2, 4, 1), (4, 4, 0)]  # and 2 ranks under ZeRO 3 below


@pytest.mark.parametrize(
    ("world", "accumulation", "stage"),
    COVERING + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in COVERING],
)
def test_loss_gradients_and_clipping_are_those_of_one_batch(
    file: Path, one_batch: list[dict[str, Any]], world: int, accumulation: int, stage: int
) -> None:
    """All terms together, with sampled classes, samples without a label and the learned logit scale."""
    found = run_ranks(train_steps, world, file, division(accumulation, stage))
    for got in found:
        assert_same(one_batch, got)
    assert found[0][0]["forwards"] == 2 * accumulation - 1


NO_CLASSES = ["data.labels=null", "classifier=null"]
VARIANTS: dict[str, list[str]] = {
    "contrastive alone": ['loss={"contrastive": 1.0}', "data.teacher=null", *NO_CLASSES],
    "fixed temperature": ['loss={"contrastive": 1.0, "instance": 1.0, "temperature": 0.2}', *NO_CLASSES],
    "sigmoid form": ["loss.form=sigmoid"],
    "affinity of teacher and student": ['loss={"affinity": 1.0}', *NO_CLASSES],
    "cluster alone": ['loss={"cluster": 1.0}', "data.teacher=null"],
    "teacher's cross-entropy": ['loss={"cluster": 1.0, "alpha": 0.0, "beta": 1.0}'],
    "every class": ["classifier.sample_rate=1.0"],
    "recomputed row gradient": ["classifier.weight_grad=recomputed"],
    "features sampled, q corrected": ["classifier.feature_rate=0.5", "classifier.log_q=true"],
    "recomputed activations": ["student.grad_checkpointing=true"],
    "gradients summed over ranks": ["gradient_allreduce_op=sum"],
    "micro-batches of two samples": ["gradient_accumulation_steps=8"],
}


def both_divisions(file: Path, settings: list[str]) -> list[list[dict[str, Any]]]:
    divisions = [[*settings, *division(1, 1)], [*division(4, 1), *settings]]
    return [train_steps(file, divided, steps=1) for divided in divisions]


@pytest.mark.parametrize("case", VARIANTS)
def test_each_objective_and_option_is_that_of_one_batch(file: Path, case: str) -> None:
    (found,) = run_ranks(both_divisions, 1, file, VARIANTS[case])
    assert_same(*found)
    assert ("clip.logit_bias" in found[0][0]["gradients"]) == ("sigmoid" in case)


def test_two_ranks_with_recomputed_row_gradients_and_activations_under_zero_3(
    file: Path, one_batch: list[dict[str, Any]]
) -> None:
    settings = [*division(2, 3), "classifier.weight_grad=recomputed", "student.grad_checkpointing=true"]
    for got in run_ranks(train_steps, 2, file, settings):
        assert_same(one_batch, got)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0, 100_000])
def test_the_sigmoid_form_is_that_of_one_batch_under_zero_3(file: Path, threshold: int) -> None:
    """open_clip returns the bias itself from its forward, where ZeRO 3 partitions parameters above the threshold."""
    (expected,) = run_ranks(train_steps, 1, file, [*division(1, 0), "loss.form=sigmoid"])
    settings = [
        *division(2, 3),
        "loss.form=sigmoid",
        f"zero_optimization.stage3_param_persistence_threshold={threshold}",
    ]
    for got in run_ranks(train_steps, 2, file, settings):
        assert_same(expected, got)


def test_bf16_differs_by_its_rounding_only(file: Path) -> None:
    for precision, form in (
        ('bf16={"enabled": true}', "softmax"),
        ('torch_autocast={"enabled": true, "dtype": "bfloat16"}', "softmax"),
        ('bf16={"enabled": true}', "sigmoid"),
    ):
        (found,) = run_ranks(both_divisions, 1, file, [precision, f"loss.form={form}"])
        assert_same(*found, tolerance=2e-2)


def test_a_mean_over_samples_needs_no_second_forward(file: Path) -> None:
    (found,) = run_ranks(both_divisions, 1, file, ['loss={"mse": 1.0}', *NO_CLASSES])
    assert_same(*found)
    assert found[1][0]["forwards"] == 4


def batches_kept(file: Path, settings: list[str]) -> list[int]:
    """How many micro-batches of the step are still held when the next one is read."""
    state = build_state(file, settings)
    read: list[weakref.ref[Batch]] = []
    kept: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in micro_batches(state, 1):
            kept.append(sum(ref() is not None for ref in read))
            read.append(weakref.ref(batch))
            yield batch
            del batch

    metrics = SimpleNamespace(waited_for_data=lambda seconds: None)
    train.accumulate(0, state, batches(), metrics, lambda phase: None)  # type: ignore[arg-type]
    return kept


@pytest.mark.parametrize(("loss", "kept", "counted"), [("mse", [0, 1, 1, 1], 2), ("instance", [0, 1, 2, 3], 5)])
def test_micro_batches_stay_in_memory_only_for_a_second_forward(
    file: Path, loss: str, kept: list[int], counted: int
) -> None:
    settings = [f'loss={{"{loss}": 1.0}}', *NO_CLASSES, *division(4, 0)]
    assert run_ranks(batches_kept, 1, file, settings) == [kept]
    run = load_run(file, settings, world=1)
    a_sample = 3 * 32 * 32 + 16 * 8 + 2 * WIDTH * 4
    assert _batch(run, small_student(), "cuda", WIDTH) == counted * run.micro_batch * a_sample  # with the next one


# ---- random operations of the student ---------------------------------------------------------------------------


def dropout_gradients(file: Path, settings: list[str]) -> list[dict[str, Tensor]]:
    """Gradients of one step: by train.accumulate, and by one graph over all micro-batches."""
    found = []
    for cached in (True, False):
        state = build_state(file, settings, dropout=True)
        if cached:
            metrics = SimpleNamespace(waited_for_data=lambda seconds: None)
            train.accumulate(0, state, micro_batches(state, 1), metrics, lambda phase: None)  # type: ignore[arg-type]
        else:
            outs = [state.embed(0, micro, batch) for micro, batch in enumerate(micro_batches(state, 1))]
            whole = SimpleNamespace(
                image=torch.cat([out.image for out in outs]),
                text=torch.cat([out.text for out in outs]),
                logit_scale=outs[0].logit_scale,
            )
            state.engine.backward(state.objective(whole, whole_batch(0))[0])
        found.append(gradients(state.engine, state.head))
    return found


@pytest.mark.parametrize(("checkpointing", "patches"), [("false", "null"), ("true", "null"), ("true", "0.5")])
def test_dropout_is_replayed_exactly(file: Path, checkpointing: str, patches: str) -> None:
    settings = [*division(4, 0), f"student.grad_checkpointing={checkpointing}", f"student.patch_dropout={patches}"]
    ((cached, graph),) = run_ranks(dropout_gradients, 1, file, settings)
    assert_same([{"gradients": graph}], [{"gradients": cached}])


def frozen_forwards(file: Path) -> list[Tensor]:
    """Image embeddings of a student with a frozen block, without graph and with it."""
    state = build_state(file, [*division(1, 1), "bf16.enabled=true"], freeze=("visual.transformer.resblocks.1.*",))
    batch = whole_batch(0)
    found = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found.append(state.embed(0, 0, batch).image.detach())
    return found


def test_frozen_blocks_have_the_same_bits_in_both_forwards(file: Path) -> None:
    ((without, graph),) = run_ranks(frozen_forwards, 1, file)
    assert without.equal(graph)


def random_forwards(file: Path) -> dict[str, Tensor]:
    state = build_state(file, division(1, 0), dropout=True)
    batch, before = whole_batch(0), torch.get_rng_state()
    places = {"here": (0, 0), "again": (0, 0), "micro-batch": (0, 1), "step": (1, 0)}
    out = {name: state.embed(*place, batch).image.detach() for name, place in places.items()}
    assert torch.get_rng_state().equal(before), "the global generator has moved"
    return out


def test_random_operations_repeat_for_the_same_step_micro_batch_and_rank_only(file: Path) -> None:
    first, second = run_ranks(random_forwards, 2, file)
    assert first["here"].equal(first["again"])
    for other in (first["micro-batch"], first["step"], second["here"]):
        assert not first["here"].equal(other)
