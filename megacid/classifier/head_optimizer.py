"""A `torch.optim.Optimizer` of one classifier: its parameter, hyper-parameters and state dict.

Legend: C classes, L local classes, D width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_state import ReadRows, gather_state, reader_of, rows_of_rank
from megacid.errors import UserError


class RowParameter(nn.Parameter):
    """The class rows as their optimizer's parameter. Its `grad` is the row gradient, a sparse tensor [L, D].

    It shares the memory of `head.weight`, whose own `grad` stays None: tools that walk over the parameters of a model,
    such as clip_grad_norm_ and other optimizers, would treat the gradient of one shard like a replicated one.
    """

    head: PartialFC

    @staticmethod
    def of(head: PartialFC) -> RowParameter:
        """The parameter of `head`'s rows."""
        rows = torch.Tensor._make_subclass(RowParameter, head.weight.detach(), False)
        rows.head = head
        return rows

    @property
    def grad(self) -> Tensor | None:
        """`head.sparse_row_grad()`. None discards it."""
        return self.head.sparse_row_grad()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self.head.zero_grad()
        elif value is not self.grad:
            raise UserError("the gradient of class rows comes from the head's backward: change its values in place")

    def __deepcopy__(self, memo: dict[int, Any]) -> RowParameter:
        twin = memo[id(self)] = RowParameter.of(copy.deepcopy(self.head, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return RowParameter.of, (self.head,)


class HeadOptimizer(torch.optim.Optimizer):
    """Base of the row optimizers: one group with one parameter, the rows of `head`.

    The hyper-parameters are read from the group at each step, so schedulers apply.
    """

    _OWN: tuple[str, ...] = ("head",)  # attributes that a copy needs besides those of torch's class

    def __init__(self, head: PartialFC, defaults: dict[str, Any]):
        self.head = head
        super().__init__([RowParameter.of(head)], defaults)
        self.check_group(self.group)
        head.rows_unread = False

    @property
    def group(self) -> dict[str, Any]:
        """The only parameter group."""
        return self.param_groups[0]

    @property
    def rows_state(self) -> dict[str, Tensor]:
        """The state of the rows on this rank, name -> [L, ...]."""
        return self.state[self.group["params"][0]]

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise UserError for a hyper-parameter out of range."""
        raise NotImplementedError

    def follow_head(self) -> None:
        """Share the memory of the head's present weight. Raise UserError if it is on another device than the state."""
        rows, weight = self.group["params"][0], self.head.weight
        if rows.device != weight.device:
            raise UserError(
                f"the head is on {weight.device}, its {type(self).__name__} on {rows.device}, expected one device: "
                "move the head before you make its optimizer"
            )
        if rows.data_ptr() != weight.data_ptr():  # for example after load_state_dict(assign=True)
            rows.data = weight.data

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: an optimizer of class rows has the rows of one head."""
        if self.param_groups:
            raise UserError(
                f"{type(self).__name__} trains the rows of one PartialFC, expected no other parameter group: use a "
                "torch.optim optimizer for other parameters, and one row optimizer per head"
            )
        # torch's method would import torch._dynamo, which takes seconds, to check what is known here.
        self.param_groups.append({**param_group, **self.defaults})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the row gradient; a row without one is not updated, whatever `set_to_none` is."""
        self.head.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._OWN}}

    def state_rows(self) -> dict[str, Tensor]:
        """This rank's state for a checkpoint, name -> [L, ...]."""
        raise NotImplementedError

    def load_state_rows(self, read: ReadRows) -> None:
        """Load this rank's rows from read(name, start, stop)."""
        raise NotImplementedError

    def full_state(self) -> dict[str, Tensor]:
        """`state_rows` of all ranks: name -> [C, ...] on the host, on every rank. A collective."""
        return gather_state(self.state_rows(), self.head.group)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Load this rank's rows of a `full_state`. Raises UserError as `load_state_rows`."""
        self.load_state_rows(reader_of(state, self.head.num_classes))

    def state_dict(self) -> dict[str, Any]:
        """torch's layout: `state_rows`, the first class of this rank and the step of the draw, hyper-parameters."""
        packed = super().state_dict()
        place = {"class_start": self.head.class_start, "step": getattr(self.head, "step", 0)}
        return {**packed, "state": {0: {**self.state_rows(), **place}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this rank's classes, or its own rows from one of all classes, saved by one process.

        The next batch draws the classes of the saved step.

        Raises:
            UserError: a state of another optimizer, other classes, size or `lazy`; nothing was changed.
        """
        try:
            (group,), (saved,) = state_dict["param_groups"], state_dict["state"].values()
            group, start = {**self.group, **group, "params": [0]}, int(saved.get("class_start", 0))
            step = int(saved.get("step", 0))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"expected a state_dict of {type(self).__name__}, with one group and the state of one parameter"
            ) from None
        self.check_group(group)
        tensors = {name: rows for name, rows in saved.items() if isinstance(rows, Tensor) and rows.ndim}
        own = {name: rows_of_rank(name, rows, start, self.head) for name, rows in tensors.items()}
        self.load_state_rows(reader_of(own, self.head.num_local, first=self.head.class_start))
        state = self.state
        super().load_state_dict({"state": {}, "param_groups": [group]})  # hyper-parameters and torch's hooks
        self.state = state
        if "step" in saved:
            self.head.set_step(step)


def check_number(group: dict[str, Any], name: str, expected: str, low: float = 0.0, high: float = math.inf) -> None:
    """Make group[name] a float, and raise UserError unless it is in [low, high)."""
    try:
        value = float(group[name])
    except (TypeError, ValueError):
        value = math.nan
    if not low <= value < high:
        raise UserError(f"classifier {name} is {group[name]}, expected {expected}")
    group[name] = value
