"""Providers of the classifier suites: PartialFC and the published partial-FC scheme, each with its optimizer and batch.

Legend: C classes, D width, B batch, S sampled rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import relative_error
from benchmarks.published_partial_fc import EagerPartialFC
from benchmarks.suite import interpreted
from megacid import Margin, PartialFC, RowAdamW
from megacid.errors import UserError
from megacid_kernels.loss_spec import LossSpec
from megacid_kernels.plan import Sizes, plan_chunks
from megacid_kernels.products import times, times_transposed, transposed_times
from megacid_kernels.reference import discrimination_reference

MARGIN, SCALE, SEED = 0.3, 64.0, 0
# A small learning rate keeps the geometry nearly the same in all timed steps.
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-5, (0.9, 0.98), 0.05
_MAX_ERROR, _MAX_ERROR_FP16 = 1e-4, 2.5e-3  # in fp32, and where the kernels round the factors of products to fp16
PROVIDERS = {
    "eager": "published partial-FC scheme, torch.optim.AdamW",
    "eager-tuned": "the same without a one-hot matrix, with in-place scale and fused AdamW",
    "megacid": "PartialFC, RowAdamW",
}
PRODUCTS = "3gemm"  # the fourth provider of the suite head on a CPU
GRAPH = "megacid-graph"  # that of the suite step on a GPU


@dataclass(frozen=True)
class Shape:
    classes: int
    width: int
    batch: int
    rate: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Shape:
        try:
            classes, width, batch, rate = text.split(",")
            shape = cls(int(classes), int(width), int(batch), float(rate))
            if min(shape.classes, shape.width, shape.batch) < 1 or not 0 < shape.rate <= 1:
                raise ValueError
        except ValueError:
            expected = "classes,width,batch,rate (numbers above 0, rate at most 1), for example 131072,256,256,1"
            raise UserError(f"shape is {text!r}, expected {expected}") from None
        return shape

    @property
    def rows(self) -> int:
        return self.classes if self.rate == 1 else min(self.classes, max(round(self.rate * self.classes), self.batch))

    @property
    def option(self) -> str:
        """The shape as an argument of the command line."""
        return f"{self.classes},{self.width},{self.batch},{self.rate!r}"

    def __str__(self) -> str:
        return f"{self.classes:,} x {self.width}, batch {self.batch}, {self.rows:,} rows"


class Provider:
    """One classifier, its optimizer (or none) and one batch."""

    def __init__(self, name: str, shape: Shape, weight: Tensor, device: torch.device, *, train: bool):
        self.head: EagerPartialFC | PartialFC
        self.optimizer: torch.optim.AdamW | RowAdamW | None = None
        options: dict[str, Any] = {"sample_rate": shape.rate, "scale": SCALE, "init": weight, "device": device}
        adam: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
        if name in ("megacid", GRAPH):
            options |= {"impl": implementation(), "static_shapes": name == GRAPH, "cuda_graph": name == GRAPH}
            self.head = PartialFC(shape.classes, shape.width, margin=Margin.cosface(MARGIN), seed=SEED, **options)
            if train:
                self.optimizer = RowAdamW(self.head, **adam)
                # Zeroed pages are not resident until written; a row's first update must not count as extra memory.
                for state in self.optimizer.state_rows().values():
                    state.zero_()
        else:
            tuned = name == "eager-tuned"
            self.head = EagerPartialFC(shape.classes, shape.width, margin=MARGIN, tuned=tuned, **options)
            if train:
                self.optimizer = torch.optim.AdamW(self.head.parameters(), fused=tuned or None, **adam)
        generator = torch.Generator().manual_seed(SEED + 1)
        self.target = torch.randint(shape.classes, (shape.batch,), generator=generator)
        # Cosine 0.6 to the label's class and chance level to the others, as during training.
        noise = torch.randn(shape.batch, shape.width, generator=generator) / shape.width**0.5
        emb = 0.6 * torch.nn.functional.normalize(weight[self.target].float()) + 0.8 * noise
        self.emb, self.target = emb.to(device).requires_grad_(), self.target.to(device)

    def backward(self, step: int) -> Tensor:
        if isinstance(self.head, PartialFC):
            self.head.set_step(step)
        loss: Tensor = self.head(self.emb, self.target)
        loss.backward()
        return loss.detach()

    def row_grad(self) -> tuple[Tensor, Tensor]:
        """(ids of the classes used [S], their gradient [S, D])."""
        if isinstance(self.head, PartialFC):
            return self.head.row_grad()
        assert self.head.weight.grad is not None
        rows = self.head.weight.grad.any(1).nonzero()[:, 0]
        return rows, self.head.weight.grad[rows]

    def run(self, step: int) -> Tensor:
        """The measured step. Gradients are dropped at the end, as a training loop does before its next backward."""
        loss = self.backward(step)
        if self.optimizer is not None:
            self.optimizer.step()
        self.head.zero_grad()
        self.emb.grad = None
        return loss


class Products:
    """The three products of PartialFC's chunks alone, on a CPU: cosines, gradients of embeddings and of class rows."""

    def __init__(self, shape: Shape, weight: Tensor):
        self.x = torch.randn(shape.batch, shape.width, generator=torch.Generator().manual_seed(SEED + 1))
        self.weight = weight[: shape.rows]
        sizes = Sizes(shape.batch, shape.rows, shape.width, gather=shape.rate < 1)
        self.chunks = plan_chunks(LossSpec(shape.classes), sizes, "torch", "cpu").chunks

    def compute(self) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the weight if the gradient of the cosines were the cosines."""
        grad_x, grad_w = torch.empty_like(self.x), torch.empty_like(self.weight)
        for part in self.chunks:
            x = self.x[part]
            cosines = times_transposed(x, self.weight)
            grad_x[part] = times(cosines, self.weight)
            transposed_times(cosines, x, out=grad_w, add=part is not self.chunks[0])
        return grad_x, grad_w

    def run(self, step: int) -> None:
        self.compute()


def make_provider(name: str, shape: Shape, weight: Tensor, device: torch.device, *, train: bool) -> Provider | Products:
    if name == PRODUCTS:
        return Products(shape, weight)
    return Provider(name, shape, weight, device, train=train)


def implementation() -> str:
    """PartialFC's implementation: the one that its device has, the kernels where they are interpreted."""
    return "triton" if interpreted() else "auto"


def class_rows(shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """In the host's memory, which a device has not twice; drawn on `device`, in blocks."""
    generator, rows = torch.Generator(device).manual_seed(SEED), torch.empty(shape.classes, shape.width)
    for part in rows.split(1 << 20):
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(0.01))
    return rows


def check_accuracy(names: list[str], device: torch.device) -> None:
    """Raises UserError unless loss and gradients, with and without sampling, agree with float64 on the rows used."""
    for name, rate in itertools.product(names, (1.0, 0.5)):
        shape = Shape(1000, 48, 60, rate)
        weight = class_rows(shape, device)
        got = Provider(name, shape, weight, device, train=False)
        loss, (rows, row_grad) = got.backward(0), got.row_grad()
        x, w = (t.detach().cpu().double().requires_grad_() for t in (got.emb, weight[rows.cpu()]))
        slot = torch.searchsorted(rows.cpu(), got.target.cpu())
        want, _ = discrimination_reference(x, w, slot, margin=Margin.cosface(MARGIN), scale=SCALE)
        want.backward()
        fused = isinstance(got.head, PartialFC) and got.head.fused
        most = _MAX_ERROR_FP16 if fused else _MAX_ERROR
        values, references = (loss, got.emb.grad, row_grad), (want.detach(), x.grad, w.grad)
        for what, value, exact in zip(("loss", "embedding gradient", "weight gradient"), values, references):
            assert value is not None and exact is not None
            error = relative_error(value, exact)
            if not error < most or len(rows) < 0.98 * shape.rows:
                raise UserError(
                    f"the {what} of {name} on {len(rows)} rows differs from float64 by {error:.1e} of its norm, "
                    f"expected < {most:g} on at least {shape.rows} rows: run the tests in tests/kernels"
                )
