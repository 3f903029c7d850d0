"""Faults as data: what happens at which failpoint, rank, step and visit.

    FaultPlan(kill("store:after_fsync", rank=1, step=4)).install(rank)

installs the faults of one rank in this process; `to_json` and `from_json` carry a plan to a process that a real
launcher starts (`tests/planned.py`). Everything is deterministic: a fault fires at the n-th matching visit.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacid import failpoints


@dataclass(frozen=True)
class Fault:
    """A fault at the nth visit (from 1; 0: every visit) of a failpoint.

    at: a name of megacid/failpoints.py. do: a key of ACTIONS. rank, step: None for any. value: seconds of a sleep,
    number of a signal or errno, factor, or difference. path: of the file of a trace.
    """

    at: str
    do: str
    rank: int | None = None
    step: int | None = None
    nth: int = 1
    value: float = 0.0
    path: str = ""


def kill(at: str, **where: Any) -> Fault:
    return Fault(at, "kill", **where)


def trace(path: Any) -> Fault:
    """No fault: what every step did, read back by `read_trace`."""
    return Fault("train:applied", "trace", nth=0, path=str(path))


def read_trace(path: Any, world: int) -> dict[int, dict[str, Any]]:
    """step -> {"ids": samples of the global batch in order of the ranks, "loss", "applied": by rank}."""
    steps: dict[int, dict[str, Any]] = {}
    for rank in range(world):
        for line in Path(f"{path}.{rank}").read_text().splitlines():
            step, ids, loss, applied = json.loads(line)
            at = steps.setdefault(step, {"ids": [], "loss": loss, "applied": []})
            at["ids"] += ids
            at["applied"].append(applied)
            assert at["loss"] == loss, "the ranks do not see the same loss"
    return steps


def _trace(facts: dict[str, Any], fault: Fault) -> None:
    import torch.distributed as dist

    verdict = facts["verdict"]
    loss = repr(verdict.loss)
    with open(f"{fault.path}.{dist.get_rank()}", "a") as file:
        file.write(json.dumps([facts["step"], facts["sample_ids"], loss, verdict.apply]) + "\n")


def _rss(facts: dict[str, Any], fault: Fault) -> None:
    from megacid.training.metrics import resident_memory_mib

    with open(fault.path, "a") as file:
        file.write(f"{resident_memory_mib()}\n")


def _poison_batch(facts: dict[str, Any], fault: Fault) -> None:
    facts["batch"].image.fill_(float("nan"))


def _scale_batch(facts: dict[str, Any], fault: Fault) -> None:
    facts["batch"].image.mul_(fault.value)


def _negate_batch(facts: dict[str, Any], fault: Fault) -> None:
    facts["batch"].image.neg_()  # as far from what was learned about it as can be


def _poison_rows(facts: dict[str, Any], fault: Fault) -> None:
    _, grad = facts["head"].row_grad()
    grad[0, 0] = float("nan")


def _perturb_student(facts: dict[str, Any], fault: Fault) -> None:
    next(iter(facts["engine"].module.parameters())).data.view(-1)[0] += fault.value


def _signal(facts: dict[str, Any], fault: Fault) -> None:
    os.kill(os.getpid(), int(fault.value))


def _os_error(facts: dict[str, Any], fault: Fault) -> None:
    raise OSError(int(fault.value) or errno.ENOSPC, os.strerror(int(fault.value) or errno.ENOSPC))


ACTIONS: dict[str, Callable[[dict[str, Any], Fault], None]] = {
    "kill": lambda facts, fault: os.kill(os.getpid(), signal.SIGKILL),
    "signal": _signal,
    "sleep": lambda facts, fault: time.sleep(fault.value),
    "os_error": _os_error,
    "nan_batch": _poison_batch,
    "scale_batch": _scale_batch,
    "nan_rows": _poison_rows,
    "perturb_student": _perturb_student,
    "negate_batch": _negate_batch,
    "trace": _trace,
    "rss": _rss,
    "touch": lambda facts, fault: Path(fault.path).touch(),
}


class FaultPlan:
    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self._visits = [0] * len(faults)

    def install(self, rank: int) -> None:
        """Install hooks at the failpoints of the plan in this process."""
        for name in {fault.at for fault in self.faults}:
            failpoints.hooks[name] = lambda name=name, **facts: self._visit(name, rank, facts)

    @staticmethod
    def remove() -> None:
        failpoints.hooks.clear()

    def _visit(self, name: str, rank: int, facts: dict[str, Any]) -> None:
        for i, fault in enumerate(self.faults):
            if fault.at != name or fault.rank not in (None, rank) or fault.step not in (None, facts.get("step")):
                continue
            self._visits[i] += 1
            if self._visits[i] == fault.nth or fault.nth == 0:  # 0: every time
                ACTIONS[fault.do](facts, fault)

    def to_json(self) -> str:
        return json.dumps([asdict(fault) for fault in self.faults])

    @classmethod
    def from_json(cls, text: str) -> FaultPlan:
        return cls(*(Fault(**fault) for fault in json.loads(text)))
