"""Runs an offline tool on forked ranks that may be killed; captures exit codes, output and files."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
from faultplan import Fault, FaultPlan
from harness import rank_fates
from offline_data import balance_args, cluster_args, embed_args, load_tool, results

from megacid import failpoints
from megacid.errors import run_tool
from megacid.offline.balance import stage as balance_stage
from megacid.offline.balance.context import BalanceContext

KILLED = -int(signal.SIGKILL)
REFERENCE = {"embed": "emb", "cluster": "clusters", "balance": "balance", "eval": "eval"}


def arguments(name: str, folder: Path, out: str) -> list[object]:
    if name == "embed":
        # The assignment must not depend on the speed of the ranks; test_work_queue.py tests dynamic sharding.
        return [*embed_args(folder, out), "--sharding", "static"]
    if name == "cluster":
        return cluster_args(folder, out)
    if name == "balance":
        return balance_args(folder, out, "--target-keep", 0.6)
    return [
        *("--model", f"local-dir:{folder / 'model'}", "--dataset-root", folder / "bench"),
        *("--out", folder / out, "--batch-size", 4, "--device", "cpu"),
    ]


def tool_rank(
    name: str, args: list[object], plan: FaultPlan, hooks: dict[str, Callable[..., None]], output: Path
) -> int:
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    sys.stdout = sys.stderr = file = open(f"{output}.{rank}", "w", buffering=1)  # noqa: SIM115
    logging.getLogger().handlers = [logging.StreamHandler(file)]
    balance_stage.BalanceContext = partial(BalanceContext, part_pairs=40)  # type: ignore[misc]  a few clusters each
    plan.install(rank)
    failpoints.hooks.update(hooks)
    tool = load_tool(name)
    return run_tool(lambda: tool.main([str(arg) for arg in args]))


class Tool:
    """A tool on forked ranks. `output`: output of each rank in the last run."""

    def __init__(self, name: str, folder: Path, out: str, log: Path) -> None:
        self.name, self.args, self.out, self.log = name, arguments(name, folder, out), folder / out, log
        self.output: list[str] = []

    def fates(
        self,
        world: int,
        *faults: Fault,
        hooks: dict[str, Callable[..., None]] | None = None,
        meanwhile: Callable[[list[int]], None] | None = None,
        more: list[object] | None = None,
    ) -> list[int]:
        ends = rank_fates(
            tool_rank,
            world,
            self.name,
            self.args + (more or []),
            FaultPlan(*faults),
            hooks or {},
            self.log,
            meanwhile=meanwhile,
        )
        self.output = [Path(f"{self.log}.{rank}").read_text() for rank in range(world)]
        return ends

    def equals(self, reference: Path) -> None:
        """Assert that both folders have the same files with the same bits."""
        mine, expected = results(self.out), results(reference)
        assert mine.keys() == expected.keys()
        assert [name for name in mine if mine[name] != expected[name]] == []
        assert not list(self.out.parent.glob(f".{self.out.name}.*"))
