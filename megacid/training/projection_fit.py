"""Fits a student's projections to the teacher by least squares, before training ("student.projection_init").

With X the inputs of a tower's projection for the first n samples of the training order [n, d] and T the teacher's
embeddings of the same samples [n, D], the projection becomes argmin_W |X W - T|^2 + r |W|^2, where r is `RIDGE` times
the mean of the diagonal of X^T X. A bias is a column of ones in X without penalty.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacid.config.schema import RunFile
from megacid.data.batch import Batch, DataBudgetError, Positions
from megacid.distributed.collectives import all_reduce_sum, world_size
from megacid.distributed.consensus import fail_together, gather_json
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.models.student import Student, projections
from megacid.training.open_data import Data

log = logging.getLogger("megacid")

SAMPLES = 8192
"""Samples that the projections are fitted to, at most one epoch."""
RIDGE = 1e-3


@dataclass
class _Fit:
    """The projection of one tower and its normal equations, X^T X and X^T T in float64."""

    kind: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool  # [D, d] as in nn.Linear, else [d, D]
    xx: Tensor
    xt: Tensor

    @classmethod
    def of(cls, kind: str, clip: nn.Module, names: list[str], width: int) -> _Fit:
        """The projection among the tensors of a tower that depend on embed_dim."""
        tensors = {name: clip.get_parameter(name) for name in names}
        weights = [name for name, tensor in tensors.items() if tensor.ndim == 2]
        biases = [tensor for tensor in tensors.values() if tensor.ndim == 1]
        if len(weights) != 1 or len(biases) != len(names) - 1 or len(biases) > 1:
            raise UserError(
                f'"student.projection_init" is "teacher" but the {kind} tower ends with {", ".join(names) or "nothing"}'
                ', expected one linear projection: write "random"'
            )
        weight, bias = tensors[weights[0]], biases[0] if biases else None
        transposed = isinstance(clip.get_submodule(weights[0].rpartition(".")[0]), nn.Linear)
        inputs = weight.shape[1 if transposed else 0]
        rows = inputs + (bias is not None)
        zeros = torch.zeros(rows, rows + width, dtype=torch.float64, device=weight.device)
        return cls(kind, weight, bias, transposed, zeros[:, :rows].clone(), zeros[:, rows:].clone())

    @torch.no_grad()
    def uncover(self) -> None:
        """Make the projection the identity, so that the tower returns the projection's input."""
        inputs = self.weight.shape[1 if self.transposed else 0]
        self.weight.data = torch.eye(inputs, device=self.weight.device)
        if self.bias is not None:
            self.bias.data = torch.zeros(inputs, device=self.bias.device)

    def add(self, inputs: Tensor, targets: Tensor | None) -> None:
        if targets is None:
            raise UserError(
                f'"student.projection_init" is "teacher" but data.teacher has no {self.kind} embeddings: run '
                'tools/embed.py for them, or write "random"'
            )
        x, t = inputs.double(), targets.to(inputs.device).double()
        if self.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx += x.T @ x
        self.xt += x.T @ t

    @torch.no_grad()
    def solve(self, count: int, parallel: Parallel) -> float:
        """Sum over the ranks, solve, and set the projection. A collective. Returns the share that it explains."""
        for sums in (self.xx, self.xt):
            all_reduce_sum(sums, parallel.group)
        inputs = self.weight.shape[0]  # of the identity
        penalty = torch.zeros(len(self.xx), dtype=torch.float64, device=self.xx.device)
        penalty[:inputs] = RIDGE * self.xx.diagonal()[:inputs].mean()
        solution = torch.linalg.solve(self.xx + penalty.diag(), self.xt).contiguous()  # for NCCL
        if world_size(parallel.group) > 1:  # solvers may round differently on different machines
            dist.broadcast(solution, src=0, group=parallel.group)
        weight = solution[:inputs].to(self.weight.dtype)
        self.weight.data = (weight.T if self.transposed else weight).contiguous()
        if self.bias is not None:
            self.bias.data = solution[inputs].to(self.bias.dtype)
        residual = count - 2 * (solution * self.xt).sum() + (solution * (self.xx @ solution)).sum()
        return 1.0 - float(residual) / count


def fit_projections(student: Student, data: Data, run: RunFile, parallel: Parallel, samples: int = SAMPLES) -> None:
    """Set the projections of both towers to the least-squares fit to the teacher's embeddings. A collective.

    Every rank embeds its share of the first `samples` samples of the training order, or of one epoch if that is less.
    The result does not depend on the number of ranks, except for the rounding of float64 sums.

    Raises:
        UserError: a tower does not end with a linear projection, or the teacher has no embeddings of texts.
        DataBudgetError: too many samples cannot be read.
    """
    assert data.samples is not None
    with fail_together(parallel.group):
        names = projections(student.spec, student.model_config)
        image = sorted(name for name in names if name.startswith("visual."))
        towers = ("image", image), ("text", sorted(names - set(image)))
        fits = [_Fit.of(kind, student.clip, own, student.embed_dim) for kind, own in towers]
        count = min(samples, int(data.stream(0).statistics().get("kept", samples)))
    at_once = run.micro_batch * parallel.world
    plan = Positions(at_once, run.micro_batch, 1, parallel.rank, parallel.world, 0, -(-count // at_once))
    was_training = student.training
    student.eval()
    for fit in fits:
        fit.uncover()
    failure: str | None = None
    with fail_together(parallel.group):
        for positions, batch in zip(plan, data.samples(plan)):
            if (failure := batch.failure) is not None:
                break
            _add(fits, student.clip, data, batch.to(parallel.device), sum(p < count for p in positions))
    for reported in filter(None, gather_json(failure, parallel.group)):
        raise DataBudgetError(reported)
    explained = [fit.solve(count, parallel) for fit in fits]
    student.train(was_training)
    log.info(
        "projections fitted to the teacher's embeddings of %d samples, of which they explain %.1f %% (image) and "
        "%.1f %% (text)", count, *(100 * share for share in explained),
    )  # fmt: skip


@torch.no_grad()
def _add(fits: list[_Fit], clip: Any, data: Data, batch: Batch, used: int) -> None:
    """Add the first `used` samples of a micro-batch."""
    image, text = fits
    pixels = batch.image if data.normalize is None else data.normalize(batch.image)
    image.add(clip.encode_image(pixels)[:used], None if batch.teacher_image is None else batch.teacher_image[:used])
    text.add(clip.encode_text(batch.text)[:used], None if batch.teacher_text is None else batch.teacher_text[:used])
