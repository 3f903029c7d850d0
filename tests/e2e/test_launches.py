"""The trainer as its users start it: launchers, signals, and errors that leave no process."""

from __future__ import annotations

import json
import multiprocessing as mp
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import free_port, living
from train_run import Pipeline, run_train

from megacid import train
from megacid.checkpoint.state import CheckpointReader

ROOT = Path(__file__).resolve().parents[2]


def command(launcher: str, port: int) -> list[str]:
    folder = Path(sys.executable).parent
    return {
        "deepspeed": [str(folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "megacid/train.py"],
        "torchrun": [str(folder / "torchrun"), "--nproc_per_node", "2", "--master_port", str(port), "megacid/train.py"],
        "python": [sys.executable, "megacid/train.py"],
    }[launcher]


def launch(launcher: str, file: Path, *options: str, port: int | None = None) -> subprocess.CompletedProcess[str]:
    words = [*command(launcher, port or free_port()), "--deepspeed_config", str(file), *options]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


# By default also: torchrun in tests/training/test_stalls_and_signals.py, plain Python in the test of SIGTERM here.
SLOW_LAUNCHERS = [pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("torchrun", "python")]


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["deepspeed", *SLOW_LAUNCHERS])
def test_every_launcher_starts_the_trainer(pipeline: Pipeline, launcher: str) -> None:
    done = launch(launcher, pipeline.run_file(f"by_{launcher}"), "--set", "run.total_steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    reader = CheckpointReader(pipeline.root / "runs" / f"by_{launcher}" / "step-00000003")
    assert reader.manifest["world"] == (1 if launcher == "python" else 2)
    summary = json.loads((pipeline.root / "runs" / f"by_{launcher}" / "train_summary.json").read_text())
    assert summary["steps"] == 3 and summary["samples_per_second"] > 0


@pytest.mark.launch
def test_bad_input_through_the_launcher_leaves_no_process(pipeline: Pipeline) -> None:
    file = pipeline.run_file("unknown_key_launched")
    done = launch("deepspeed", file, "--set", "data.labls=x")
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("error: unknown key") == 1
    assert living(str(file)) == {}


def test_a_port_in_use_is_named_by_rank_0(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--deepspeed_config", str(pipeline.run_file("port_of_rank_0"))]
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        process = mp.get_context("fork").Process(target=lambda: sys.exit(train.main(argv)))
        process.start()
        process.join(60)
    assert process.exitcode == 2
    assert f"port {port} is in use" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.launch
def test_a_port_in_use_is_named_by_the_launched_run(pipeline: Pipeline) -> None:
    file = pipeline.run_file("port")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        done = launch("deepspeed", file, port=taken.getsockname()[1])
        said = done.stdout + done.stderr
        assert done.returncode == 2, said
        assert f"port {taken.getsockname()[1]} is in use" in said
    assert living(str(file)) == {}


@pytest.mark.launch
def test_sigterm_saves_and_the_same_command_goes_on(pipeline: Pipeline) -> None:
    file = pipeline.run_file("term", run__total_steps=2000, run__save_every=1000, run__log_every=1)
    run = pipeline.root / "runs" / "term"
    words = [*command("python", 0), "--deepspeed_config", str(file)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not (run / "log.txt").exists() or "step 3/" not in (run / "log.txt").read_text():
            assert time.monotonic() < deadline and process.poll() is None, "the run did not begin"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
    saved = sorted(path.name for path in run.glob("step-*"))
    assert len(saved) == 1 and CheckpointReader(run / saved[0]).manifest["world"] == 1
    run_train(1, file, "--stop-after", str(int(saved[0][5:]) + 1), expect=143)
    assert f"resumed from {run / saved[0]}" in (run / "log.txt").read_text()
