#!/usr/bin/env python3
"""Train and evaluate the arms of a study with several seeds, and report means, intervals and paired differences.

    tools/study.py configs/study/icons.json --out runs/study                 every arm of the file
    tools/study.py configs/study/icons.json --out runs/study --arms core     the arms of a group, or single arms
    tools/study.py configs/study/icons.json --out runs/study --test          also evaluate the test sets
    tools/study.py configs/study/icons.json --out runs/study --report        the tables of what is finished

The stages that arms share are done once: teacher, embeddings, clusters, subsets. Each arm then tries learning rates
with the first seed: the middle one of the file, then the neighbours of the best on the validation sets until the best
has no untried neighbour. The other seeds are trained at that rate. The test sets are evaluated with --test alone, for
the chosen rates.

OUT/results/ gets one JSON file per run and per stage, with settings, metrics, seconds and versions. After an
interruption run the same command again: what is finished is kept, an interrupted run resumes. A result that was made
with other settings is refused.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from launching import run_logged, training_command
from megacid.data.index import load_index
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import read_json, write_json_atomic
from megacid.storage.metadata import machine, versions
from study_file import TEACHER, load_study
from study_plan import Plan, Run, Stage
from study_report import best_rate, load_results, next_rate, report
from study_subsets import one_of_each, random_subset, subset_facts

CORES = len(os.sched_getaffinity(0))  # fewer than the machine's under taskset: two studies can share a machine
ACROSS = 4  # neighbour clusters whose pairs balance compares, too: copies can lie on both sides of a border


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("file", type=local_path, metavar="STUDY.json", help="arms, seeds and stages of the study")
    parser.add_argument("--out", type=local_path, required=True, help="directory for stages, runs and results")
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="groups or arms (default: all)")
    parser.add_argument("--corpus", type=local_path, help="corpus (default: that of the file)")
    parser.add_argument("--test", action="store_true", help="also evaluate the chosen runs on the test sets")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished runs; train nothing")
    return parser.parse_args(argv)


@contextmanager
def measured(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the wall time of the block and the CPU time of its processes, as NAME_wall and NAME_cpu."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    wall, before = time.monotonic(), cpu()
    yield
    seconds |= {f"{name}_wall": round(time.monotonic() - wall, 1), f"{name}_cpu": round(cpu() - before, 1)}


class Runner:
    """Does the stages and runs of a plan that OUT/results does not have."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.out, self.results = plan, plan.out, plan.out / "results"

    # ---- records ----

    def stored(self, name: str, digest: str) -> dict[str, Any] | None:
        """The result with this name; None when there is none. UserError when it has another digest."""
        path = self.results / f"{name}.json"
        result = read_json(path)
        if result is None:
            return None
        if result.get("digest") != digest:
            raise UserError(
                f"{path} has the digest {result.get('digest')}, expected {digest}: the settings, corpus or stages of "
                "this study are others; choose another --out"
            )
        return dict(result)

    def record(self, name: str, digest: str, **facts: Any) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        result = {"digest": digest, **facts, "machine": machine(), "versions": versions(), "date": now}
        write_json_atomic(self.results / f"{name}.json", result)
        return result

    # ---- processes ----

    def tool(self, name: str, log: str, *arguments: object) -> None:
        words = [sys.executable, str(Path(__file__).parent / f"{name}.py"), *map(str, arguments)]
        environment = {"OMP_NUM_THREADS": str(CORES)}
        run_logged(words, self.out / "logs" / f"{log}.out", f"tools/{name}.py for {log}", environment)

    def train(self, name: str, run_file: str, changes: tuple[str, ...]) -> None:
        ranks = self.plan.file.study.ranks
        environment = {"OMP_NUM_THREADS": str(-(-CORES // ranks))}  # the ranks share the cores
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        words = training_command(run_file, changes, ranks)
        run_logged(words, self.out / "logs" / f"{name}.out", f"training of {name}", environment)

    # ---- stages ----

    def stage(self, stage: Stage) -> None:
        """Do a stage unless it is finished. The tools continue what they were interrupted in."""
        name = f"stage-{stage.name.replace('/', '-')}"
        if self.stored(name, stage.digest) is not None:
            return
        print(f"stage {stage.name}", flush=True)
        kind, _, item = stage.name.partition("/")
        work: dict[str, Callable[[str], None]] = {
            TEACHER: lambda _: self.make_teacher(),
            "embeddings": lambda _: self.embed(),
            "clusters": self.cluster,
            "subsets": self.choose,
        }
        seconds: dict[str, float] = {}
        with measured(seconds, "stage"):
            work[kind](item)
        facts: dict[str, Any] = {"stage": stage.name, "settings": stage.settings, "seconds": seconds}
        if kind == "subsets" and (self.plan.corpus / "pairs.parquet").is_file():
            facts |= subset_facts(self.plan.corpus, self.out / stage.name)
        self.record(name, stage.digest, **facts)

    def make_teacher(self) -> None:
        self.train(TEACHER, self.plan.file.study.teacher, tuple(self.plan.teacher_changes()))
        self.tool("export", "export", "--run", self.out / "runs" / TEACHER, "--out", self.out / TEACHER)

    def embed(self) -> None:
        where = ("--shards", self.plan.shards, "--out", self.out / "embeddings")
        self.tool("embed", "embeddings", *where, "--model", f"local-dir:{self.out / TEACHER}")

    def cluster(self, name: str) -> None:
        found = self.plan.file.clusters[name]
        where = ("--embeddings", self.out / "embeddings", "--out", self.out / "clusters" / name)
        keep = () if found.of is None else ("--keep", self.out / "subsets" / found.of)
        self.tool("cluster", f"clusters-{name}", *where, "--k", found.k, "--top-labels", found.top_labels, *keep)

    def choose(self, name: str) -> None:
        found, out = self.plan.file.subsets[name], self.out / "subsets" / name
        if found.random_as is not None:
            random_subset(self.plan.shards, self.out / "subsets" / found.random_as, out)
            return
        if found.one_of is not None:
            one_of_each(self.plan.corpus, found.one_of, float(found.share or 1), out)
            return
        where = ("--shards", self.plan.shards, "--embeddings", self.out / "embeddings", "--out", out)
        inside: tuple[object, ...] = ("--cells", found.cells)
        if found.clusters is not None:
            inside = ("--clusters", self.out / "clusters" / found.clusters)
        how = ("--target-keep", found.share, "--link", found.link, "--keep", found.keep, "--neighbor-clusters", ACROSS)
        self.tool("balance", f"subsets-{name}", *where, *inside, *how)

    # ---- runs ----

    def evaluate(self, run: str, part: str) -> dict[str, float]:
        """Metrics of a run on the validation or test sets."""
        out = self.out / "evaluation" / run / part
        for name in getattr(self.plan.file.study, part):
            what = ("--run", self.out / "runs" / run, "--dataset-root", self.plan.corpus / name, "--out", out)
            # Seldom concepts have too few training pictures for a probe.
            tasks = ("--tasks", "zero_shot") if name.startswith("seldom-") else ()
            self.tool("eval", f"{run}-{name}", *what, *tasks)
        scores: dict[str, float] = {}
        for path in sorted(out.glob("*.json")):
            result = json.loads(path.read_text())
            prefix = "seldom_" if result["dataset"].startswith("seldom-") else ""
            scores |= {prefix + key: value for key, value in result["metrics"].items() if isinstance(value, float)}
        return scores

    def teacher_result(self) -> dict[str, Any]:
        """The teacher on the validation sets, as a row of the tables."""
        stage, seed = self.plan.teacher, self.plan.file.study.seeds[0]
        result = self.stored(TEACHER, stage.digest)
        if result is None:
            metrics = {"validation": self.evaluate(TEACHER, "validation")}
            result = self.record(TEACHER, stage.digest, arm=TEACHER, seed=seed, metrics=metrics)
        return result

    def run(self, run: Run) -> dict[str, Any]:
        """Train and evaluate on the validation sets, unless that is finished."""
        result = self.stored(run.name, run.digest)
        if result is not None:
            return result
        resumed = (self.out / "runs" / run.name).exists()
        seconds: dict[str, float] = {}
        with measured(seconds, "training"):
            self.train(run.name, self.plan.file.study.student, run.changes)
        with measured(seconds, "evaluation"):
            metrics = {"validation": self.evaluate(run.name, "validation")}
        facts = {"arm": run.arm, "rate": run.rate, "seed": run.seed, "settings": run.settings, "metrics": metrics}
        # The seconds of a resumed run are those since it was resumed.
        result = self.record(run.name, run.digest, **facts, seconds=seconds, resumed=resumed)
        score = metrics["validation"].get(self.plan.file.study.tune_on)
        print(f"{run.name}: {self.plan.file.study.tune_on} {score}, {seconds['training_wall']:.0f} s", flush=True)
        return result

    def arm(self, arm: str) -> list[tuple[str, dict[str, Any]]]:
        """The results of an arm at its chosen learning rate, one per seed, with their names."""
        seeds, tune_on = self.plan.file.study.seeds, self.plan.file.study.tune_on
        runs = [self.plan.run(arm, rate, seeds[0]) for rate in self.plan.rates(arm)]
        tried = [found for run in runs if (found := self.stored(run.name, run.digest)) is not None]
        while (rate := next_rate(self.plan.rates(arm), tried, tune_on)) is not None:
            tried.append(self.run(self.plan.run(arm, rate, seeds[0])))
        rate = best_rate(tried, tune_on)
        runs = [self.plan.run(arm, rate, seed) for seed in seeds]
        return [(run.name, self.run(run)) for run in runs]

    def test(self, name: str, result: dict[str, Any]) -> None:
        """Add the test sets to a result that does not have them: they are evaluated once."""
        if "test" in result["metrics"]:
            return
        result["metrics"]["test"] = self.evaluate(name, "test")
        result["test_date"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(self.results / f"{name}.json", result)


def check_corpus(corpus: Path, sets: tuple[str, ...]) -> None:
    for name in ("train", *sets):
        if not (corpus / name).is_dir():
            raise UserError(
                f"{corpus} has no folder {name}, expected the output of tools/prepare_icons.py: correct --corpus"
            )


def study(args: argparse.Namespace) -> int:
    file = load_study(args.file)
    named, arms = file.named(args.arms), file.chosen(args.arms)
    results = args.out / "results"
    if args.report:
        print(report(load_results(results), file, named))
        return 0
    corpus = args.corpus or Path(file.study.corpus)
    check_corpus(corpus, (*file.study.validation, *file.study.test))
    plan = Plan(file, args.out, corpus, load_index(str(corpus / "train")).digest)
    runner = Runner(plan)
    for arm in arms:  # every setting is checked before the first stage
        for rate in plan.rates(arm):
            run = plan.run(arm, rate, file.study.seeds[0])
            runner.stored(run.name, run.digest)
    for stage in plan.stages(arms):
        runner.stage(stage)
    finished = [(TEACHER, runner.teacher_result())]
    for arm in arms:
        finished += runner.arm(arm)
    if args.test:
        for name, result in finished:
            runner.test(name, result)
    print(f"\n{report(load_results(results), file, named)}\n\n{results}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_alone(lambda: study(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
