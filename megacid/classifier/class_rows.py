"""This rank's class rows: weight, row gradient, and their state by global class id.

Legend: D width, C classes, L local classes, S rows used in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacid.classifier import misuse
from megacid.classifier.initialization import Init, load_rows, random_rows
from megacid.classifier.row_gradient import OnRowGradient, RowGradient
from megacid.classifier.row_state import ReadRows, copy_rows, gather_state, reader_of, rows_of_rank
from megacid.distributed.collectives import rank, world_size
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError


class ClassRows(nn.Module):
    """Base of `PartialFC`: the rows of one rank and everything about them that is not the loss.

    `state_dict` has the rows of this rank. `load_state_dict` takes them back, or its own part of the rows of all
    classes, for example from `full_state`.
    """

    _STEP_STATE: tuple[str, ...] = ("_row_grad",)  # left out of copies

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        group: dist.ProcessGroup | None,
        seed: int,
        init: Init | None,
        device: torch.device | str | None,
    ):
        super().__init__()
        self.num_classes, self.embed_dim, self.group, self.seed = num_classes, embed_dim, group, seed
        self.class_start, self.class_stop = shard_range(num_classes, rank(group), world_size(group))
        self.num_local = self.class_stop - self.class_start
        if init is None:
            rows = random_rows(self.class_start, self.class_stop, embed_dim, seed)
        else:
            # A copy: training must not write into the caller's array.
            rows = load_rows(init, self.class_start, self.class_stop, (num_classes, embed_dim)).clone()
        self.weight = nn.Parameter(rows.to(device, torch.float32), requires_grad=False)
        self.weight.class_rows = True  # type: ignore[attr-defined]  # for `misuse.refuse_wrappers`
        self.hits: Tensor
        self.register_buffer("hits", torch.zeros(self.num_local, dtype=torch.int32, device=device))
        self.trainable = True
        self.rows_unread = True  # no row optimizer and no caller has read the row gradient yet
        self._row_grad: RowGradient | None = None

    # ---- as a module ----

    def __setattr__(self, name: str, value: Any) -> None:
        misuse.refuse_sharded(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassRows:
        """`nn.Module.to` and its kind: moves the rows and keeps their dtype."""
        super()._apply(misuse.keep_dtype(fn), recurse)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ClassRows:
        """Train the rows (True, the default of a new head) or freeze them: frozen rows get no row gradient."""
        self.trainable = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassRows:
        """A copy that shares the process group, which cannot be copied, and has no row gradient."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if self.group is not None:
            memo[id(self.group)] = self.group
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self._lasting_state().items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise UserError("a PartialFC with a process group cannot be pickled: save state_rows() or full_state()")
        return self._lasting_state()

    def _lasting_state(self) -> dict[str, Any]:
        return self.__dict__ | dict.fromkeys(self._STEP_STATE)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP reads this name of the module that it wraps.
        raise UserError(misuse.WRAPPED.format("DistributedDataParallel"))

    # ---- gradient ----

    def row_grad(self) -> tuple[Tensor, Tensor]:
        """Row gradient summed over the backwards since `zero_grad`, exact: without a factor of the number of ranks.

        With weight_grad "recomputed" this call assembles the matrix; `for_each_row_grad` avoids that.

        Returns:
            Local row ids int64 [S], sorted and unique, and d loss / d weight[rows] fp32 [S, D]; S is 0 before the first
            backward.
        """
        self.rows_unread = False
        if self._row_grad is None:
            none = torch.empty(0, dtype=torch.int64, device=self.weight.device)
            return none, self.weight.new_empty(0, self.embed_dim)
        return self._row_grad.rows, self._row_grad.matrix()

    def sparse_row_grad(self) -> Tensor | None:
        """`row_grad` as a sparse tensor [L, D] whose values may be changed in place; None before the first backward.

        With weight_grad "recomputed" the gradient is stored from this call on.
        """
        self.rows_unread = False
        if self._row_grad is None:
            return None
        self._row_grad = self._row_grad.stored()
        return self._row_grad.sparse(self.num_local)

    def for_each_row_grad(self, update: OnRowGradient) -> None:
        """Call update(rows, gradient) for parts that cover `row_grad`: its slabs if recomputed, else all rows at once.

        `update` may change the weight of its rows.
        """
        self.rows_unread = False
        if self._row_grad is not None:
            self._row_grad.for_each_part(update)

    def grad_norm_sq(self) -> Tensor:
        """Squared norm of this rank's row gradient, 0-d fp32. The classifier's is the sum over ranks."""
        return self.weight.new_zeros(()) if self._row_grad is None else self._row_grad.norm_sq()

    def scale_row_grad_(self, factor: Tensor) -> None:
        """Multiply the row gradient by a 0-d factor, in place."""
        if self._row_grad is not None:
            self._row_grad.scale_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the row gradient."""
        super().zero_grad(set_to_none)
        self._row_grad = None

    # ---- state by global class id ----

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's rows for a checkpoint: {"weight": fp32 [L, D], "hits": int32 [L]}."""
        return {"weight": self.weight.detach(), "hits": self.hits}

    def load_state_rows(self, read: ReadRows) -> None:
        """Load this rank's rows from read(name, start, stop), written by any number of ranks."""
        copy_rows(self.state_rows(), read, self.class_start, self.class_stop)

    def full_state(self) -> dict[str, Tensor]:
        """`state_rows` of all ranks, [C, ...] on the host of every rank. A collective, for small classifiers."""
        return gather_state(self.state_rows(), self.group)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Load this rank's rows of a `full_state`. Without "hits" they start at 0."""
        fresh = {"hits": torch.zeros(self.num_classes, dtype=torch.int32)}
        self.load_state_rows(reader_of({**fresh, **state}, self.num_classes))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["class_start"] = self.class_start

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for name in self.state_rows().keys() & {key.removeprefix(prefix) for key in state_dict}:
            rows, start = state_dict[prefix + name], local_metadata.get("class_start", self.class_start)
            state_dict[prefix + name] = rows_of_rank(name, rows, start, self)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
