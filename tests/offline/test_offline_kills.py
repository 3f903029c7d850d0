"""Offline tools that are killed or asked to stop at every stage: the same command again gives the same bits.

The tools run in forked ranks, as their command lines do. F27 of the fault list.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faultplan import Fault, FaultPlan, kill
from harness import rank_fates
from offline_data import cluster_args, results, save_model, write_benchmark, write_shards
from offline_tool import KILLED, REFERENCE, Tool, tool_rank
from torch.utils.data import DataLoader, Dataset

from megacid.data.workers import worker_start
from megacid.distributed.stopping import StopRequest
from megacid.errors import EXIT_AGAIN
from megacid.offline import cluster_order
from megacid.offline.embed.stage import ShardBatchSampler

TERM = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a model, and what the uninterrupted tools make of them."""
    folder = tmp_path_factory.mktemp("kills")
    write_shards(folder / "shards")
    write_benchmark(folder / "bench")
    save_model(folder / "model", 0)
    for name, out in REFERENCE.items():
        tool = Tool(name, folder, out, folder / "log")
        assert tool.fates(1) == [0], tool.output
    return folder


@pytest.fixture
def tool(stage: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Tool]:
    number = len(list(stage.iterdir()))
    return lambda name: Tool(name, stage, f"{name}-{number}", tmp_path / "log")


ALONE = [
    *[("embed", kill("embed:partition", step=s)) for s in (0, 2)],
    *[("embed", kill(f"embed:{what}_written", step=1)) for what in ("image", "text", "metadata")],
    *[("embed", kill("embed:shard_done", step=s)) for s in (0, 1, 2)],
    *[("embed", kill("offline:file", nth=n)) for n in (1, 2, 6)],
    ("embed", kill("embed:before_meta")),
    ("cluster", kill("cluster:init")),
    *[("cluster", kill("cluster:iteration", step=s)) for s in (1, 4)],
    *[("cluster", kill("cluster:iteration_saved", step=s)) for s in (1, 3, 4)],
    *[("cluster", kill("cluster:labels", step=s)) for s in (0, 2)],
    *[("cluster", kill("offline:file", nth=n)) for n in (1, 3, 5, 8, 9)],
    *[("cluster", kill(f"cluster:{where}")) for where in ("labelled", "before_meta", "after_meta")],
    *[("balance", kill("balance:search", step=s)) for s in (1, 4)],
    *[("balance", kill("balance:cluster", step=s)) for s in (0, 3)],
    *[("balance", kill("balance:part", nth=n)) for n in (1, 2)],
    *[("balance", kill("balance:keep", step=s)) for s in (0, 2)],
    *[("balance", kill("offline:file", nth=n)) for n in (1, 8, 12)],
    *[("balance", kill(f"balance:{where}")) for where in ("report", "gallery", "before_meta", "after_meta")],
    *[("eval", kill("eval:before_result", nth=n)) for n in (1, 2)],
    ("eval", kill("eval:task_done")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), ALONE, ids=[f"{f.at}-{f.step}-{f.nth}" for _, f in ALONE])
def test_killed_tool_gives_the_same_bits_when_run_again(
    name: str, fault: Fault, stage: Path, tool: Callable[[str], Tool]
) -> None:
    one = tool(name)
    assert one.fates(1, fault) == [KILLED], one.output
    assert one.fates(1) == [0], one.output
    one.equals(stage / REFERENCE[name])


TOGETHER = [
    *[("embed", kill("embed:text_written", rank=r, step=s)) for r, s in ((0, 2), (1, 1))],
    ("embed", kill("embed:before_meta", rank=0)),
    ("cluster", kill("cluster:init", rank=1)),
    *[("cluster", kill("cluster:iteration", rank=r, step=3)) for r in (0, 1)],
    *[("cluster", kill("cluster:iteration_saved", rank=r, step=2)) for r in (0, 1)],
    *[("cluster", kill("cluster:labels", rank=r)) for r in (0, 1)],
    ("cluster", kill("cluster:before_meta", rank=0)),
    ("balance", kill("balance:search", rank=0, step=3)),
    ("balance", kill("balance:cluster", rank=1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), TOGETHER, ids=[f"{f.at}-rank{f.rank}" for _, f in TOGETHER])
def test_survivor_of_a_killed_rank_ends_with_one_line_and_the_next_run_gives_the_same_bits(
    name: str, fault: Fault, stage: Path, tool: Callable[[str], Tool]
) -> None:
    pair = tool(name)
    ends = pair.fates(2, fault)
    assert fault.rank is not None and ends[fault.rank] == KILLED
    survivor = 1 - fault.rank
    assert ends[survivor] == EXIT_AGAIN, pair.output[survivor]
    lines = [line for line in pair.output[survivor].splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and f"rank {survivor} of 2 lost contact with another rank" in lines[0]
    assert "Traceback" not in pair.output[survivor]
    assert pair.fates(2) == [0, 0], pair.output
    pair.equals(stage / REFERENCE[name])


STOPS = [
    ("embed", "embed:shard_done", 0, 0),
    ("embed", "embed:partition", None, 1),
    ("cluster", "cluster:init", 1, None),
    ("cluster", "cluster:iteration", 0, 2),
    ("cluster", "cluster:iteration_saved", 1, 3),
    ("cluster", "cluster:labels", 1, 1),
    ("balance", "balance:search", 0, 2),
    ("balance", "balance:cluster", None, None),
    ("balance", "balance:keep", 0, 0),
]


@pytest.mark.parametrize(("name", "at", "rank", "step"), STOPS, ids=[f"{at}-{rank}" for _, at, rank, _ in STOPS])
def test_a_signal_to_one_rank_stops_all_of_them(
    name: str, at: str, rank: int | None, step: int | None, stage: Path, tool: Callable[[str], Tool]
) -> None:
    number = signal.SIGINT if at in ("cluster:iteration", "balance:cluster") else signal.SIGTERM
    pair = tool(name)
    ends = pair.fates(2, Fault(at, "signal", rank=rank, step=step, value=number))
    assert ends == [128 + number] * 2, pair.output
    for output in pair.output:
        assert "Traceback" not in output and "error:" not in output
    assert pair.output[0].count(f"stopped by {signal.Signals(number).name}") == 1
    assert not (pair.out / "meta.json").exists()
    assert pair.fates(2) == [0, 0], pair.output
    pair.equals(stage / REFERENCE[name])


def test_sigterm_again_and_again_is_one_request(stage: Path, tool: Callable[[str], Tool]) -> None:
    one = tool("cluster")
    every = [
        Fault(at, "signal", nth=0, value=signal.SIGTERM) for at in ("cluster:iteration", "cluster:iteration_saved")
    ]
    assert one.fates(1, *every) == [TERM]
    assert one.fates(1) == [0]
    one.equals(stage / REFERENCE["cluster"])


def test_a_signal_when_all_is_done_changes_nothing(stage: Path, tool: Callable[[str], Tool]) -> None:
    pair = tool("cluster")
    assert pair.fates(2, Fault("cluster:after_meta", "signal", value=signal.SIGTERM)) == [0, 0], pair.output
    pair.equals(stage / REFERENCE["cluster"])


def test_a_rank_that_waits_for_the_others_passes_the_signal_on(stage: Path, tool: Callable[[str], Tool]) -> None:
    """Rank 1 has finished its tar and waits in a collective, where Python handlers do not run; rank 0 is still busy."""
    pair = tool("embed")

    def when_rank_1_waits(pids: list[int]) -> None:
        deadline = time.monotonic() + 30
        while not (pair.out / "metadata" / "metadata_00001.parquet").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(pids[1], signal.SIGTERM)

    slow = Fault("embed:partition", "sleep", rank=0, step=0, value=2.0)
    assert pair.fates(2, slow, meanwhile=when_rank_1_waits) == [TERM, TERM], pair.output
    assert not (pair.out / "metadata" / "metadata_00002.parquet").exists()
    assert pair.fates(2) == [0, 0]
    pair.equals(stage / REFERENCE["embed"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_leaves_no_worker(
    number: int, stage: Path, tool: Callable[[str], Tool], tmp_path: Path
) -> None:
    one = tool("embed")

    def to_the_group(step: int) -> None:
        os.setpgrp()  # the workers are in the group of pytest: move them into that of this rank
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.setpgid(int(child), os.getpid())
        (tmp_path / "group").write_text(str(os.getpid()))
        os.killpg(os.getpid(), number)
        time.sleep(0.5)  # the workers are dead, and their loader has noticed

    ends = one.fates(1, hooks={"embed:shard_done": to_the_group}, more=["--workers", 2])
    assert ends == [128 + number], one.output
    assert "Traceback" not in one.output[0], one.output
    with pytest.raises(ProcessLookupError):
        os.killpg(int((tmp_path / "group").read_text()), 0)
    assert one.fates(1, more=["--workers", 2]) == [0], one.output
    one.equals(stage / REFERENCE["embed"])


def test_eval_ends_at_once_and_leaves_no_half_result(stage: Path, tool: Callable[[str], Tool]) -> None:
    one = tool("eval")
    assert one.fates(1, Fault("eval:before_result", "signal", nth=2, value=signal.SIGTERM)) == [TERM], one.output
    assert "Traceback" not in one.output[0] and len(results(one.out)) == 1
    assert one.fates(1) == [0]
    one.equals(stage / REFERENCE["eval"])


def test_synthesize_leaves_no_hidden_folder_and_the_same_files(tmp_path: Path) -> None:
    args = ["features", "--out", "data", "--classes", 7, "--dim", 4, "--per-class", 3]

    def run(out: str, *faults: Fault) -> list[int]:
        here = [tmp_path / out if arg == "data" else arg for arg in args]
        return rank_fates(tool_rank, 1, "synthesize", here, FaultPlan(*faults), {}, tmp_path / "log")

    assert run("whole") == [0]
    for at in ("synthesize:before_meta", "offline:folder"):
        assert run("cut", kill(at)) == [KILLED]
        assert not (tmp_path / "cut").exists() and list(tmp_path.glob(".cut.tmp-*"))
        assert run("cut", Fault(at, "signal", value=signal.SIGTERM)) == [TERM]
        assert not list(tmp_path.glob(".cut.tmp-*"))
    assert run("cut") == [0]
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_balance_goes_on_where_it_was_killed(stage: Path, tool: Callable[[str], Tool]) -> None:
    """Nothing that was worked out is worked out again."""
    one = tool("balance")
    assert one.fates(1, kill("balance:report")) == [KILLED]
    assert one.fates(1, kill("balance:search"), kill("balance:cluster")) == [0], (
        "the search or the links were done again"
    )
    one.equals(stage / REFERENCE["balance"])


CROSS_CLUSTER = ["balance:pair", "balance:cross_cluster", "reshard:tar", "reshard:before_meta"]


def test_second_pass_and_copy_killed_anywhere_give_the_same_bits(stage: Path, tool: Callable[[str], Tool]) -> None:
    """One run is killed at every stage in turn, first one of two ranks; another is never interrupted."""

    def options(copy: str) -> list[object]:
        return ["--neighbor-clusters", 3, "--reshard", stage / copy]

    whole, cut = Tool("balance", stage, "across-whole", tool("balance").log), tool("balance")
    assert whole.fates(1, more=options("kept-whole")) == [0], whole.output
    assert json.loads((whole.out / "meta.json").read_text())["neighbor_clusters"] == 3
    assert cut.fates(2, kill("balance:candidate_clusters", rank=1), more=options("kept-cut")) == [EXIT_AGAIN, KILLED], (
        cut.output
    )
    for at in CROSS_CLUSTER:
        assert cut.fates(1, kill(at), more=options("kept-cut")) == [KILLED], (at, cut.output)
    assert cut.fates(2, more=options("kept-cut")) == [0, 0], cut.output
    cut.equals(whole.out)
    mine, expected = results(stage / "kept-cut"), results(stage / "kept-whole")
    for files in (mine, expected):
        del files["meta.json"]["source"]  # type: ignore[attr-defined]  # names the folder of the masks
    assert mine == expected and "sizes.json" in mine


def test_the_copy_in_cluster_order_killed_anywhere_gives_the_same_bits(
    stage: Path, tool: Callable[[str], Tool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is too small for the embeddings, and the bound for more than 12 of the 35 rows in a file."""
    monkeypatch.setattr(cluster_order, "machine_memory", lambda: 0)
    pair, more = tool("balance"), ["--memory-gb", 2.5e-6]
    ends = pair.fates(2, kill("cluster_order:block", rank=1, step=1), more=more)
    assert ends == [EXIT_AGAIN, KILLED], pair.output
    assert pair.fates(1, kill("cluster_order:file", step=1), more=more) == [KILLED], pair.output
    assert len(list(pair.out.glob(".work/cluster-order-0*"))) == 4  # a file, one with its .part, another .part
    assert pair.fates(2, more=more) == [0, 0], pair.output
    pair.equals(stage / REFERENCE["balance"])


def test_cluster_keeps_the_labels_that_fit(stage: Path, tool: Callable[[str], Tool]) -> None:
    one = tool("cluster")
    assert one.fates(1, kill("cluster:labels", step=1)) == [KILLED]
    first = (one.out / "labels" / "00000.parquet").stat().st_ino
    assert one.fates(1, kill("cluster:iteration")) == [0], "an iteration was done again"
    assert (one.out / "labels" / "00000.parquet").stat().st_ino == first
    one.equals(stage / REFERENCE["cluster"])


def test_labels_of_other_centroids_are_not_kept(stage: Path, tool: Callable[[str], Tool]) -> None:
    fresh, mixed = tool("cluster"), tool("cluster")
    fresh.out, fresh.args = stage / "fresh", [*cluster_args(stage, "fresh"), "--seed", 1]
    assert fresh.fates(1) == [0]
    assert mixed.fates(1, kill("cluster:labels", step=1)) == [KILLED]
    (mixed.out / "state.npz").unlink()
    # Other centroids for the same arguments, as another version of a library may give.
    settings = mixed.out / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"seed": 1}))
    assert mixed.fates(1, more=["--seed", 1]) == [0]
    mixed.equals(fresh.out)


class _Handlers(Dataset[tuple[bool, bool]]):
    """What a worker does with the two signals."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> tuple[bool, bool]:
        return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_workers_do_not_inherit_a_handler_that_only_takes_notes() -> None:
    with StopRequest():
        loader: DataLoader[tuple[bool, bool]] = DataLoader(_Handlers(), num_workers=1, worker_init_fn=worker_start())
        assert [bool(flag) for batch in loader for flag in batch] == [True] * 4
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_batch_never_crosses_from_one_tar_into_the_next() -> None:
    """A product rounds differently when its shape changes: a partition must not depend on what else is to do."""
    batches = list(ShardBatchSampler(np.array([3, 3, 8]), 4))
    assert batches == [[0, 1, 2], [3, 4, 5, 6], [7]]
