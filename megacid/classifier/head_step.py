"""Loss and gradients of one step of the classifier on its own rows; by option captured in a CUDA graph.

Legend: G gathered batch, D width, l labels per sample, S rows of the step.

A replayed graph is one launch, where the step itself makes tens: for small shards the host's time for them is the time
of the step. Results are the same bits. The graph owns the gradient of the rows, so that nothing of size [S, D] is
copied: it is valid until the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacid.errors import UserError
from megacid_kernels import Gradients, LossSpec, OnGradientSlab, discrimination_with_gradients

Tensors = dict[str, Any]  # tensors or None
_VARYING = ("rows", "bias")  # of few lengths, see `sampling.padded_rows`
_MAX_GRAPHS = 4  # each keeps a gradient of its rows


class StepLoss(NamedTuple):
    """The loss of one step on the rows of this rank, and its inputs, gathered over the ranks."""

    spec: LossSpec
    weight: Tensor  # fp32 [L, D]
    need_x: bool
    need_row_grad: bool
    recomputed: bool  # whether a callback takes the gradient of the rows in slabs
    tensors: Tensors  # the arguments of `compute`

    def compute(
        self,
        emb: Tensor,  # [G, D]
        target: Tensor,  # int64 [G] or [G, l]
        rows: Tensor | None,  # int64 [S] those of `weight` that are used; None: all
        teacher: Tensor | None,  # [G, D]
        bias: Tensor | None,  # [S]
        dims: Tensor | None,  # the sampled feature dimensions, which emb and teacher have
        on_grad_x: Callable[[Tensor], None] | None = None,
        on_grad_slab: OnGradientSlab | None = None,
    ) -> Gradients:
        w = self.weight
        if dims is not None:
            w = (w if rows is None else w.index_select(0, rows)).index_select(1, dims)
        return discrimination_with_gradients(
            emb, w, target, self.spec, rows=rows, teacher=teacher, bias=bias, need_x=self.need_x,
            need_w=self.need_row_grad, overwrite_w=dims is not None, gather=rows is not None and dims is None,
            on_grad_x=on_grad_x, on_grad_slab=on_grad_slab, defer_norm=dims is None and not self.recomputed,
        )  # fmt: skip


class _Captured(NamedTuple):
    inputs: Tensors
    outputs: Gradients
    replay: Callable[[], None]


class StepGraphs:
    """Steps captured in CUDA graphs, one for each number of rows."""

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured] = {}
        self._shapes: dict[str, Any] | None = None  # of the first step
        self._pool: Any = None  # memory that all graphs share: only the latest replay's results are used
        self._latest: Gradients | None = None

    def __reduce__(self) -> Any:
        return StepGraphs, ()  # a copy captures its own

    def __call__(self, step: StepLoss, *, pending: bool) -> Gradients:
        """`step.compute` on its tensors.

        Args:
            pending: whether a gradient of an earlier step is still needed.

        Raises:
            UserError: there is one, or a tensor has another shape than in the first step.
        """
        if pending:
            raise UserError(
                "forward of the classifier before zero_grad with cuda_graph True, which has one row gradient: call "
                "zero_grad first, use one micro-batch per step, or set cuda_graph to False"
            )
        shapes: dict[str, Any] = {name: _shape(tensor) for name, tensor in step.tensors.items()}
        shapes |= {"loss": replace(step.spec, max_rows=None), "requires_grad of the embeddings": step.need_x}
        self._shapes = self._shapes or shapes
        for name, shape in shapes.items():
            if name not in _VARYING and shape != self._shapes[name]:
                raise UserError(
                    f"{name} is {shape} with cuda_graph True, expected {self._shapes[name]} as in the first step: keep "
                    "the size of the batch, its dtype and the loss, or set cuda_graph to False"
                )
        key = step.spec.max_rows, shapes["rows"], step.weight.data_ptr()
        if key not in self._captured:
            self._pool = self._pool or graph_pool(step.weight)
            if len(self._captured) == _MAX_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            inputs: Tensors = {
                name: None if tensor is None else tensor.clone() for name, tensor in step.tensors.items()
            }
            self._captured[key] = _Captured(inputs, *capture(lambda: step.compute(**inputs), self._pool))
        captured = self._captured[key]
        for name, tensor in step.tensors.items():
            if tensor is not None:
                captured.inputs[name].copy_(tensor)
        captured.replay()
        result, x, w, norm, _ = captured.outputs
        # The caller may keep the small ones longer.
        result = type(result)(*(part.clone() for part in result))
        norm = None if norm is None else norm._replace(version=step.weight._version)
        self._latest = Gradients(result, None if x is None else x.clone(), w, norm)
        return self._latest

    def check_latest(self, gradients: Gradients) -> None:
        """Raise UserError unless these are the gradients of the latest step."""
        if gradients is not self._latest:
            raise UserError(
                "backward of a loss of the classifier after its next forward with cuda_graph True, expected before: "
                "call backward first, or set cuda_graph to False"
            )


def _shape(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (*tensor.shape, tensor.dtype)


def graph_pool(weight: Tensor) -> Any:
    """Memory for `capture`. UserError where there are no CUDA graphs."""
    if weight.device.type != "cuda":
        raise UserError(f"cuda_graph is True on {weight.device}, expected a CUDA device: set it to False")
    return torch.cuda.graph_pool_handle()


def capture(function: Callable[[], Gradients], pool: Any) -> tuple[Gradients, Callable[[], None]]:
    """(outputs, replay): replay computes them again, in place, from the present values of the function's inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles the kernels and makes cuBLAS allocate its workspace
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, go on using the device.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        outputs = function()
    return outputs, graph.replay
