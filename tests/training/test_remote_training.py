"""Training on remote shards: the bits of a run on local ones, also after kills, and one error on every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faultplan import Fault, FaultPlan
from harness import rank_fates, run_ranks
from offline_data import run as run_tool
from shard_server import ShardServer, serve
from train_run import Pipeline, run_train, tensors, train_rank

from megacid.data.index import load_index
from megacid.data.remote import cache
from megacid.data.remote.ahead import FetchAhead
from megacid.data.remote.cache import ShardCache
from megacid.storage import object_store as store

pytest.importorskip("aiohttp")


@dataclass
class Remote:
    """`server` has the tars of the pipeline, `stages` all of its folders."""

    pipeline: Pipeline
    server: ShardServer
    stages: ShardServer

    def run_file(self, name: str, cache: str, **changes: object) -> Path:
        """A run on the server's tars with the labels and teacher of the local ones."""
        options = {"data__cache_dir": str(self.pipeline.root / cache), "data__workers": 1, "data__block_shards": 1}
        return self.pipeline.run_file(name, **{"data__shards": self.server.url, **options, **changes})

    @property
    def side_tables(self) -> dict[str, object]:
        """Settings of a run whose embeddings and labels are remote."""
        return {f"data__{name}": f"{self.stages.url}/{folder}" for name, folder in STAGES.items()}

    def forget(self) -> None:
        """Remove the tars and the embeddings of the cache."""
        for path in (self.pipeline.root / "cache").glob("*/*-*.*"):
            path.unlink()

    def step(self, name: str) -> Path:
        return self.pipeline.root / "runs" / name / "step-00000006"


STAGES = {"teacher": "teacher", "labels": "clusters"}


@pytest.fixture(scope="module")
def remote(pipeline: Pipeline) -> Iterator[Remote]:
    with serve(pipeline.shards) as server, serve(pipeline.root) as stages, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "RETRY_S", 0.6)
        patch.setattr(store, "_BACKOFF_S", 0.1)
        patch.setattr(cache, "ROOM_S", 0.5)
        load_index(server.url, cache=ShardCache.open(pipeline.root / "cache", 1))
        yield Remote(pipeline, server, stages)


def _train_and_kill_fetchers(argv: list[str], plan: str) -> int:
    """Every fetcher is killed at the second batch; then the plan kills the ranks."""
    real = FetchAhead._keep_running

    def keep_running(self: FetchAhead) -> None:
        real(self)
        if self._position.value >= 16 and self._starts == 1 and self._process is not None:
            os.kill(int(self._process.pid or 0), signal.SIGKILL)

    FetchAhead._keep_running = keep_running  # type: ignore[method-assign]
    FaultPlan.from_json(plan).install(int(os.environ.get("RANK", "0")))
    return train_rank(argv)


def check_equal(remote: Remote, one: str, other: str) -> None:
    want, got = tensors(remote.step(one)), tensors(remote.step(other))
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)


def test_embeddings_labels_and_centroids_by_url_train_the_student_of_a_disk(remote: Remote) -> None:
    remote.server.faults = {}
    run_train(1, remote.pipeline.run_file("disk", data__block_shards=1))
    remote.stages.gets.clear()
    run_train(1, remote.run_file("urls", "cache", data__workers=0, **remote.side_tables))
    check_equal(remote, "disk", "urls")
    assert remote.stages.gets["centroids.npy"] == 1 and remote.stages.gets["img_emb_00002.npy"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("side_tables", ["disk", "url"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_whose_fetchers_and_ranks_are_killed_ends_with_the_bits_of_one_on_a_disk(
    remote: Remote, world: int, side_tables: str
) -> None:
    disk, name = f"disk-{world}-{side_tables}", f"remote-{world}-{side_tables}"
    run_train(world, remote.pipeline.run_file(disk, data__workers=1, data__block_shards=1))
    file = remote.run_file(name, "cache", **(remote.side_tables if side_tables == "url" else {}))
    plan = FaultPlan(Fault("train:applied", "kill", step=4))
    argv = ["--deepspeed_config", str(file)]
    assert rank_fates(_train_and_kill_fetchers, world, argv, plan.to_json(), timeout_s=120) == [-9] * world
    remote.forget()
    remote.server.faults = {path.name: ["503", "cut"] for path in remote.pipeline.shards.glob("*.tar")}
    remote.stages.faults = {path.name: ["503", "cut"] for path in remote.pipeline.teacher.glob("img_emb/*")}
    run_train(world, file)
    check_equal(remote, disk, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00001.tar", "teacher/text_emb/text_emb_00001.npy"])
def test_a_file_that_disappears_ends_all_ranks_with_its_url(
    remote: Remote, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    file = remote.run_file(f"gone-{name[:2]}", "cache", **remote.side_tables)
    remote.forget()
    server = remote.server if name.endswith(".tar") else remote.stages
    remote.server.faults, remote.stages.faults = {}, {}
    server.faults = {Path(name).name: "404"}
    codes = run_ranks(train_rank, 2, ["--deepspeed_config", str(file)], timeout_s=120)
    remote.server.faults, remote.stages.faults = {}, {}
    assert codes == [66, 66]
    assert f"{server.url}/{name} does not exist in its store" in capfd.readouterr().err


def test_the_offline_tools_read_urls_and_find_them_again(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(remote.pipeline.root / "cache"))
    remote.server.faults = {}
    root = remote.pipeline.root
    model = f"local-dir:{root / 'model'}"
    run_tool("embed", "--shards", remote.server.url, "--out", root / "from-url", "--model", model)
    for path in remote.pipeline.teacher.glob("*_emb/*.npy"):
        assert (root / "from-url" / path.relative_to(remote.pipeline.teacher)).read_bytes() == path.read_bytes()
    for path in (root / "cache").glob("*/*.tar"):
        path.unlink()
    folders = ("--embeddings", root / "from-url", "--clusters", remote.pipeline.labels, "--out", root / "balance")
    run_tool("balance", *folders, "--threshold", 0.5, "--reshard", root / "kept")
    run_tool(
        "balance",
        *folders[:-1],
        root / "disk",
        "--shards",
        remote.pipeline.shards,
        "--threshold",
        0.5,
        "--reshard",
        root / "kept-disk",
    )
    assert [path.name for path in sorted((root / "kept").glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    for path in (root / "kept").glob("*.tar"):
        assert path.read_bytes() == (root / "kept-disk" / path.name).read_bytes()


REFUSED = {
    "not indexed": ({"data__shards": "URL/{00000..00009}.tar"}, "URL/00003.tar does not exist in its store"),
    "no cache": ({"data__cache_dir": None}, "URL is remote and has no cache: set MEGACID_CACHE_DIR, or data.cache_dir"),
    "too small": ({"data__cache_gb": 1e-5}, '"megacid.data.cache_gb" is 1e-05, expected at least 0.000'),
    "no package": ({"data__shards": "gs://bucket/laion"}, "gs://bucket/laion needs a package that is not installed"),
    "something else": ({"data__cache_dir": "ROOT/scenes"}, "/scenes is not a cache of shards, it has "),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_on_every_rank_before_the_first_step(
    remote: Remote, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    remote.server.faults = {}
    changes, message = REFUSED[case]

    def full(text: object) -> object:
        return text.replace("URL", remote.server.url).replace("ROOT", root) if isinstance(text, str) else text

    root = str(remote.pipeline.root)
    changes, message = {key: full(value) for key, value in changes.items()}, str(full(message))
    file = remote.run_file(case.replace(" ", "-"), "cache", **changes)
    codes = run_ranks(train_rank, 2, ["--deepspeed_config", str(file)], timeout_s=120)
    text = capfd.readouterr().err
    assert codes == [2, 2] and text.count(message) == 1, text
    assert not (remote.pipeline.root / "runs" / case.replace(" ", "-") / "step-00000003").exists()
