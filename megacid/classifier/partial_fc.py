"""The class-sharded, sampled margin classifier.

Legend: B local batch, G gathered batch, D width, C classes, L local classes, S sampled rows, l labels per sample.

Ranks gather embeddings and labels, each computes the softmax terms of its own classes, one sum all-reduce combines
them, and a reduce-scatter returns the embedding gradients. The classifier stands outside the data-parallel engine: its
rows have their own gradient (`row_grad`) and optimizer (`RowAdamW`, `RowSGD`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacid.classifier import misuse
from megacid.classifier.autograd import ForwardGradients, PartialFCFunction
from megacid.classifier.batch_metrics import batch_metrics
from megacid.classifier.class_rows import ClassRows
from megacid.classifier.head_step import StepGraphs, StepLoss
from megacid.classifier.initialization import Init
from megacid.classifier.label_exchange import GatheredLabels, InputKind, LabelExchange, find_input_error, rows_of
from megacid.classifier.row_gradient import (
    RecomputedRowGradient,
    RowGradient,
    StoredRowGradient,
    add_row_gradients,
    without_padding,
)
from megacid.classifier.sampling import Draw, sample_dims
from megacid.distributed.collectives import (
    Gathered,
    GradReduction,
    gather_plain,
    gradient_factor,
    start_reduce_scatter_rows,
    world_size,
)
from megacid.distributed.consensus import gather_json
from megacid.errors import UserError
from megacid_kernels import Discrimination, LossSpec, Weights, resolve, through_norm_
from megacid_kernels.engines.dispatch import check_precision
from megacid_kernels.margin import Margin
from megacid_kernels.plan import Implementation, with_available_memory


class _Step(NamedTuple):
    """One loss: what its backward needs as well."""

    loss: StepLoss
    labels: GatheredLabels
    pending_rows: Tensor | None  # rows whose gradients this step's are added to
    scatter_x: bool  # whether the gradient of the embeddings is summed over the ranks here, not where it was gathered
    graphs: StepGraphs | None


class PartialFC(ClassRows):
    """Margin softmax over classes sharded by rank, with sampled negatives (Partial FC: An et al., CVPR 2022).

    For unit embeddings x and unit class rows w, the loss of a sample with label y is the cross entropy of the logits
    scale * cos(x, w_j) over the rows j of the step, where the target's cosine is replaced by
    cos(m1 * theta + m2) - m3 (SphereFace, ArcFace, CosFace: see `Margin`).

    The weight is not trained by autograd: after the backward of a loss, `row_grad` holds the gradient of the used rows
    and a row optimizer applies it. A step synchronises host and device once, in `LabelExchange`.

    After `eval()`, a forward uses all classes and all dimensions, counts no hits and leaves no row gradient; margin and
    filter still apply. The rows stay fp32: casts such as `half()` and `to(dtype)` are ignored with a warning, because
    updates of 16-bit rows round to nothing; embeddings may have any floating dtype. A deep copy shares the group. The
    head must stand outside of DDP, FSDP and DeepSpeed, which take the rows of the ranks for copies of one tensor.

    Args:
        num_classes: classes of all ranks together, C.
        embed_dim: width of the embeddings, D.
        sample_rate: fraction of the classes used as negatives in a step, (0, 1]; labels of the batch are always used.
            The choice depends only on (seed, step), not on the number of ranks.
        margin: margin of the target class; None is Margin.cosface(0.3).
        scale: factor of the cosines, the inverse temperature.
        group: ranks that share the classes; None is the default group, or a single process without torch.distributed.
        seed: of the initial rows and of sampling.
        init: initial rows [C, D], see `megacid.classifier.initialization.load_rows`; None draws N(0, 0.01), the same
            matrix for any number of ranks.
        margin_grad: "exact", or "straight_through", which takes d psi / d cos = 1 (as insightface's ArcFace does).
        grad_reduction: how the data-parallel engine combines the student's gradients over ranks, "mean" or "sum".
        reduction: of the loss, over the labelled samples of the global batch, "mean" or "sum".
        feature_rate: fraction of the D dimensions used in a step, (0, 1], the same on every rank (as in UNICOM); for
            D >= 32 their number is rounded to a multiple of 16.
        filter_threshold: negatives with a larger cosine to the sample are removed from its denominator (interclass
            filter, Partial FC).
        log_q: divide a drawn negative's exponential by its probability of being drawn. The denominator is then an
            unbiased estimate of the sum over all classes.
        impl: "torch", "triton", or "auto": Triton on CUDA where it can be imported, else PyTorch.
        weight_grad: "stored" keeps the [S, D] gradient until the optimizer runs. "recomputed" never stores it: forward
            computes its slabs for the norm and the optimizer computes them again, because no row may change before the
            guard's decision. A step takes 12 instead of 6 G S D FLOP, and one backward per step is allowed. "auto"
            stores it, but in Triton computes it in slabs where that is faster, by the rule of
            `megacid_kernels.plan.make_plan`.
        precision: of Triton's products: "fp16" (the default of "auto"), "bf16", "fp32"; see `megacid_kernels.LossSpec`.
        memory_budget_bytes: of the [chunk, S] matrices; None: it follows the sizes of the gradient and of the group's
            smallest GPU, see `LossSpec.chunk_budget`.
        reserved_bytes: memory of the GPU that the default budget leaves to others, such as the student's weights.
        labels_loss: of several labels per sample, "mlcd" or "mean"; see `megacid_kernels.LossSpec`.
        static_shapes: compute a step with sample_rate < 1 on one number of rows, a multiple of 512, on every rank. Rows
            beyond those that it uses have no effect but for the last bits of sums.
        cuda_graph: capture loss and gradients of training steps in CUDA graphs, for one rank. Every batch must have the
            size of the first, and one backward per step is allowed.
        device: of the weight; None is the default device.

    Attributes:
        weight: fp32 [L, D], classes class_start to class_stop - 1.
        hits: int32 [L], training samples with each class as label.
        trainable: whether a backward leaves a row gradient, see `requires_grad_`.

    Raises:
        UserError: an argument out of range, or an `init` that cannot be read or does not fit.
    """

    _STEP_STATE = ("_row_grad", "_last")

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        sample_rate: float = 1.0,
        margin: Margin | None = None,
        scale: float = 64.0,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        init: Init | None = None,
        margin_grad: Literal["exact", "straight_through"] = "exact",
        grad_reduction: GradReduction = "mean",
        reduction: Literal["mean", "sum"] = "mean",
        feature_rate: float = 1.0,
        filter_threshold: float | None = None,
        log_q: bool = False,
        impl: str = "auto",
        weight_grad: str = "auto",
        precision: str = "auto",
        memory_budget_bytes: int | None = None,
        reserved_bytes: int = 0,
        labels_loss: Literal["mlcd", "mean"] = "mlcd",
        static_shapes: bool = False,
        cuda_graph: bool = False,
        device: torch.device | str | None = None,
    ):
        misuse.refuse_wrappers(PartialFC)
        rates = {"sample_rate": sample_rate, "feature_rate": feature_rate}
        misuse.check_sizes(num_classes, embed_dim, world_size(group), rates)
        super().__init__(num_classes, embed_dim, group=group, seed=seed, init=init, device=device)
        self.sample_rate, self.feature_rate, self.log_q = sample_rate, feature_rate, log_q
        self._reserved_bytes = reserved_bytes
        with misuse.user_error():
            self._gradient_factor = gradient_factor(group, grad_reduction)
            self._spec = LossSpec(
                num_classes, scale, margin or Margin.cosface(0.3), margin_grad, filter_threshold=filter_threshold,
                class_start=self.class_start, reduction=reduction, group=group, impl=impl, weight_grad=weight_grad,
                precision=precision, memory_budget_bytes=memory_budget_bytes, labels_loss=labels_loss,
            )  # fmt: skip
            check_precision(precision, self._implementation, self.weight.device)
        self._exchange = LabelExchange(num_classes, group, static_shapes=static_shapes)
        # What must be the same on every rank, besides the input.
        self._settings: dict[str, object] = {
            "num_classes": num_classes, "embed_dim": embed_dim, **rates, "log_q": log_q, "scale": scale,
            "margin": self._spec.margin, "margin_grad": margin_grad, "filter_threshold": filter_threshold,
            "reduction": reduction, "grad_reduction": grad_reduction, "labels_loss": labels_loss,
            "weight_grad": weight_grad, "precision": precision, "memory_budget_bytes": memory_budget_bytes,
            "seed": seed if min(rates.values()) < 1 else None, "static_shapes": static_shapes,
        }  # fmt: skip
        self.step = 0
        self._finished_step: int | None = -1  # None after a warning
        self._last: tuple[Discrimination, GatheredLabels] | None = None
        if cuda_graph:
            misuse.check_graph(world_size(group), sample_rate, static_shapes, weight_grad)
        self._graphs = StepGraphs() if cuda_graph else None

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, here {self.class_start}..{self.class_stop}, width {self.embed_dim}"

    @property
    def fused(self) -> bool:
        """Whether the classifier and the row optimizers use Triton kernels."""
        return self._implementation == "triton"

    @property
    def _implementation(self) -> Implementation:
        """ "torch" or "triton". It decides how many chunks and collectives a step has."""
        return resolve(self._spec.impl, self.weight.device, torch.float32)

    def set_step(self, step: int) -> None:
        """Set the optimizer step of the next batches; every step of a row optimizer then adds 1.

        Sampling is a pure function of (seed, step): micro-batches of a step share their negatives, and a run that
        resumes with `set_step` draws the same classes. Without a row optimizer, call it in every step.
        """
        self.step = step

    def finish_step(self) -> None:
        """Move on to the next step, and warn once if this one was finished before. Row optimizers call it."""
        if min(self.sample_rate, self.feature_rate) < 1:
            self._finished_step = misuse.warn_same_step(self.step, self._finished_step)
        self.step += 1

    def forward(self, emb_BD: Tensor | Gathered, target_B: Tensor) -> Tensor:
        """Margin cross entropy over the labelled samples of the global batch. A collective.

        Args:
            emb_BD: [B, D] local embeddings, normalised or not. B may differ between ranks and may be 0. Gathered: those
                of all ranks, by rank, for a caller that has them; their gradient is then this rank's part of the sum.
            target_B: int64 [B] global class ids, -1 = unlabelled, on the host or the device. With [B, l], several
                labels per sample (-1 = none), the loss is `labels_loss`.

        Returns:
            The loss, 0-d, the same on every rank.

        Raises:
            UserError: on every rank, if the input of any rank is invalid.
        """
        return self.discriminate(emb_BD, target_B).loss

    def discriminate(
        self,
        emb_BD: Tensor | Gathered,
        target_B: Tensor,
        *,
        teacher_BD: Tensor | Gathered | None = None,
        weights: Weights | None = None,
    ) -> Discrimination:
        """Weighted sum of student cross entropy, teacher cross entropy and KL over one sample of classes. A collective.

        Args:
            emb_BD: as in `forward`.
            target_B: as in `forward`.
            teacher_BD: [B, D] stored teacher embeddings, or Gathered, needed if beta or gamma is > 0; get no gradient.
            weights: alpha, beta, gamma and the KL's temperature; None is alpha = 1 alone, the loss of `forward`.

        Raises:
            UserError: on every rank, if the input of any rank is invalid.
        """
        # torch.compile would trace collectives and kernels for minutes and gain nothing.
        run = self._discriminate_untraced if torch.compiler.is_compiling() else self._discriminate
        return run(emb_BD, target_B, teacher_BD, weights or Weights())

    def _discriminate(
        self, emb: Tensor | Gathered, target_B: Tensor, teacher: Tensor | Gathered | None, weights: Weights
    ) -> Discrimination:
        teacher = teacher if weights.needs_teacher else None
        x = rows_of(emb)
        train, need_x = (needed and torch.is_grad_enabled() for needed in (self.training, x.requires_grad))
        draw = dims = None
        if self.training and self.sample_rate < 1:
            draw = Draw.of_step(self.num_classes, self.sample_rate, seed=self.seed, step=self.step)
        pending_rows = self._row_grad.rows if train and self._row_grad is not None else None
        labels = self._gather_labels(emb, target_B, teacher, weights, draw, pending_rows)
        if self.training and self.feature_rate < 1:
            dims = sample_dims(self.embed_dim, self.feature_rate, seed=self.seed, step=self.step, device=x.device)
            x = x.index_select(1, dims)
        self._agree_on_memory()
        with misuse.user_error():
            spec = replace(self._spec, weights=weights, max_rows=labels.max_rows)
        local = not isinstance(emb, Gathered)
        tensors = {
            "emb": gather_plain(x, self.group, sizes=labels.sizes) if local else x.detach(),
            "target": labels.target_Gl if target_B.ndim == 2 else labels.target_Gl[:, 0],
            "rows": labels.computed_rows,
            "teacher": None if teacher is None else self._gather_teacher(teacher, labels, dims),
            "bias": labels.bias_of_negatives(draw if self.log_q else None, self.class_start),
            "dims": dims,
        }
        recomputed = self._spec.weight_grad == "recomputed"
        loss = StepLoss(spec, self.weight.detach(), need_x, train and self.trainable, recomputed, tensors)
        step = _Step(loss, labels, pending_rows, local, self._graphs if loss.need_row_grad else None)
        if train:
            labels.count_hits_(self.hits, self.class_start)
            misuse.warn_about_foreign_optimizers(self)
        anchor = torch.empty((), dtype=torch.float32, device=x.device, requires_grad=train)
        compute, accumulate = partial(self._compute, step), partial(self._accumulate, step)
        factor = self._gradient_factor if local else 1
        out = Discrimination(*PartialFCFunction.apply(x, anchor, compute, accumulate, factor))
        self._last = (Discrimination(*(part.detach() for part in out)), labels)
        return out

    def _agree_on_memory(self) -> None:
        """The default budget follows the smallest GPU of all ranks, because they must make equal chunks. A collective,
        once and only on GPUs."""
        sizes = self.num_local, self.embed_dim, self._reserved_bytes
        spec = with_available_memory(self._spec, self.weight.device, *sizes)
        if spec is not self._spec:
            self._spec = replace(spec, available_bytes=min(gather_json(spec.available_bytes, self.group)))

    # Like torch.compiler.disable, but imports torch._dynamo, which takes seconds, at the first call.
    _discriminate_untraced = torch._disable_dynamo(_discriminate)

    def _gather_teacher(self, teacher: Tensor | Gathered, labels: GatheredLabels, dims: Tensor | None) -> Tensor:
        rows = rows_of(teacher) if dims is None else rows_of(teacher).index_select(1, dims)
        return rows.detach() if isinstance(teacher, Gathered) else gather_plain(rows, self.group, sizes=labels.sizes)

    def _gather_labels(
        self,
        emb: Tensor | Gathered,
        target_B: Tensor,
        teacher: Tensor | Gathered | None,
        weights: Weights,
        draw: Draw | None,
        pending_rows: Tensor | None,
    ) -> GatheredLabels:
        input_error = find_input_error(emb, target_B, teacher, self.embed_dim, weights)
        if self.weight.dtype != torch.float32:
            input_error = f"the class rows are {self.weight.dtype}, expected torch.float32: do not replace head.weight"
        several = target_B.ndim == 2
        target_Bl = target_B.new_empty(0, 1).long() if input_error else target_B if several else target_B[:, None]
        samples = self.training and min(self.sample_rate, self.feature_rate) < 1
        gathered = [list(part.rows.shape) if isinstance(part, Gathered) else None for part in (emb, teacher)]
        settings = self._settings | vars(weights) | {"gathered": gathered, "impl": self._implementation}
        kind = InputKind.of(
            rows_of(emb), None if teacher is None else rows_of(teacher), training=self.training,
            step=self.step if samples else 0, settings=settings,
        )  # fmt: skip
        labels = self._exchange(target_Bl, input_error, draw, self.weight.device, pending_rows, kind, fused=self.fused)
        for part in (emb, teacher):
            if isinstance(part, Gathered) and len(part.rows) != sum(labels.sizes):
                raise UserError(
                    f"Got {len(part.rows)} gathered embeddings, expected {sum(labels.sizes)}, one for each label of "
                    "all ranks: gather them over the group of the classifier"
                )
        return labels

    def _compute(self, step: _Step) -> ForwardGradients:
        scatter: list[Callable[[], Tensor]] = []
        norm_sq = torch.zeros((), device=self.weight.device) if step.loss.recomputed else None

        # Runs during the last matrix products of the row gradient, on every rank.
        def start_scatter(grad_GD: Tensor) -> None:
            scatter.append(start_reduce_scatter_rows(grad_GD, step.labels.sizes, self.group))

        def add_norm(start: int, stop: int, grad_nD: Tensor) -> None:
            assert norm_sq is not None
            norm_sq.add_(grad_nD.square().sum())

        if step.graphs is not None:
            gradients = step.graphs(step.loss, pending=step.pending_rows is not None)
            return ForwardGradients(gradients, gradients.x, norm_sq)
        gradients = step.loss.compute(
            **step.loss.tensors, on_grad_x=start_scatter if step.scatter_x else None,
            on_grad_slab=add_norm if step.loss.recomputed else None,
        )  # fmt: skip
        return ForwardGradients(gradients, scatter[0]() if scatter else gradients.x, norm_sq)

    def _accumulate(self, step: _Step, forward: ForwardGradients, grad_loss: Tensor) -> None:
        """Add the row gradient of a loss to `row_grad`."""
        if not step.loss.need_row_grad:
            return
        if step.graphs is not None:
            step.graphs.check_latest(forward.gradients)

        def widen(grad: Tensor) -> Tensor:
            dims = step.loss.tensors["dims"]
            return grad if dims is None else grad.new_zeros(len(grad), self.embed_dim).index_copy_(1, dims, grad)

        used = step.labels.rows
        rows = torch.arange(self.num_local, device=grad_loss.device) if used is None else used
        each_slab, grad, norm = forward.gradients.each_slab, forward.gradients.w, forward.gradients.norm
        if grad is not None:
            # In place: [S, D] is the largest tensor of the step.
            norm_sq = None
            if norm is None:
                grad.mul_(grad_loss)
            else:
                norm_sq = through_norm_(grad, norm, grad_loss).sum()
            new: RowGradient = StoredRowGradient(rows, widen(grad[: len(rows)]).float(), norm_sq)
        elif each_slab is not None and forward.norm_sq is not None:
            each = without_padding(each_slab, len(rows))
            new = RecomputedRowGradient(rows, self.embed_dim, each, forward.norm_sq, grad_loss.detach(), widen)
        else:
            return
        old = self._row_grad
        # With two forwards before the first backward, the exchange did not know the rows to add to.
        known = step.labels.rows_with_pending if old is not None and step.pending_rows is old.rows else None
        self._row_grad = add_row_gradients(old, new, known, same_rows=used is None)

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last batch, see `batch_metrics`; {} before the first labels. A collective."""
        return {} if self._last is None else batch_metrics(*self._last, self.num_local, self.group)
