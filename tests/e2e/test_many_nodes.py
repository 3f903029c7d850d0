"""Three ways to start a run on two hosts, each with a host that is lost and a second start: the bits of a calm run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy
from two_hosts import NAMES, TwoHosts, available

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN, DEEPSPEED = (str(Path(sys.executable).parent / name) for name in ("torchrun", "deepspeed"))
STEPS = 200
CHANGES = {"run__total_steps": STEPS, "run__save_every": 20, "run__timeout_s": 10.0, "run__save_timeout_s": 20.0}

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="this machine allows no network namespaces (unshare -rnmu)"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a run on two ranks of one host that nothing disturbed."""
    root = tmp_path_factory.mktemp("nodes")
    toy.write_features(root / "features")
    assert toy.train_toy(2, toy.run_file(root, "calm", **CHANGES)) == [0, 0]
    return root


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path / "hosts") as hosts:
        yield hosts


def wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} did not appear")


def finish(*launchers: subprocess.Popen[str]) -> tuple[list[int], str]:
    """Exit codes of the launchers and what they printed."""
    outputs = [launcher.communicate(timeout=150)[0] for launcher in launchers]
    return [launcher.returncode for launcher in launchers], "".join(outputs)


def check_bits(root: Path, name: str) -> None:
    ends = [toy.tensors(root / "runs" / run / f"step-{STEPS:08d}") for run in ("calm", name)]
    assert toy.differing(*ends) == []


def test_deepspeed_starts_the_hosts_of_a_hostfile_and_continues_after_one_lost_its_power(
    root: Path, hosts: TwoHosts, tmp_path: Path
) -> None:
    file = toy.run_file(root, "hostfile", **CHANGES)
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    words = [DEEPSPEED, "--hostfile", tmp_path / "hostfile", "megacid/train.py", "--deepspeed_config", file]

    launcher = hosts.start("node0", *words, HOME=str(tmp_path))
    wait_for(root / "runs" / "hostfile" / "step-00000020")
    hosts.power_off("node1")
    (code,), output = finish(launcher)
    assert code != 0 and "the same command again" in output, output
    assert not (root / "runs" / "hostfile" / f"step-{STEPS:08d}").exists()

    (code,), output = finish(hosts.start("node0", *words, HOME=str(tmp_path)))
    assert code == 0 and "resumed from" in output, output
    check_bits(root, "hostfile")


def test_torchruns_rendezvous_continues_after_the_cable_was_pulled(root: Path, hosts: TwoHosts) -> None:
    file = toy.run_file(root, "rendezvous", **CHANGES)
    words = [TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "toy"]
    words += ["--rdzv_endpoint", "node0:29500", "megacid/train.py", "--deepspeed_config", file]

    launchers = [hosts.start(name, *words) for name in NAMES]
    wait_for(root / "runs" / "rendezvous" / "step-00000020")
    hosts.cable("down")
    wait_until(lambda: not any(hosts.ranks(name) for name in NAMES), "the ranks did not end")
    for name in NAMES:
        hosts.power_off(name)  # torchrun itself waits up to 5 minutes for the other host
    _, output = finish(*launchers)
    assert "the same command again" in output, output
    assert not (root / "runs" / "rendezvous" / f"step-{STEPS:08d}").exists()

    hosts.cable("up")
    codes, output = finish(*(hosts.start(name, *words) for name in NAMES))
    assert codes == [0, 0] and "resumed from" in output, output
    check_bits(root, "rendezvous")


def test_a_slurm_job_is_requeued_at_its_time_limit_and_after_a_lost_host_and_continues(
    root: Path, hosts: TwoHosts, tmp_path: Path
) -> None:
    file = toy.run_file(root, "slurm", **CHANGES)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node0,node1", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_STAND_IN": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
    words = ["bash", "tools/train.sbatch", "--deepspeed_config", file]

    batch = hosts.start("node0", *words, **job)
    wait_for(root / "runs" / "slurm" / "step-00000020")
    batch.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@600 does; nsenter has become the script
    codes, output = finish(batch)
    assert codes == [143] and "stopped after step" in output, output
    assert (tmp_path / "requeued").read_text() == "4711\n"

    last = max((root / "runs" / "slurm").glob("step-*"))
    batch = hosts.start("node0", *words, **job, SLURM_RESTART_COUNT="1")
    wait_for(root / "runs" / "slurm" / f"step-{(int(last.name[5:]) // 20 + 1) * 20:08d}")
    hosts.power_off("node1")
    codes, output = finish(batch)
    assert codes == [137] and "resumed from" in output, output
    assert (tmp_path / "requeued").read_text() == "4711\n" * 2

    codes, output = finish(hosts.start("node0", *words, **job, SLURM_RESTART_COUNT="2"))
    assert codes == [0] and "resumed from" in output, output
    assert (tmp_path / "requeued").read_text() == "4711\n" * 2
    check_bits(root, "slurm")
