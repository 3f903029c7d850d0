"""Logging of a run: log lines, scalars for the trackers, throughput, time to the end, peak memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import resource
import sys
import time
from io import TextIOWrapper
from pathlib import Path

import torch
from torch import Tensor

from megacid.config.schema import RunFile
from megacid.distributed.parallel import Parallel
from megacid.distributed.progress import progress_bar
from megacid.errors import LogFormatter, UserError
from megacid.storage.atomic import open_owned, write_json_atomic
from megacid.training.flops import peak_tflops
from megacid.training.summary import clock, summary_lines, where_to_go_on
from megacid.training.trackers import Trackers

log = logging.getLogger("megacid")
_STATUS = Path("/proc/self/status")


class _LogFile(logging.FileHandler):
    """log.txt, which follows no link. Its first error is one warning, after which the run continues without it."""

    def _open(self) -> TextIOWrapper:
        return os.fdopen(open_owned(Path(self.baseFilename)), "a")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name in logging
        """Called when a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError, ValueError):
            self.close()
        log.warning("%s cannot be written any more (%s): the run continues without it", self.baseFilename, error)


def setup_logging(rank: int, directory: Path | None) -> None:
    """Log to stderr on rank 0 and, with a directory, to its log.txt; other ranks log only warnings, with their rank."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    failure: OSError | None = None
    if rank == 0 and directory is not None:
        try:
            handlers.append(_LogFile(directory / "log.txt"))
        except OSError as error:
            if error.errno == errno.EINVAL:  # a link or a pipe
                raise UserError(f"cannot write to {directory / 'log.txt'}: {error.strerror}") from None
            failure = error
    mark = "" if rank == 0 else f" [rank {rank}]"
    for handler in handlers:
        handler.setFormatter(LogFormatter(f"%(asctime)s{mark} %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    # Only our own loggers: open_clip logs every step of building a model to the root logger.
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if failure is not None:
        log.warning("log.txt cannot be written (%s): the run continues without it", failure)


def _status_mib(key: str) -> float:
    """VmHWM or VmRSS of this process in MiB; its ru_maxrss on a system without /proc.

    ru_maxrss survives exec: a small process that a large one started would report the size of the large one.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory_mib() -> float:
    """Peak of the memory allocated on the GPU, or of this process's resident memory on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def memory_mib() -> float:
    """Memory allocated on the GPU now, or this process's resident memory on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**20
    return resident_memory_mib()


def resident_memory_mib() -> float:
    """Resident memory of this process; its peak on a system without /proc."""
    return _status_mib("VmRSS")


class Metrics:
    """Log lines, tracked scalars and train_summary.json of a run. Rank 0 writes; the other ranks only measure time."""

    def __init__(self, run: RunFile, parallel: Parallel, start_step: int, flops: float | None = None) -> None:
        """flops: floating-point operations of a step of all ranks; None: unknown."""
        config, self.run = run.megacid.run, run
        self.directory, self.world, self.global_batch = run.directory, parallel.world, run.global_batch
        self.total_steps, self.log_every = config.total_steps, config.log_every
        self.is_first = parallel.is_first
        self._trackers = Trackers(run, start_step) if self.is_first else None
        on_terminal = self.is_first and sys.stderr.isatty()  # elsewhere the log lines show the progress
        self._bar = progress_bar("train", "step", self.total_steps, initial=start_step, enabled=on_terminal)
        self.began, self.start_step = time.perf_counter(), start_step
        self._last, self._last_step, self._data_s, self._total_data_s = self.began, start_step, 0.0, 0.0
        self._last_loss: float | None = None
        self._last_evaluation: dict[str, float] | None = None
        self._tflops_per_rank = None if flops is None else flops / parallel.world / 1e12
        is_gpu = parallel.device.type == "cuda"
        self._peak_tflops = peak_tflops(torch.cuda.get_device_name(parallel.device)) if is_gpu else None

    def waited_for_data(self, seconds: float) -> None:
        """Add to the time that the training loop waited for batches."""
        self._data_s += seconds
        self._total_data_s += seconds

    def step_done(self) -> None:
        """Advance the progress bar by a step."""
        self._bar.update()

    def leave_out(self, seconds: float) -> None:
        """Count this time, which was not spent on training, neither as step time nor as wait for data."""
        self._last += seconds

    def due(self, step: int) -> bool:
        """Whether `step` is to be logged: every log_every steps, and the last."""
        return (step + 1) % self.log_every == 0 or step + 1 == self.total_steps

    def log(self, step: int, loss: Tensor, terms: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Log one step that is `due`. loss, terms: 0-d, equal on all ranks. scalars: by tag, with train/lr."""
        now = time.perf_counter()
        steps = step + 1 - self._last_step
        seconds = max(now - self._last, 1e-9)
        rate = steps * self.global_batch / seconds
        values = {
            "train/loss": float(loss.detach()),
            **{f"train/{name}": float(value) for name, value in terms.items()},
            **scalars,
            "train/samples_per_second": rate,
            "train/samples_per_second_per_gpu": rate / self.world,
            "train/batch_time": seconds / steps,
            "train/data_time": self._data_s / steps,
            "train/memory_mib": memory_mib(),
            "train/peak_memory_mib": peak_memory_mib(),
            **self._utilization(seconds / steps),
        }
        self._last_loss = values["train/loss"]
        wait, self._last, self._last_step, self._data_s = self._data_s / seconds, now, step + 1, 0.0
        if not self.is_first:
            return
        self.write(values, step)
        eta = (self.total_steps - step - 1) * (now - self.began) / (step + 1 - self.start_step)
        losses = "  ".join(f"{name} {float(value):.4f}" for name, value in terms.items())
        log.info(
            "step %d/%d  loss %.4f  %s  lr %.2e  grad norm %.3f  %.0f samples/s  data wait %.0f %%  ETA %s",
            step + 1, self.total_steps, values["train/loss"], losses, scalars["train/lr"], scalars["train/grad_norm"],
            rate, 100 * wait, clock(eta),
        )  # fmt: skip

    def _utilization(self, seconds_per_step: float) -> dict[str, float]:
        """TFLOP/s of a rank and, on a known GPU, their share of its peak."""
        if self._tflops_per_rank is None:
            return {}
        rate = self._tflops_per_rank / seconds_per_step
        known = {} if self._peak_tflops is None else {"train/mfu": rate / self._peak_tflops}
        return {"train/tflops_per_gpu": rate, **known}

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Give scalars, by tag, to the trackers. Does nothing on other ranks than the first.

        The closing summary shows the newest ones whose tags begin with "eval/".

        Args:
            step: the last step that the scalars belong to, counted from 0 as in the training loop.
        """
        if self._trackers is not None:
            self._trackers.scalars(scalars, step + 1)
        if evaluation := {tag: value for tag, value in scalars.items() if tag.startswith("eval/")}:
            self._last_evaluation = {"step": step + 1, **evaluation}

    def log_classes(self, step: int, stats: dict[str, float], hits: Tensor) -> None:
        """Log diagnostics over all class rows. hits: int64, number of classes with 0, 1, 2-3, 4-7, ... samples."""
        if self._trackers is None:
            return
        self.write({f"classes/{name}": value for name, value in stats.items()}, step)
        edges = [-0.5, *(2.0**i - 0.5 for i in range(len(hits)))]
        self._trackers.histogram("classes/hits", edges, hits.tolist(), step + 1)
        log.info("classes: %s", "  ".join(f"{name} {value:.4g}" for name, value in stats.items()))

    def close_bar(self) -> None:
        """Leave the progress bar as it is; what is printed from now on follows below it."""
        self._bar.close()

    def close_trackers(self) -> None:
        """Write what the trackers buffer. They may upload for a while."""
        if self._trackers is not None:
            self._trackers.close()

    def summarize(self, *, steps: int, skipped: int) -> None:
        """Log the closing summary and write it to train_summary.json.

        Args:
            steps: number of steps of this start.
            skipped: number of skipped steps of the whole run.
        """
        if not self.is_first or steps == 0:  # a start that only evaluated leaves the summary of the training
            return
        seconds = time.perf_counter() - self.began
        summary = {
            "seconds": seconds,
            "samples_per_second": steps * self.global_batch / seconds,
            "peak_memory_mib": peak_memory_mib(),
            "steps": steps,
            "start_step": self.start_step,
            "skipped": skipped,
            "world": self.world,
            "samples": steps * self.global_batch,
            "data_wait_share": self._total_data_s / seconds,
            "last_loss": loss if (loss := self._last_loss) is not None and math.isfinite(loss) else None,
            "last_evaluation": self._last_evaluation,
            **where_to_go_on(self.run, finished=self.start_step + steps == self.total_steps),
        }
        for line in summary_lines(summary):
            log.info("summary: %s", line)
        try:
            write_json_atomic(self.directory / "train_summary.json", summary)
        except OSError as error:
            log.warning("train_summary.json cannot be written (%s)", error)
