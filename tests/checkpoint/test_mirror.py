"""Checkpoints at a mirror are whole or not there, and come back as they were; a mirror that fails is a warning."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faultplan import Fault, FaultPlan, kill
from harness import rank_fates, run_ranks
from mirror_data import content, flip, make_saver, save
from s3_server import s3_at, s3_bucket

from megacid.checkpoint import store
from megacid.checkpoint.copier import Copier
from megacid.checkpoint.mirror import Mirror
from megacid.checkpoint.saver import Saver
from megacid.distributed.divided_work import ALONE, Workers
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.storage import object_store


def save_on_ranks(root: Path, url: str, steps: list[int], plan: str = "[]") -> None:
    FaultPlan.from_json(plan).install(dist.get_rank())
    saver = make_saver(root, url, group=dist.group.WORLD)
    save(saver, *steps)
    saver.close()


def fetch_on_ranks(root: Path, url: str, step: int) -> str | None:
    rank, world = dist.get_rank(), dist.get_world_size()
    workers = Workers(Parallel(rank, world, 0, torch.device("cpu"), dist.group.WORLD))
    return Mirror(url, keep_last=2).fetch(step, root, workers)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_S", 0.15)
    monkeypatch.setattr(object_store, "_BACKOFF_S", 0.05)


@pytest.fixture
def copied(tmp_path: Path) -> Mirror:
    """A mirror with the steps 1 and 2 of the run directory tmp_path/"run"."""
    saver = make_saver(tmp_path / "run", str(tmp_path / "mirror"))
    save(saver, 1, 2)
    saver.close()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert saver.copier is not None
    saver.copier.mirror.put_config(tmp_path / "run")
    return saver.copier.mirror


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket():
        yield "s3://bucket"


@pytest.fixture(params=["path", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "mirror") if request.param == "path" else request.getfixturevalue("bucket") + "/runs/a"


def test_what_two_ranks_copy_comes_back_as_it_was_and_old_steps_are_removed(tmp_path: Path, url: str) -> None:
    run_ranks(save_on_ranks, 2, tmp_path / "run", url, [1, 2, 3, 4])
    mirror = Mirror(url, keep_last=2)
    assert mirror.steps() == [3, 4] == [step for step, _ in store.list_steps(tmp_path / "run")]
    assert mirror.steps() == sorted(mirror._folders())
    assert run_ranks(fetch_on_ranks, 2, tmp_path / "empty", url, 4) == [None, None]
    name = store.step_name(4)
    assert content(tmp_path / "empty" / name) == content(tmp_path / "run" / name)
    assert [path.name for path in (tmp_path / "empty").iterdir()] == [name]  # no stage
    store.verify(tmp_path / "empty" / name, to_resume=True)


@pytest.mark.parametrize(
    "fault",
    [
        kill("mirror:file", rank=1, step=2),
        kill("mirror:before_manifest", rank=0, step=2),
        pytest.param(kill("mirror:file", rank=0, step=2, nth=2), marks=pytest.mark.slow),  # at the manifest
        pytest.param(kill("mirror:file", step=2), marks=pytest.mark.slow),
    ],
)
def test_a_kill_in_the_middle_of_a_copy_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, fault: Fault) -> None:
    url, run = str(tmp_path / "mirror"), tmp_path / "run"
    plan = FaultPlan(fault).to_json()
    assert -9 in rank_fates(save_on_ranks, 2, run, url, [1, 2], plan, timeout_s=10)
    mirror = Mirror(url, keep_last=2)
    assert mirror.steps() == [1]
    assert mirror.fetch(2, tmp_path / "empty", ALONE) == f"{url}/step-00000002 has no manifest.json"
    run_ranks(save_on_ranks, 2, run, url, [2, 3])  # the next run goes over it
    assert mirror.steps() == [2, 3]
    assert mirror.fetch(2, tmp_path / "empty", ALONE) is None


def test_a_partial_copy_that_no_run_goes_on_with_is_removed(copied: Mirror, tmp_path: Path) -> None:
    (tmp_path / "mirror" / "step-00000002" / "manifest.json").unlink()
    saver = make_saver(tmp_path / "run", copied.url)
    save(saver, 3)
    saver.close()
    assert sorted(copied._folders()) == copied.steps() == [1, 3]


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped": ("student-00000.safetensors", flip, "student-00000.safetensors has changed (828 bytes with sha256 "),
    "cut": (
        "student-00000.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        "student-00000.safetensors has changed (100 bytes with sha256 ",
    ),
    "missing": ("student-00000.safetensors", Path.unlink, "student-00000.safetensors does not exist in its store"),
    "manifest": ("manifest.json", flip, "/manifest.json cannot be read: "),
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "/manifest.json cannot be read: "),
    "no manifest": ("manifest.json", Path.unlink, "step-00000002 has no manifest.json"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_not_fetched(copied: Mirror, tmp_path: Path, case: str, impatient: None) -> None:
    name, damage, message = DAMAGES[case]
    damage(tmp_path / "mirror" / "step-00000002" / name)
    problem = copied.fetch(2, tmp_path / "empty", ALONE)
    assert problem is not None and problem.startswith(copied.url) and message in problem and "\n" not in problem
    assert not (tmp_path / "empty").exists() or list((tmp_path / "empty").iterdir()) == []
    assert copied.fetch(1, tmp_path / "empty", ALONE) is None
    assert (tmp_path / "empty" / "config.json").read_text() == "{}"


def test_damage_in_the_share_of_the_second_rank_is_the_same_problem_on_both(tmp_path: Path, impatient: None) -> None:
    url = str(tmp_path / "mirror")
    run_ranks(save_on_ranks, 2, tmp_path / "run", url, [1])
    path = tmp_path / "mirror" / "step-00000001" / "student-00001.safetensors"
    flip(path)
    first, second = run_ranks(fetch_on_ranks, 2, tmp_path / "empty", url, 1)
    assert first is not None and first.startswith(f"{path} has changed (") and first == second
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_fetch_replaces_a_damaged_step_of_the_run_directory(copied: Mirror, tmp_path: Path) -> None:
    expected = content(tmp_path / "run" / "step-00000002")
    flip(tmp_path / "run" / "step-00000002" / "student-00000.safetensors")
    assert copied.fetch(2, tmp_path / "run", ALONE) is None
    assert content(tmp_path / "run" / "step-00000002") == expected
    assert len(list((tmp_path / "run").glob(".replaced-step-00000002-*"))) == 1


def test_a_kill_during_a_fetch_leaves_no_checkpoint(copied: Mirror, tmp_path: Path) -> None:
    def fetch() -> None:
        FaultPlan(kill("mirror:fetched")).install(0)
        copied.fetch(2, tmp_path / "empty", ALONE)

    assert rank_fates(fetch, 1) == [-9]
    assert store.list_steps(tmp_path / "empty") == []
    store.remove_stages(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_damaged_checkpoints_do_not_displace_whole_ones_at_the_mirror(copied: Mirror, tmp_path: Path) -> None:
    saver = make_saver(tmp_path / "run", copied.url)
    (tmp_path / "mirror" / "step-00000002" / "student-00000.safetensors").write_bytes(b"short")
    save(saver, 3)
    saver.close()
    assert copied.steps() == [1, 2, 3]  # 1 and 3 are the two whole ones
    copied.prune(3)
    assert copied.steps() == [1, 2, 3]


def test_going_back_removes_the_later_steps(copied: Mirror) -> None:
    copied.remove_after(2)
    assert copied.steps() == [1, 2]
    copied.remove_after(1)
    assert sorted(copied._folders()) == copied.steps() == [1]


# ---- a mirror that fails -------------------------------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_copy_that_fails_is_one_warning_and_the_next_one_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    saver, mirror = make_saver(tmp_path / "run", str(tmp_path / "mirror")), tmp_path / "mirror"
    plan = FaultPlan(Fault("mirror:file", "os_error", step=2, value=errno.ENOSPC))
    plan.install(0)
    try:
        save(saver, 1, 2, 3)
        saver.close()
    finally:
        FaultPlan.remove()
    (warning,) = warnings(caplog)
    assert warning.startswith(f"step 2 is not copied to {mirror}, training goes on: rank 0: [Errno 28] No space left")
    assert Mirror(str(mirror), keep_last=2).steps() == [1, 3]
    assert [step for step, _ in store.list_steps(tmp_path / "run")] == [2, 3]


def test_a_mirror_that_is_gone_is_one_warning_per_step_with_url_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    (tmp_path / "disk").write_text("not a directory")
    saver = make_saver(tmp_path / "run", f"file://{tmp_path}/disk/mirror")
    save(saver, 1, 2)
    saver.close()
    said = warnings(caplog)
    assert len(said) == 2
    for step, warning in enumerate(said, 1):
        assert warning.startswith(f"step {step} is not copied to file://{tmp_path}/disk/mirror, training goes on: rank")
        assert f"/disk/mirror/step-0000000{step}/student-00000.safetensors cannot be written, tried for" in warning
        assert "\n" not in warning


def fail_on_rank_1(root: Path, url: str, log: str) -> None:
    logging.getLogger("megacid").addHandler(logging.FileHandler(f"{log}.{dist.get_rank()}"))
    plan = FaultPlan(Fault("mirror:file", "os_error", rank=1, step=1, value=errno.EIO))
    save_on_ranks(root, url, [1, 2], plan.to_json())


def test_a_failure_on_one_rank_is_the_same_outcome_on_both_and_said_once(tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    run_ranks(fail_on_rank_1, 2, tmp_path / "run", url, str(tmp_path / "log"))
    assert Mirror(url, keep_last=2).steps() == [2]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert f"step 1 is not copied to {url}, training goes on: rank 1: [Errno 5] Input/output error" in said[0]
    assert "is not copied" not in said[1]


class Gated(Mirror):
    """Copies nothing but manifests before its gate is open."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root / "mirror"), keep_last=2)
        self.gate = threading.Event()

    def put(self, path: Path, step: int) -> None:
        if path.name != store.MANIFEST:
            self.gate.wait(30)
        super().put(path, step)


def gated_saver(root: Path, **options: Any) -> tuple[Saver, Gated]:
    mirror = Gated(root)
    return Saver(root / "run", keep_last=2, copier=Copier(mirror, **{"wait_s": 30, **options})), mirror


def test_a_save_returns_during_its_copy_and_the_next_one_waits_and_says_how_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    saver, mirror = gated_saver(tmp_path)
    save(saver, 1)
    for _ in range(5):
        saver.poll()
        time.sleep(0.02)
    assert mirror.steps() == [] and not any("waited" in text for text in caplog.messages)
    threading.Timer(0.3, mirror.gate.set).start()
    save(saver, 2)
    waited = [text for text in caplog.messages if "waited" in text]
    assert len(waited) == 1 and waited[0].endswith(f" s for the copy of step 1 to {mirror.url}")
    saver.close()
    assert mirror.steps() == [1, 2]


def test_a_copy_for_which_a_save_waits_too_long_leaves_the_next_steps_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver, mirror = gated_saver(tmp_path, wait_s=0.2)
    began = time.monotonic()
    save(saver, 1, *range(2, 30))  # one of them waits
    assert time.monotonic() - began < 28 * 0.2
    mirror.gate.set()
    saver.close(30)
    save(saver, 30)
    saver.close(30)
    said = warnings(caplog)
    assert len(said) == 29 and "step 2 is not copied" in said[0] and ": the copy of step 1 has not ended" in said[0]
    assert "step 1 is not copied" in said[-1] and "No such file" in said[-1]  # it was removed meanwhile
    assert mirror.steps() == [30]


def test_a_stop_waits_for_the_last_copy_as_long_as_it_may(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = [30.0]
    saver, mirror = gated_saver(tmp_path, time_left=lambda: left[0])
    save(saver, 1)
    left[0] = 0.0
    saver.close(30)
    (warning,) = warnings(caplog)
    assert "step 1 is not copied" in warning and "its copy has not ended after 0 s" in warning
    mirror.gate.set()
    time.sleep(0.2)  # the thread ends; nothing commits what it copied
    assert mirror.steps() == []


@pytest.mark.parametrize(
    ("url", "message"),
    {
        "https://host/runs": "expected a store that can be written",
        "nowhere://runs": "nowhere://runs/config.json cannot be opened (Protocol not known",
    }.items(),
)
def test_a_mirror_that_cannot_be_one_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Mirror(url, keep_last=2).read_config()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bucket_that_is_not_there_is_one_error(tmp_path: Path, bucket: str, impatient: None) -> None:
    (tmp_path / "config.json").write_text("{}")
    mirror = Mirror("s3://nowhere/runs", keep_last=2)
    assert mirror.read_config() is None and mirror.steps() == []
    with pytest.raises(UserError, match=r"^s3://nowhere/runs/config.json does not exist in its store \(") as error:
        mirror.put_config(tmp_path)
    assert "\n" not in str(error.value)


class Unavailable(BaseHTTPRequestHandler):
    """Answers 503, or nothing."""

    protocol_version = "HTTP/1.1"
    silent = False

    def answer(self) -> None:
        if self.silent:
            time.sleep(2)
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = answer

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("silent", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_store_that_answers_503_or_nothing_is_a_warning_after_the_retries(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    silent: bool,
) -> None:
    if silent:
        monkeypatch.setattr(object_store, "SILENCE_S", 0.5)
    monkeypatch.setattr(Unavailable, "silent", silent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with s3_at(f"http://127.0.0.1:{server.server_port}"):
            saver = make_saver(tmp_path / "run", "s3://bucket/runs")
            save(saver, 1)
            saver.close()
    finally:
        server.shutdown()
        server.server_close()
    (warning,) = warnings(caplog)
    assert "step 1 is not copied to s3://bucket/runs, training goes on: rank 0: s3://bucket/runs/step-" in warning
    assert "/student-00000.safetensors cannot be written, tried for " in warning
    assert ("Timeout" if silent else "Service Unavailable") in warning
