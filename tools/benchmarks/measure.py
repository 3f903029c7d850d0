"""Time, memory and repeatability of a call, on a CPU or a GPU."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite import clock_of, interpreted
from megacid.errors import UserError

Run = Callable[[], object]
Timer = Callable[[Run, int], list[float]]
# glibc keeps freed blocks up to a threshold that grows with use, and the warm-up's blocks would hide the peak.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
_FLUSH_BYTES = 1 << 28  # several times the L2 of any GPU
_DIGEST_ELEMENTS = 1 << 24
_TURN_S, _LEAST_REPEATS, _MOST_REPEATS = 0.3, 7, 100


class CudaTimer:
    """timer(run, repeats) -> seconds of every call, by CUDA events around it. The calls are queued without waiting for
    each other, so the launch overhead of a short one is hidden. The L2 cache is overwritten before each."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Run, repeats: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def timer_of(args: argparse.Namespace) -> Timer:
    if args.device == "cuda":
        return CudaTimer()
    clock = clock_of(args)

    def timer(run: Run, repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            start = clock()
            run()
            seconds.append(clock() - start)
        return seconds

    return timer


def repeats_for(seconds: float) -> int:
    """Calls per turn: at least seven, so three rounds have more than 20; more if they are short."""
    if interpreted():
        return 1
    return min(_MOST_REPEATS, max(_LEAST_REPEATS, int(_TURN_S / seconds)))


def take_turns(
    runs: Mapping[str, Run], timer: Timer, rounds: int, repeats: int | Mapping[str, int]
) -> dict[str, list[float]]:
    """Seconds of rounds * repeats calls of every run. The runs alternate in every round, so drifting clocks affect all
    alike. A turn begins with an uncounted call, and on a GPU with an empty allocator cache."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in itertools.product(range(1 if interpreted() else rounds), runs):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        timer(runs[name], 1)
        seconds[name] += timer(runs[name], repeats if isinstance(repeats, int) else repeats[name])
    return seconds


def quantiles(values: Iterable[float]) -> list[float]:
    """The 20 %, 50 % and 80 % quantiles."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(list(values), dtype=torch.float64).quantile(levels).tolist()


def format_ms(values: Iterable[float]) -> str:
    """p50 [p20, p80] of seconds, in milliseconds."""
    p20, p50, p80 = (1e3 * value for value in quantiles(values))
    digits = 1 if p50 >= 10 else 3
    return f"{p50:,.{digits}f} [{p20:,.{digits}f}, {p80:,.{digits}f}]"


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def proc_bytes(path: str, key: str) -> int:
    """Bytes of an entry in kB of /proc/meminfo or /proc/self/status."""
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{path} has no {key}, expected Linux's memory statistics: measure on Linux")


def free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return proc_bytes("/proc/meminfo", "MemAvailable")
    return int(torch.cuda.mem_get_info(device)[0])


def peak_extra_bytes(iterate: Run, device: torch.device) -> int:
    """The peak memory during iterate() above that before it, results included. On a CPU start the process with
    RETURN_FREED in its environment, and call iterate() once before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        iterate()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(
            f"the peak memory cannot be reset ({error}), expected /proc/self/clear_refs: measure on Linux"
        ) from error
    before = proc_bytes("/proc/self/status", "VmRSS")
    iterate()
    return max(0, proc_bytes("/proc/self/status", "VmHWM") - before)


def ask_process(
    module: str, request: dict[str, Any], environment: Mapping[str, str], *, show_progress: bool = False
) -> dict[str, Any]:
    """The JSON that `python -m module REQUEST` prints last; {"skipped": its last error line} if it fails.

    show_progress: its standard error goes to this process's, for runs of hours.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    full_environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    errors = None if show_progress else subprocess.PIPE
    done = subprocess.run(command, env=full_environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        unknown = "see its messages" if show_progress else "no message; killed for lack of memory?"
        last = ((done.stderr or "").strip().splitlines() or [unknown])[-1]
        return {"skipped": f"exit {done.returncode}: {last}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def host_syncs(run: Run) -> int | None:
    """How often one call waits for the GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def digest(tensors: Iterable[Tensor]) -> int:
    """A hash of all bits and their positions: equal digests mean equal bits. Integer sums do not depend on their order,
    and no second copy of a large gradient is needed."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1)
        bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        for block in bits.split(_DIGEST_ELEMENTS):
            odd = torch.arange(1, 2 * len(block), 2, device=block.device)
            total = (total * 1_000_003 + int((block.long() * odd).sum())) % (1 << 64)
    return total


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in float64; NaN if value is not finite."""
    value, exact = value.detach().double(), exact.detach().double().to(value.device)
    return float((value - exact).norm() / exact.norm())


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below or math.isnan(above) else above / below


def median(row: Mapping[str, Any], key: str = "seconds") -> float | None:
    """The median of a row's repeats; None without any."""
    return quantiles(row[key])[1] if row.get(key) else None


def format_value(value: float | None, spec: str = ",.2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
