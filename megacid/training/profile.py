"""`train.py --profile-steps A:B`: torch's profiler over some steps, a trace for each rank and the slowest operators."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megacid.distributed.parallel import Parallel
from megacid.errors import UserError, one_line
from megacid.storage.atomic import atomic_path

log = logging.getLogger("megacid")

_MOST_STEPS = 100  # the profiler keeps every event of them in memory
_SHOWN = 10


def steps_to_profile(option: str | None, total_steps: int) -> range:
    """The steps of --profile-steps, counted from 0; none without the option. Raises UserError."""
    if option is None:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", option)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= total_steps or last - first >= _MOST_STEPS:
        raise UserError(
            f"--profile-steps is {option[:40]!r}, expected A:B with 1 <= A <= B <= run.total_steps ({total_steps}), at "
            f"most {_MOST_STEPS} steps as the log numbers them: pass for example --profile-steps 2:4"
        )
    return range(first - 1, last)


class StepProfiler:
    """Profiles some steps of a run; an error of a trace file is one warning.

    Args:
        steps: counted from 0; a warning says when all of them are before `start`.
        start: the first step of this start.
        directory: of the run; the traces go to its profile/.
    """

    def __init__(self, steps: range, start: int, directory: Path, parallel: Parallel) -> None:
        self.steps, self.directory, self.parallel = steps, directory / "profile", parallel
        self._profile: profile | None = None
        self._first = self._last = 0
        if steps and steps.stop <= start and parallel.is_first:
            log.warning(
                "--profile-steps %d:%d ends before step %d, where this start begins: pass later steps",
                steps.start + 1, steps.stop, start + 1,
            )  # fmt: skip

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """The block of a step, profiled if it is one of `steps`."""
        if step in self.steps:
            if self._profile is None:
                activities = [ProfilerActivity.CPU]
                if self.parallel.device.type == "cuda":
                    activities.append(ProfilerActivity.CUDA)
                self._profile, self._first = profile(activities=activities), step + 1
                self._profile.start()
            self._last = step + 1
        yield
        if step + 1 >= self.steps.stop:
            self.close()

    def close(self) -> None:
        """Write the trace of the steps that were profiled, and log the slowest operators on rank 0."""
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        done.stop()
        # A name that tensorboard's profile plugin and Perfetto both read.
        name = f"rank{self.parallel.rank:05d}.steps{self._first}-{self._last}.pt.trace.json.gz"
        try:
            with atomic_path(self.directory / name) as temporary:
                done.export_chrome_trace(str(temporary))
        except Exception as error:  # the profiler's own errors are RuntimeErrors
            log.warning("%s cannot be written (%s): the run continues", self.directory / name, one_line(error))
        if self.parallel.is_first:
            self._report(done)

    def _report(self, done: profile) -> None:
        on_gpu = self.parallel.device.type == "cuda"
        spent = {
            event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
            for event in done.key_averages()
        }
        total = max(1.0, sum(time for time, _ in spent.values()))
        log.info(
            "profile of steps %d to %d in %s; time of rank 0 on the %s by operator:",
            self._first, self._last, self.directory, "GPU" if on_gpu else "CPU",
        )  # fmt: skip
        for name, (time, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:_SHOWN]:
            log.info("%10.1f ms %5.1f %% %8d calls  %s", time / 1000, 100 * time / total, count, name[:80])
