"""tools/train.sbatch with stand-ins for srun, scontrol and python: what the ranks get, and when the job is requeued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
trap 'exit 143' USR1
echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*" > "$SLURM_STAND_IN/rank$RANK"
if [ "$CODE" = wait ]; then while :; do sleep 0.02; done; fi
if [ "$RANK" = 1 ]; then exit "$CODE"; fi
"""


def submit(folder: Path, code: str) -> subprocess.Popen[str]:
    """Start the script as Slurm would, with four tasks on two nodes. Rank 1 ends with this code."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    # srun's stand-in runs by this interpreter, too: pyenv's python3 would put its own folders before that for python.
    folders = [folder / "bin", ROOT / "tests" / "e2e" / "stand_ins", Path(sys.executable).parent, os.environ["PATH"]]
    changes = {
        "PATH": ":".join(map(str, folders)),
        "SLURM_JOB_ID": "31007", "SLURM_JOB_NODELIST": "gpu7,gpu9", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STAND_IN": str(folder), "CODE": code, "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NAME": "megacid",
        "SLURM_RESTART_COUNT": "99",  # of time limits
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", "tools/train.sbatch", "--deepspeed_config", "a run.json"],
        cwd=ROOT, env=os.environ | changes, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def requeued(folder: Path) -> bool:
    return (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("code", "failures", "again"),
    [
        ("0", 0, False),
        ("2", 0, False),
        ("70", 0, False),
        ("75", 0, True),
        ("75", 19, True),
        ("75", 20, False),
        ("143", 0, False),
    ],
)
def test_a_job_is_requeued_after_lost_ranks_alone_and_not_without_end(
    tmp_path: Path, code: str, failures: int, again: bool
) -> None:
    counter = tmp_path / "megacid-31007.failures"
    if failures:
        counter.write_text(f"{failures}\n")
    job = submit(tmp_path, code)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == int(code), output
    assert requeued(tmp_path) == again
    assert (counter.read_text() if counter.exists() else "") == (f"{failures + 1}\n" if again else "")
    for rank in range(4):
        words = f"{rank} 4 {rank % 2} gpu7 31007 megacid/train.py --deepspeed_config a run.json\n"
        assert (tmp_path / f"rank{rank}").read_text() == words


def test_usr1_reaches_every_rank_and_the_job_is_requeued_with_a_new_count_of_failures(tmp_path: Path) -> None:
    (tmp_path / "megacid-31007.failures").write_text("20\n")
    job = submit(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("rank*"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 143 and "exit code 143" in output, output
    assert (tmp_path / "requeued").read_text() == "31007\n"
    assert not list(tmp_path.glob("*.failures"))
