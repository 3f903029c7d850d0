"""Where numbers go: one line per log_every steps, tensorboard, throughput, ETA, peak memory."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megacid.storage.atomic import write_json_atomic

log = logging.getLogger("megacid")
_STATUS = Path("/proc/self/status")


def setup_logging(rank: int, directory: Path | None) -> None:
    """Rank 0 logs to stdout and, with a directory, to log.txt; other ranks only warnings, marked with their rank."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if rank == 0 and directory is not None:
        handlers.append(logging.FileHandler(directory / "log.txt"))
    mark = "" if rank == 0 else f" [rank {rank}]"
    logging.basicConfig(
        format=f"%(asctime)s{mark} %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
        handlers=handlers,
        force=True,
    )
    # Only our own loggers: open_clip narrates every step of building a model on the root logger.
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:d}:{rest // 60:02d}:{rest % 60:02d}"


def _status_mib(key: str) -> float:
    """VmHWM or VmRSS of this process; its ru_maxrss where the system does not say.

    Not ru_maxrss everywhere: that survives exec, so a small process started by a large one would report the large one.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory_mib() -> float:
    """Peak of the accelerator's allocated memory, or of this process's resident memory on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def resident_memory_mib() -> float:
    """Resident memory of this process now; where the system does not say, its peak."""
    return _status_mib("VmRSS")


def _curve(folder: Path, step: int) -> SummaryWriter:
    """A new event file, whose first point is `step`: points that a crashed run wrote beyond its last checkpoint are
    taken back. Readers go through the files in the order of their names, which begin with whole seconds and go on with
    the process's number: a second start within one second might be read before the first, so it waits for the next."""
    while list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=step)


class Metrics:
    """Rank 0 writes; the other ranks only keep the clock."""

    def __init__(
        self,
        directory: Path,
        *,
        first: bool,
        start_step: int,
        total_steps: int,
        global_batch: int,
        world: int,
        log_every: int,
    ) -> None:
        self.directory, self.first, self.total_steps = directory, first, total_steps
        self.global_batch, self.world, self.log_every = global_batch, world, log_every
        self.writer = _curve(directory / "tensorboard", start_step + 1) if first else None
        self.began, self.start_step = time.perf_counter(), start_step
        self._last, self._last_step, self._data_s = self.began, start_step, 0.0

    def waited_for_data(self, seconds: float) -> None:
        self._data_s += seconds

    def due(self, step: int) -> bool:
        return (step + 1) % self.log_every == 0 or step + 1 == self.total_steps

    def log(self, step: int, loss: Tensor, terms: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Called when `due`. loss, terms: 0-d tensors (the same on every rank). scalars: lr, norms, diagnostics."""
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
            "train/peak_memory_mib": peak_memory_mib(),
        }
        wait, self._last, self._last_step, self._data_s = self._data_s / seconds, now, step + 1, 0.0
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step + 1)
        eta = (self.total_steps - step - 1) * (now - self.began) / (step + 1 - self.start_step)
        said = "  ".join(f"{name} {float(value):.4f}" for name, value in terms.items())
        log.info(
            "step %d/%d  loss %.4f  %s  lr %.2e  grad norm %.3f  %.0f samples/s  data wait %.0f %%  ETA %s",
            step + 1, self.total_steps, values["train/loss"], said, scalars["train/lr"], scalars["train/grad_norm"], rate, 100 * wait, _clock(eta),
        )  # fmt: skip

    def log_classes(self, step: int, facts: dict[str, float], hits: Tensor) -> None:
        """Facts about all class rows, and hits: int64 counts of classes with 0, 1, 2-3, 4-7, ... training samples."""
        if self.writer is None:
            return
        for name, value in facts.items():
            self.writer.add_scalar(f"classes/{name}", value, step + 1)
        # Bins by powers of two: tensorboard wants the right edge of each.
        edges = [0.5] + [2.0**i - 0.5 for i in range(1, len(hits))]
        counts = hits.tolist()
        middle = [0.0] + [1.5 * 2.0 ** (i - 1) for i in range(1, len(hits))]
        self.writer.add_histogram_raw(
            "classes/hits", min=0, max=edges[max((i for i, n in enumerate(counts) if n), default=0)], num=sum(counts),
            sum=sum(n * m for n, m in zip(counts, middle)), sum_squares=sum(n * m * m for n, m in zip(counts, middle)),
            bucket_limits=edges, bucket_counts=counts, global_step=step + 1,
        )  # fmt: skip
        log.info("classes: %s", "  ".join(f"{name} {value:.4g}" for name, value in facts.items()))

    def close(self, summary: dict[str, Any]) -> None:
        """Write summary.json: steps done here, seconds, samples/s, peak memory, and what the caller adds."""
        if self.writer is None:
            return
        self.writer.close()
        seconds = time.perf_counter() - self.began
        steps = self._last_step - self.start_step
        facts = {
            "seconds": seconds,
            "samples_per_second": steps * self.global_batch / seconds,
            "peak_memory_mib": peak_memory_mib(),
            **summary,
        }
        write_json_atomic(self.directory / "train_summary.json", facts)
