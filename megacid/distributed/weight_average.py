"""Exponential moving average (EMA) of the student's fp32 weights, divided over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from megacid.distributed.collectives import all_reduce_sum
from megacid.distributed.parallel import Parallel

log = logging.getLogger("megacid")

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after every update, in fp32.

    Each rank averages the part of every parameter that it owns: under ZeRO 1 to 3 the one that its optimizer updates,
    under ZeRO 0, where all ranks update everything, an equal part of the flattened parameter. So the update needs no
    communication, and the memory is 4 bytes per parameter, divided by the number of ranks.

    Args:
        parameters: name and trained parameter inside DeepSpeed's engine. The average starts with their values.
        stage: ZeRO stage of the engine.
    """

    def __init__(self, parameters: NamedParameters, decay: float, stage: int, parallel: Parallel) -> None:
        self.parameters, self.decay, self.stage, self.parallel = dict(parameters), decay, stage, parallel
        self._averages: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start again with the present weights."""
        self._averages = {name: part.detach().clone() for name, _, part in self._parts()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, after the optimizer has updated them."""
        parts = [part for *_, part in self._parts()]
        torch._foreach_lerp_(list(self._averages.values()), parts, 1.0 - self.decay)

    def whole(self, name: str) -> Tensor:
        """The average of one parameter, flattened, on its device. A collective."""
        start, part = self._part(self.parameters[name])
        result = torch.zeros(_size(self.parameters[name]), device=self.parallel.device)  # not the host of an offload
        result[start : start + part.numel()] = self._averages[name]
        return cast(Tensor, all_reduce_sum(result, self.parallel.group))

    def load(self, read: Callable[[str], Tensor]) -> None:
        """read: name -> whole average of a parameter."""
        for name, start, part in self._parts():
            self._averages[name].copy_(read(name).flatten()[start : start + part.numel()])

    def _parts(self) -> Iterator[tuple[str, int, Tensor]]:
        for name, p in self.parameters.items():
            yield name, *self._part(p)

    def _part(self, p: nn.Parameter) -> tuple[int, Tensor]:
        """The first element of this rank's part of a flattened parameter, and its fp32 values."""
        size, rank, world = _size(p), self.parallel.rank, self.parallel.world
        if self.stage in (1, 2):
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # other ranks own the whole parameter
                return 0, torch.empty(0, device=self.parallel.device)
            return mapping.lp_fragment_address.start, mapping.get_hp_fragment()
        each = -(-size // world)
        start = min(each * rank, size)
        own = p.data.flatten()[start : start + each] if self.stage == 0 else safe_get_local_fp32_param(p)
        return start, own[: max(0, min(each, size - start))]  # ZeRO 3 pads the last rank's part


def load_average(average: WeightAverage | None, read: Callable[[str], Tensor] | None) -> None:
    """Load the average of a checkpoint (`read`) into that of a run; either may have none."""
    if average is not None and read is not None:
        average.load(read)
    elif average is not None:
        log.info("the checkpoint has no EMA of the weights: it starts with the loaded weights")
        average.restart()
    elif read is not None:
        log.info("the EMA of the weights in the checkpoint is dropped, since student.ema_decay is null")


def _size(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))  # a ZeRO-3 parameter is empty while it is not gathered
