"""Counts the collectives of a block of code, at the point where torch hands them to the backend."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "reduce_scatter",  # gloo: the ranks exchange parts and each adds its own
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}


class Call(NamedTuple):
    """One collective. size: bytes of its larger buffer, that is of the gathered, scattered or reduced tensor."""

    kind: str
    size: int


class CollectiveCounter(TorchDispatchMode):
    """Records every c10d operator that this thread calls inside the `with` block, DeepSpeed's included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            sizes = [sum(x.nbytes for x in tree_leaves(part) if isinstance(x, Tensor)) for part in args]
            self.calls.append(Call(KINDS[name.partition(".")[0]], max(sizes)))
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (number, bytes)."""
        number, size = Counter[str](), Counter[str]()
        for call in self.calls:
            number[call.kind] += 1
            size[call.kind] += call.size
        return {kind: (number[kind], size[kind]) for kind in sorted(number)}
