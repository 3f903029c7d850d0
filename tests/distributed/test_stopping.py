"""A stage that is asked to stop: what a late request leaves behind. Stops of whole tools: test_offline_kills.py."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import run_ranks

from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import StopRequest, run_stage


def _signalled_at_its_end(out: Path) -> int:
    """The thread that listens for signals writes the stop file of rank 0 when the stage has ended."""
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(rank))
    ended, written, write = threading.Event(), threading.Event(), StopRequest._write_stop_file

    def write_late(stop: StopRequest, code: int) -> None:
        ended.wait()
        write(stop, code)
        written.set()

    def stage(parallel: Parallel, stop: StopRequest) -> None:
        if parallel.is_first:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "_write_stop_file", write_late)
        code = run_stage(stage, out, 30.0)
        ended.set()
        if rank == 0:
            assert written.wait(30.0)
    return code


def test_a_request_that_comes_too_late_leaves_no_stop_file(tmp_path: Path) -> None:
    assert run_ranks(_signalled_at_its_end, 2, tmp_path / "out") == [0, 0]
    assert list(tmp_path.iterdir()) == []
