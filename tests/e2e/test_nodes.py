"""Two nodes, each with a launcher of its own, on one host: one node dies, both start again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from harness import free_port, living

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200


def start_node(number: int, file: Path, port: int) -> subprocess.Popen[str]:
    """One launcher, with one rank, of a job of two nodes."""
    words = ["--nnodes", "2", "--node_rank", number, "--nproc_per_node", "1"]
    words += ["--master_addr", "127.0.0.1", "--master_port", port, "megacid/train.py", "--deepspeed_config", file]
    command = [str(Path(sys.executable).parent / "torchrun"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the launcher", "its rank"])
def test_when_a_node_dies_the_other_ends_and_both_continue_with_the_same_bits(tmp_path: Path, victim: str) -> None:
    toy.write_features(tmp_path / "features")
    changes = {"run__total_steps": STEPS, "run__save_every": 20, "run__timeout_s": 20.0}
    calm, file = (toy.run_file(tmp_path, name, **changes) for name in ("calm", "nodes"))
    assert toy.train_toy(2, calm) == [0, 0]

    port = free_port()
    first, second = (start_node(number, file, port) for number in (0, 1))
    wait_for(tmp_path / "runs" / "nodes" / "step-00000020", seconds=90)
    if victim == "the launcher":
        second.send_signal(signal.SIGKILL)
    else:
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        (rank,) = [pid for pid in map(int, children) if pid in living("megacid/train.py")]
        subprocess.run(["kill", "-9", str(rank)], check=True)
    output = first.communicate(timeout=90)[0]
    second.communicate(timeout=90)
    assert first.returncode != 0 and 'Traceback (most recent call last):\n  File "megacid' not in output, output
    deadline = time.monotonic() + 30
    while living(str(file)):
        assert time.monotonic() < deadline, living(str(file))
        time.sleep(0.1)
    assert not (tmp_path / "runs" / "nodes" / f"step-{STEPS:08d}").exists()

    again = [start_node(number, file, port) for number in (0, 1)]
    outputs = [node.communicate(timeout=150)[0] for node in again]
    assert [node.returncode for node in again] == [0, 0], outputs
    assert "resumed from" in outputs[0]
    ends = [toy.tensors(tmp_path / "runs" / name / f"step-{STEPS:08d}") for name in ("calm", "nodes")]
    assert toy.differing(*ends) == []
