"""Faults as data: what happens at which probe, on which rank, at which step, the how-manieth time.

    FaultPlan(kill("store:after_fsync", rank=1, step=4)).install(rank)

installs the faults of one rank in this process; `to_json` and `from_json` carry a plan to a process that a real
launcher starts (`tests/faults/planned.py`). Everything is deterministic: a fault fires at the n-th matching visit.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megacid import probes


@dataclass(frozen=True)
class Fault:
    """at: a probe of megacid/probes.py. do: a key of ACTIONS. rank, step: None for any. nth: the visit that counts, from 1.
    value: seconds of a sleep, number of a signal or of an errno."""

    at: str
    do: str
    rank: int | None = None
    step: int | None = None
    nth: int = 1
    value: float = 0.0


def kill(at: str, **where: Any) -> Fault:
    return Fault(at, "kill", **where)


def _poison_batch(facts: dict[str, Any], value: float) -> None:
    facts["batch"].image.fill_(float("nan"))


def _scale_batch(facts: dict[str, Any], value: float) -> None:
    facts["batch"].image.mul_(value)


def _poison_rows(facts: dict[str, Any], value: float) -> None:
    _, grad = facts["head"].row_grad()
    grad[0, 0] = float("nan")


def _perturb_student(facts: dict[str, Any], value: float) -> None:
    next(iter(facts["engine"].module.parameters())).data.view(-1)[0] += value


def _signal(facts: dict[str, Any], value: float) -> None:
    os.kill(os.getpid(), int(value))


def _os_error(facts: dict[str, Any], value: float) -> None:
    raise OSError(int(value) or errno.ENOSPC, os.strerror(int(value) or errno.ENOSPC))


ACTIONS: dict[str, Callable[[dict[str, Any], float], None]] = {
    "kill": lambda facts, value: os.kill(os.getpid(), signal.SIGKILL),
    "signal": _signal,
    "sleep": lambda facts, value: time.sleep(value),
    "os_error": _os_error,
    "nan_batch": _poison_batch,
    "scale_batch": _scale_batch,
    "nan_rows": _poison_rows,
    "perturb_student": _perturb_student,
}


class FaultPlan:
    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self._visits = [0] * len(faults)

    def install(self, rank: int) -> None:
        """Hook this process into the probes that the plan names for this rank."""
        for name in {fault.at for fault in self.faults}:
            probes.hooks[name] = lambda name=name, **facts: self._visit(name, rank, facts)

    @staticmethod
    def remove() -> None:
        probes.hooks.clear()

    def _visit(self, name: str, rank: int, facts: dict[str, Any]) -> None:
        for i, fault in enumerate(self.faults):
            if fault.at != name or fault.rank not in (None, rank) or fault.step not in (None, facts.get("step")):
                continue
            self._visits[i] += 1
            if self._visits[i] == fault.nth or fault.nth == 0:  # 0: every time
                ACTIONS[fault.do](facts, fault.value)

    def to_json(self) -> str:
        return json.dumps([asdict(fault) for fault in self.faults])

    @classmethod
    def from_json(cls, text: str) -> FaultPlan:
        return cls(*(Fault(**fault) for fault in json.loads(text)))
