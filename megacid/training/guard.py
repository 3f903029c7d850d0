"""One decision per step for all ranks and both optimizers: apply with one clipping factor, skip, or end the run."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megacid.config.sections import GuardConfig
from megacid.distributed.collectives import Group, all_reduce_sum, rank, world_size
from megacid.distributed.consensus import gather_json

log = logging.getLogger(__name__)

_HORIZON = 1000  # steps over which max_skipped_share counts
_WINDOW = 200  # losses whose median a spike is compared with
_ENOUGH = 20  # losses needed before a spike can be told from the usual spread
_LOWERED = 0.1  # factor of the gradients of a spike with guard.spike "lower"
_NAMED_RANKS = 4
_HEAD, _BAD, _FAILED, _STOP, _LOSS = range(5)


class TooManySkips(RuntimeError):  # noqa: N818  the run ends with its own exit code
    """More steps were skipped than guard.max_consecutive_skips or max_skipped_share allows, or there was a spike."""


@dataclass(frozen=True)
class Verdict:
    """The decision about one step, the same on every rank.

    apply: both optimizers step, or neither. grad_norm: joint 2-norm of student and classifier. clip_scale: gradient
    factor, at most 1. loss: mean over the ranks. stop: a rank was asked to stop. failure: why the data end the run.
    observed: means over the ranks.
    """

    apply: bool
    grad_norm: float
    clip_scale: float
    loss: float
    stop: bool = False
    failure: str | None = None
    observed: tuple[float, ...] = ()


class Guard:
    """Clips, skips and ends: decides about each step from the losses and gradient norms of all ranks."""

    def __init__(self, clip: float, config: GuardConfig, group: Group = None) -> None:
        """clip: largest joint gradient norm; 0 for no clipping."""
        self.clip, self.config, self.group = clip, config, group
        self.skipped, self.consecutive = 0, 0
        self._recent: deque[int] = deque()  # steps skipped within the horizon
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def state(self) -> dict[str, Any]:
        """The guard's part of a checkpoint, JSON-able and the same on every rank."""
        return {
            "skipped": self.skipped,
            "consecutive": self.consecutive,
            "recent": list(self._recent),
            "losses": list(self._losses),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])
        self._recent = deque(map(int, state["recent"]))
        self._losses = deque(map(float, state["losses"]), maxlen=_WINDOW)

    def decide(
        self,
        step: int,
        loss: Tensor,
        student_norm: Tensor,
        head_norm_sq: Tensor | None,
        describe: Callable[[], tuple[bool, str]],
        *,
        failure: str | None = None,
        stop: bool = False,
        observed: Tensor | None = None,
    ) -> Verdict:
        """Decide about one step. A collective: one all-reduce, and more only for a warning or a failure.

        Args:
            loss: 0-d, the same on every rank when finite.
            student_norm: 0-d 2-norm of the student's reduced gradient, the same on every rank when finite.
            head_norm_sq: 0-d squared norm of the gradient of this rank's class rows; None without a classifier.
            describe: for warnings only; (whether this rank's samples are at fault, samples and loss terms as text).
            failure: why the data of this rank end the run.
            stop: whether this rank was asked to stop.
            observed: values of this rank, of which the verdict has the means; they change no decision.

        Raises:
            TooManySkips: on every rank.
        """
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(student_norm))
        zero = student_norm.new_zeros(())
        head_sum = head_norm_sq if head_norm_sq is not None else zero
        parts = (head_sum, bad, zero + (failure is not None), zero + stop, loss.detach())
        *totals, own_norm = self._sums([*parts, *(() if observed is None else observed)], student_norm)
        _, mean_loss, *means = (total / world_size(self.group) for total in totals[_STOP:])
        stopped, verdict = totals[_STOP] > 0, partial(Verdict, observed=tuple(means))
        if totals[_FAILED] > 0:
            failures = [text for text in gather_json(failure, self.group) if text is not None]
            return verdict(False, math.nan, 0.0, mean_loss, stopped, "; ".join(failures))
        if not math.isfinite(totals[_HEAD]) or totals[_BAD] > 0:
            head_sq = None if head_norm_sq is None else float(head_norm_sq)
            self._skip(step)
            self._warn(
                f"step {step} has a non-finite loss or gradient and is skipped",
                describe,
                rows_bad=head_sq is not None and not math.isfinite(head_sq),
                values=f"loss {float(loss.detach())}, student gradient norm {own_norm}, "
                f"classifier gradient norm^2 {head_sq}; ",
            )
            self._check_limits(step, "a non-finite loss or gradient")
            return verdict(False, math.nan, 0.0, mean_loss, stopped)
        norm = math.sqrt(own_norm**2 + totals[_HEAD])
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        limit = self._spike_limit()
        if limit is not None and mean_loss > limit:
            self._handle_spike(step, mean_loss, limit, describe)
            if self.config.spike == "skip":
                return verdict(False, norm, 0.0, mean_loss, stopped)
            scale *= _LOWERED
        self.consecutive = 0
        if self.config.spike != "off":
            self._losses.append(mean_loss)
        return verdict(True, norm, scale, mean_loss, stopped)

    def _sums(self, parts: list[Tensor], own: Tensor) -> list[float]:
        """Sums over the ranks of 0-d `parts`, then this rank's `own`, with one transfer to the host."""
        sums = torch.stack([part.double() for part in parts])
        all_reduce_sum(sums, self.group)
        values: list[float] = torch.cat([sums, own.double().reshape(1)]).tolist()
        return values

    def _handle_spike(self, step: int, loss: float, limit: float, describe: Callable[[], tuple[bool, str]]) -> None:
        """Warn of a spike, and count the skipped step or end the run as guard.spike says. A collective."""
        median = statistics.median(self._losses)
        self._warn(
            f"step {step} has a loss spike, {loss:.6g} (median of the last {len(self._losses)}: {median:.6g}, limit "
            f"{limit:.6g}), policy {self.config.spike}",
            describe,
        )
        if self.config.spike == "abort":
            raise TooManySkips(
                f"step {step} has loss {loss:.6g}, more than {limit:.6g}, and guard.spike is abort: check the samples "
                "named above, or choose skip or lower; the last checkpoint is kept"
            )
        if self.config.spike == "skip":
            self._skip(step)
            self._check_limits(step, "a loss spike")

    def _warn(
        self, message: str, describe: Callable[[], tuple[bool, str]], *, rows_bad: bool = False, values: str = ""
    ) -> None:
        """One warning, on rank 0, that names the ranks that caused it with their samples. A collective."""
        samples_bad, text = describe()
        reports = gather_json([2 * samples_bad or int(rows_bad), values + text], self.group)
        # Through the shared loss every rank sees what one rank caused: name ranks with bad samples, else with bad rows.
        worst = max(fault for fault, _ in reports)
        named = [(r, words) for r, (fault, words) in enumerate(reports) if fault == worst][: None if worst else 1]
        if rank(self.group) == 0:
            shown = "; ".join(f"rank {r}: {words}" for r, words in named[:_NAMED_RANKS])
            more = f"; and {len(named) - _NAMED_RANKS} more ranks" if len(named) > _NAMED_RANKS else ""
            log.warning("%s on all ranks. %s%s", message, shown, more)

    def _skip(self, step: int) -> None:
        self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
        self._recent.append(step)
        while self._recent[0] <= step - _HORIZON:
            self._recent.popleft()

    def _check_limits(self, step: int, why: str) -> None:
        remedy = "lower the learning rate or check the samples named above; the last checkpoint is kept"
        if self.consecutive >= self.config.max_consecutive_skips:
            raise TooManySkips(f"{self.consecutive} steps in a row up to step {step} had {why}: {remedy}")
        allowed = self.config.max_skipped_share * _HORIZON
        if len(self._recent) > max(allowed, self.config.max_consecutive_skips):
            raise TooManySkips(
                f"{len(self._recent)} of the last {_HORIZON} steps up to step {step} were skipped, the last for {why}; "
                f"{allowed:.0f} are allowed (guard.max_skipped_share): {remedy}"
            )

    def _spike_limit(self) -> float | None:
        """median + deviations * MAD of the last losses, which are global means: the same number on every rank."""
        if self.config.spike == "off" or len(self._losses) < _ENOUGH:
            return None
        median = statistics.median(self._losses)
        spread = statistics.median(abs(value - median) for value in self._losses)
        # A floor on the spread: rounding is no spike where the losses hardly change.
        return median + self.config.spike_deviations * max(spread, 1e-3 * abs(median))
