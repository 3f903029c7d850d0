#!/usr/bin/env python3
"""Seconds from a stall to the end of all ranks, and from SIGTERM to a saved end, on the toy run: the README's figures.

python tests/training/measure_faults.py        # about a minute; no test, since times are the machine's
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402

torch.set_num_threads(1)

import toy  # noqa: E402
from faultplan import Fault, FaultPlan  # noqa: E402

TIMEOUT_S, RUNS = 5.0, 3


def seconds(root: Path, world: int, name: str, fault: Fault, code: int) -> float:
    """From the fault to the moment when every rank has ended with `code`."""
    file = toy.run_file(root, name, run__timeout_s=TIMEOUT_S, run__log_every=toy.STEPS)
    mark = root / f"{name}.mark"
    plan = FaultPlan(Fault(fault.at, "touch", rank=fault.rank, step=fault.step, path=str(mark)), fault)
    assert toy.train_toy(world, file, plan=plan) == [code] * world
    return time.time() - mark.stat().st_mtime


def main() -> None:
    faults = {
        f"stall, timeout {TIMEOUT_S:.0f} s": (Fault("train:batch", "sleep", rank=1, step=8, value=300), 75),
        "SIGTERM": (Fault("train:batch", "signal", rank=1, step=8, value=signal.SIGTERM), 143),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        toy.write_features(root / "features")
        lines = []
        for what, (fault, code) in faults.items():
            for world in (2, 4):
                took = [seconds(root, world, f"{code}-{world}-{n}", fault, code) for n in range(RUNS)]
                lines.append(f"{what}, {world} ranks: {min(took):.2f} to {max(took):.2f} s ({RUNS} runs)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
