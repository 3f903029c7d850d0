"""Providers that the head is compared with on a GPU: the products alone, eager schemes, kernels of other packages.

Legend: B samples, C classes, D width, b samples of a chunk.

A provider is a function from a `Case` to a `Call`. It raises ImportError if its package is missing and ValueError if it
does not support the case. Providers with a margin take the raw rows; the others get normalised bf16 rows with the scale
folded into x, which saves them work that ours do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.classifier_providers import SCALE, Shape
from benchmarks.published_partial_fc import PROBABILITY_FLOOR, EagerPartialFC

Block = Literal["margin", "plain"]
_SLOW_S, _OPTIMISTIC_BYTES_PER_S = 5.0, 3e12


@dataclass(frozen=True)
class Case:
    """One measured problem. x [B, D] and w [C, D]: raw rows, fp32 leaves that require a gradient; target int64 [B]."""

    shape: Shape
    margin: float  # 0: the block "plain"
    x: Tensor
    w: Tensor
    target: Tensor
    budget_bytes: int  # for the 16-bit [b, C] matrix of a chunk, ours and the tuned peers'

    @property
    def block(self) -> Block:
        return "margin" if self.margin else "plain"

    @property
    def chunk(self) -> int:
        """Samples whose 16-bit [b, C] matrix fits the budget."""
        return max(1, min(self.shape.batch, self.budget_bytes // (2 * self.shape.classes)))

    @functools.cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """bf16 leaves (SCALE x / |x|, w / |w|) for providers that neither normalise nor scale."""
        with torch.no_grad():
            x, w = F.normalize(self.x).mul_(SCALE), F.normalize(self.w)
        return tuple(t.to(torch.bfloat16).requires_grad_() for t in (x, w))  # type: ignore[return-value]


class Call(NamedTuple):
    """run() -> (loss, gradients of inputs[0] and inputs[1]), or (loss,) if `products` is 2. inputs is None if no loss
    is computed."""

    run: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, Tensor] | None
    products: int = 6  # algorithmic FLOP in units of B C D


class Provider(NamedTuple):
    make: Callable[[Case], Call]
    blocks: tuple[Block, ...]
    about: str


def loss_and_gradients(loss_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Call:
    def run() -> tuple[Tensor, ...]:
        loss = loss_of(x, w)
        return (loss.detach(), *torch.autograd.grad(loss, (x, w)))

    return Call(run, (x, w))


def _product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit factors in fp32, without rounding partial sums."""
    if a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def products(case: Case, *, backward: bool) -> Call:
    """The library's matrix products that any schedule needs, in chunks of the same budget: bf16 logits, fp32 dX, and dW
    summed in fp32."""
    x, w = (rows.detach() for rows in case.folded)
    chunk = case.chunk

    def run() -> tuple[Tensor, ...]:
        grad_x, grad_w = torch.empty(0), torch.empty(0)
        parts = []
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            matrix = part @ w.T
            if backward:
                parts.append(_product_fp32(matrix, w))
                if start == 0:
                    grad_w = _product_fp32(matrix.T, part)
                elif x.device.type == "cuda":
                    torch.addmm(grad_w, matrix.T, part, out_dtype=torch.float32, out=grad_w)
                else:
                    grad_w += _product_fp32(matrix.T, part)
            del matrix
        if not backward:
            return ()
        grad_x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return grad_x, grad_w

    return Call(run, None, 6 if backward else 2)


def published(case: Case) -> Call:
    """`EagerPartialFC` on the case's own rows, without a copy."""
    head = EagerPartialFC(case.shape.classes, case.shape.width, margin=case.margin, scale=SCALE, device="meta")
    head.weight = nn.Parameter(case.w.detach())
    return loss_and_gradients(lambda x, w: head(x, case.target), case.x, head.weight)


class _InPlaceCrossEntropy(torch.autograd.Function):
    """The published softmax on one rank with gathers in place of searches for its labels: the host never waits."""

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, target_B: Tensor) -> Tensor:
        softmax = logits_BC.sub_(logits_BC.amax(1, keepdim=True)).exp_()
        softmax.div_(softmax.sum(1, keepdim=True))
        ctx.save_for_backward(softmax, target_B)
        return -softmax.gather(1, target_B[:, None]).clamp_min(PROBABILITY_FLOOR).log().mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        softmax, target_B = ctx.saved_tensors
        softmax.scatter_add_(1, target_B[:, None], torch.full_like(softmax[:, :1], -1.0))
        return softmax.mul_(grad_loss / len(softmax)), None


def _eager_logits(x: Tensor, w: Tensor, target: Tensor, margin: float) -> Tensor:
    cos = F.linear(F.normalize(x).to(torch.bfloat16), F.normalize(w).to(torch.bfloat16)).float()
    return SCALE * cos.scatter_add(1, target[:, None], torch.full_like(cos[:, :1], -margin))


def published_sync_free(case: Case) -> Call:
    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        cos = F.linear(F.normalize(x).to(torch.bfloat16), F.normalize(w).to(torch.bfloat16)).float().clamp(-1, 1)
        cos = cos.scatter_add_(1, case.target[:, None], torch.full_like(cos[:, :1], -case.margin))
        loss: Tensor = _InPlaceCrossEntropy.apply(cos.mul_(SCALE), case.target)
        return loss

    return loss_and_gradients(loss_of, case.x, case.w)


def _eager_loss(x: Tensor, w: Tensor, target: Tensor, margin: float) -> Tensor:
    return F.cross_entropy(_eager_logits(x, w, target, margin), target)


def torch_eager(case: Case) -> Call:
    return loss_and_gradients(lambda x, w: _eager_loss(x, w, case.target, case.margin), case.x, case.w)


def torch_compile(case: Case) -> Call:
    torch.compiler.reset()  # else it silently stops compiling after a few shapes
    compiled = torch.compile(_eager_loss, dynamic=False)
    return loss_and_gradients(lambda x, w: compiled(x, w, case.target, case.margin), case.x, case.w)


def _refuse_many_chunks(case: Case, chunk: int) -> None:
    """Raises ValueError if reading w twice and updating its gradient in every chunk would take too long."""
    chunks = -(-case.shape.batch // chunk)
    seconds = chunks * 8 * case.shape.classes * case.shape.width / _OPTIMISTIC_BYTES_PER_S
    if seconds > _SLOW_S:
        raise ValueError(f"its {chunks} chunks of {chunk} samples would take about {seconds:.0f} s")


def default_chunk(shape: Shape) -> int:
    """Samples per chunk of a loss whose [b, C] buffer is as large as x [B, D]; a power of two."""
    chunks = -(-shape.classes // shape.width)
    return min(shape.batch, 1 << (-(-shape.batch // chunks) - 1).bit_length())


def torch_linear_cross_entropy(case: Case, *, tuned: bool) -> Call:
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy with options") from error
    if tuned:
        options = LinearCrossEntropyOptions(batch_chunk_size=case.chunk, chunking_method=None)
    else:
        options = LinearCrossEntropyOptions()
        _refuse_many_chunks(case, default_chunk(case.shape))
    return loss_and_gradients(lambda x, w: linear_cross_entropy(x, w, case.target, options=options), *case.folded)


def liger(case: Case, *, tuned: bool) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    options: dict[str, Any] = {}
    if tuned:
        # Its chunk is B / ceil(C / (const D)), rounded up to a power of two; round down, because the budget is a limit.
        chunk = 1 << (case.chunk.bit_length() - 1)
        const = max(1, chunk * case.shape.classes // (case.shape.batch * case.shape.width))
        options = {"chunk_mem_const": const, "accum_dtype": torch.float32}
    else:
        _refuse_many_chunks(case, default_chunk(case.shape))
    return loss_and_gradients(lambda x, w: liger_fused_linear_cross_entropy(x, w, case.target, **options), *case.folded)


def cut_cross_entropy(case: Case, *, filter_eps: str | None) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return loss_and_gradients(
        lambda x, w: linear_cross_entropy(x, w, case.target, impl="cce", filter_eps=filter_eps), *case.folded
    )


BOTH: tuple[Block, ...] = ("margin", "plain")
PEERS: dict[str, Provider] = {
    "cublas-3gemm": Provider(partial(products, backward=True), BOTH, "the three products alone, bf16"),
    "cublas-1gemm": Provider(partial(products, backward=False), BOTH, "the first product alone"),
    "eager": Provider(published, ("margin",), "the published partial-FC scheme, fp32"),
    "eager-sync-free": Provider(published_sync_free, ("margin",), "the same with bf16 products, without host waits"),
    "torch-eager": Provider(torch_eager, BOTH, "normalise, bf16 product, F.cross_entropy"),
    "torch-compile": Provider(torch_compile, BOTH, "torch.compile of torch-eager"),
    "torch-lce": Provider(partial(torch_linear_cross_entropy, tuned=False), ("plain",), "with its defaults"),
    "torch-lce-tuned": Provider(partial(torch_linear_cross_entropy, tuned=True), ("plain",), "chunks of our budget"),
    "liger": Provider(partial(liger, tuned=False), ("plain",), "liger-kernel with its defaults"),
    "liger-tuned": Provider(partial(liger, tuned=True), ("plain",), "chunks of our budget, fp32 sums"),
    "cce": Provider(partial(cut_cross_entropy, filter_eps="high"), ("plain",), "with its default filter"),
    "cce-unfiltered": Provider(partial(cut_cross_entropy, filter_eps=None), ("plain",), "without its filter"),
}
