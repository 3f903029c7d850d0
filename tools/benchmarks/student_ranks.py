"""One rank of suite student: builds every trainer in one process group and measures its steps in turns.

    python -m benchmarks.student_ranks REQUEST

with the launcher's environment variables. Every rank prints the answer as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip_train import train as open_clip_train
from open_clip_train.scheduler import const_lr
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.accumulation import RUN_FILE, TOKENS, Timeless
from benchmarks.ranks import Steps, take_turns
from megacid import train
from megacid.config.load import load_run
from megacid.data.batch import Batch
from megacid.distributed.collectives import all_reduce_sum
from megacid.distributed.parallel import Parallel, init, shutdown
from megacid.models.clip import PixelNormalization
from megacid.models.student import Student, build_student, open_clip_tensors
from megacid.training.components import Components, make_objective, make_student
from megacid.training.evaluation import Evaluation
from megacid.training.open_data import Data
from megacid.training.schedule import parameter_groups
from megacid.training.state import with_engine

RATE, DECAY, BETAS, EPS, CLIP, STEPS, SEED = 1e-3, 0.1, (0.9, 0.98), 1e-6, 1.0, 1 << 20, 0
BATCHES = 4


def batches_of(size: int, student: Student, rank: int) -> list[Batch]:
    """Random uint8 images and texts of one rank."""
    g = torch.Generator().manual_seed(SEED + rank)
    return [
        Batch(
            image=torch.randint(256, (size, *student.image_shape), dtype=torch.uint8, generator=g),
            text=torch.randint(1, TOKENS, (size, student.text_length), generator=g),
            label=None,
            teacher_image=None,
            teacher_text=None,
            sample_id=torch.arange(size),
        )
        for _ in range(BATCHES)
    ]


def settings_of(request: dict[str, Any], world: int, stage: int) -> list[str]:
    """The run file's settings: the contrastive term alone, a constant learning rate, no warm-up."""
    values = {
        "train_batch_size": request["batch"] * world,
        "gradient_clipping": CLIP,
        "zero_optimization.stage": stage,
        "optimizer.params": {"lr": RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY},
        "run.total_steps": STEPS,
        "student.model": request["model"],
        "student.image_size": request["image_size"],
        "data.teacher": None,
        "data.labels": None,
        "loss": {"contrastive": 1.0, "instance": 0.0, "cluster": 0.0},
        "classifier": None,
        "schedule": {"kind": "constant", "warmup_steps": 1},
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def megacid_steps(stage: int, request: dict[str, Any], parallel: Parallel) -> Steps:
    """The trainer's own steps, from the next batch to the update."""
    run = load_run(RUN_FILE, settings_of(request, parallel.world, stage), world=parallel.world)
    normalize = PixelNormalization(run.megacid.student, parallel.device)
    data = Data(stream=lambda start: iter(()), normalize=normalize)  # type: ignore[arg-type,return-value]
    student = make_student(run, data)
    assert isinstance(student, Student)
    run = run.with_embed_dim(student.embed_dim)
    batches = itertools.cycle(batches_of(request["batch"], student, parallel.rank))
    objective, evaluation = make_objective(run, None, parallel), Evaluation(run, [], student, parallel)
    state = with_engine(Components(run, data, student, None, None, objective, evaluation), parallel)
    numbers, stand_in = itertools.count(), Timeless()

    def steps(count: int) -> float:
        for step in itertools.islice(numbers, count):
            output, _ = train.train_step(step, state, batches, stand_in, lambda phase: None, stand_in)  # type: ignore[arg-type]
            train.check_replicas(step, state, lambda phase: None)
        return float(output.loss)

    return steps


class FloatBatches:
    """The same batches as normalised float32 images, in the form of open_clip_train's data."""

    def __init__(self, request: dict[str, Any], student: Student, rank: int) -> None:
        normalize = PixelNormalization(student, torch.device("cpu"))
        size = request["batch"]
        pairs = [(normalize(batch.image), batch.text) for batch in batches_of(size, student, rank)]
        self._pairs = itertools.cycle(pairs)
        self.num_batches, self.num_samples = 0, size

    dataloader = property(lambda self: self)

    def set_epoch(self, epoch: int) -> None:
        """Batches do not depend on it."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.num_samples *= self.num_batches
        return itertools.islice(self._pairs, self.num_batches)


def peer(request: dict[str, Any], parallel: Parallel) -> tuple[nn.Module, nn.Module, Any, FloatBatches]:
    """(model, loss, optimizer, batches) as open_clip_train's main builds them."""
    student = build_student(request["model"], embed_dim=None, image_size=request["image_size"], seed=SEED)
    name, size = request["model"], request["image_size"]
    model = open_clip.create_model(name, force_image_size=size, output_dict=True)
    model.load_state_dict(open_clip_tensors(student))
    groups = parameter_groups(model, DECAY)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
    loss = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=parallel.rank, world_size=parallel.world
    )
    batches = FloatBatches(request, student, parallel.rank)
    return DistributedDataParallel(model) if parallel.world > 1 else model, loss, optimizer, batches


class _Recorded(nn.Module):
    """A loss that keeps its last value."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.last = loss, torch.zeros(())

    def forward(self, *args: Any, **options: Any) -> Any:
        values = self.loss(*args, **options)
        self.last = values["contrastive_loss"].detach()
        return values


def open_clip_steps(request: dict[str, Any], parallel: Parallel) -> Steps:
    """open_clip_train.train.train_one_epoch, with an epoch of as many batches as there are steps."""
    model, loss, optimizer, batches = peer(request, parallel)
    args = Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, horovod=False,
        grad_clip_norm=CLIP, log_every_n_steps=STEPS, world_size=parallel.world, rank=parallel.rank,
        batch_size=request["batch"], wandb=False, distributed=parallel.world > 1, local_rank=parallel.rank,
        log_local=False,
    )  # fmt: skip
    recorded = _Recorded(loss)
    scheduler = const_lr(optimizer, RATE, 1, STEPS)

    def steps(count: int) -> float:
        batches.num_batches, batches.num_samples = count, request["batch"]
        open_clip_train.train_one_epoch(model, {"train": batches}, recorded, 0, optimizer, None, scheduler, None, args)
        return float(recorded.last)

    return steps


def bare_steps(request: dict[str, Any], parallel: Parallel) -> Steps:
    """The shortest loop of plain PyTorch: no schedule, no clamp, no check of the loss."""
    model, loss, optimizer, batches = peer(request, parallel)

    def steps(count: int) -> float:
        batches.num_batches = count
        for images, texts in batches:
            optimizer.zero_grad()
            value = loss(**model(images, texts))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        return float(value.detach())

    return steps


PEER = "open_clip_train"
TRAINERS: dict[str, Callable[[dict[str, Any], Parallel], Steps]] = {
    PEER: open_clip_steps,
    "bare loop": bare_steps,
    "megacid ZeRO-0": partial(megacid_steps, 0),
    "megacid ZeRO-1": partial(megacid_steps, 1),
}


def count_operators(steps: Steps) -> dict[str, float]:
    """Operators that one step calls, and MiB that it allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        steps(1)
    events = [event for event in record.events() if event.name.startswith("aten::")]
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    return {"operators": float(len(events)), "allocated_mib": allocated / 2**20}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the trainers and measure. {trainer: its first losses, wall seconds of a step, CPU seconds of all ranks}."""
    torch.set_num_threads(request["threads"])
    parallel = init(always=True)
    try:
        trainers = {name: TRAINERS[name](request, parallel) for name in request["trainers"]}
        rows: dict[str, dict[str, Any]] = {name: {} for name in trainers}
        for name, steps in trainers.items():
            losses = torch.tensor([steps(1) for _ in range(BATCHES)], dtype=torch.float64)
            rows[name]["losses"] = (all_reduce_sum(losses, parallel.group) / parallel.world).tolist()
            rows[name] |= count_operators(steps)
        for name, times in take_turns(trainers, request["rounds"], request["repeats"], parallel).items():
            rows[name] |= times
    finally:
        shutdown()
    return rows


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
