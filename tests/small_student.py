"""A small student in a DeepSpeed engine on forked ranks, for tests of what its settings do to an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_run import Pipeline

from megacid.config.load import load_run
from megacid.distributed.engine import Engine
from megacid.distributed.parallel import Parallel
from megacid.models.clip import StudentSpec, model_config
from megacid.models.student import Student
from megacid.training.schedule import parameter_groups

WIDTH, TOKENS, BATCH = 24, 64, 4


def run_file(folder: Path) -> Path:
    nowhere = Path("nowhere")
    return Pipeline(folder, nowhere, nowhere, nowhere).run_file("small", classifier__init="random")


def small_student(**vision: Any) -> Student:
    config = model_config("digits-student") | {"embed_dim": WIDTH}
    config["text_cfg"]["vocab_size"] = TOKENS
    config["vision_cfg"] |= {"width": 32, "layers": 2, "patch_size": 8, **vision}
    config["text_cfg"] |= {"width": 32, "layers": 2}
    torch.manual_seed(3)
    clip = open_clip.CLIP(**config, output_dict=True, nonscalar_logit_scale=True)
    return Student(clip, StudentSpec("digits-student", WIDTH, None, None, None), config)


class SmallRun:
    """An engine whose steps depend on their number alone."""

    def __init__(
        self,
        file: Path,
        settings: list[str],
        prepare: Callable[[Student], None] = lambda s: None,
        layer_decay: float = 1.0,
    ) -> None:
        self.parallel = Parallel(
            dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), dist.group.WORLD
        )
        run = load_run(file, settings, world=self.parallel.world)
        self.student, self.updates = small_student(), 0
        prepare(self.student)
        muon = run.deepspeed["optimizer"]["type"] == "Muon"
        groups = parameter_groups(self.student, 0.1, layer_decay, muon=muon)
        self.engine = Engine(self.student, groups, run, self.parallel)

    def inputs(self, step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(100 * step + self.parallel.rank)
        return torch.randn(BATCH, 3, 32, 32, generator=g), torch.randint(1, TOKENS, (BATCH, 16), generator=g)

    def backward(self) -> tuple[float, float]:
        """Loss and gradient norm of the next step, whose gradients stay in the engine."""
        loss = loss_of(self.engine(*self.inputs(self.updates), seed=self.updates))
        self.engine.backward(loss)
        return float(loss.detach()), float(self.engine.gradient_norm())

    def step(self) -> float:
        loss, _ = self.backward()
        self.engine.step(lr=1e-2, clip_scale=0.5)
        self.updates += 1
        return loss

    def state(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, as "kind/name"."""
        return {f"{kind}/{name}": t for name, tensors in self.engine.named_state() for kind, t in tensors.items()}

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        self.engine.materialise_state((3, 32, 32), 16, 1)
        self.engine.load_named_state(lambda name, kind: state[f"{kind}/{name}"], updates)
        self.updates = updates

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the forward uses. A collective under ZeRO 3."""
        for name, p in self.engine.module.named_parameters():
            with self.engine.gathered(p):
                yield name, p.detach().float().clone()


def loss_of(out: Any) -> Tensor:
    logits = out.logit_scale * out.image @ out.text.T
    return nn.functional.cross_entropy(logits, torch.arange(BATCH)) + (out.image - out.text).square().sum()
