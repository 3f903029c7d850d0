"""Train a student: the entry point and the whole loop, top to bottom.

    deepspeed megacid/train.py --deepspeed_config configs/RUN.json [--set section.key=value ...] [--resume auto|never|PATH] [--dry-run] [--print-config]

`torchrun` and plain `python` start it as well. One file is one run; there are no modes: the objective is a weighted sum,
and plain CLIP training, distillation and clusters differ in their weights. A pure classification experiment is a run
file with features for data and the cluster term alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Launchers put this folder first on sys.path, where our modules would be found under bare names. Replace it by the
# repository and kernels/, so that a plain checkout works too.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(_ROOT), str(_ROOT / "kernels")] + [
    p for p in sys.path if Path(p or ".").resolve() != _ROOT / "megacid"
]

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megacid import PartialFC, RowAdamW, RowSGD
from megacid.assemble import make_classifier, make_objective, make_student, open_data, peak_rates, together
from megacid.checkpoint import state, store
from megacid.checkpoint.saver import SaveFailed, Saver
from megacid.classifier.health import concerns, health, hit_histogram
from megacid.config import RunFile, load_run
from megacid.data.batch import Batch, DataBudgetError
from megacid.distributed import parallel as parallel_module
from megacid.distributed.collectives import (
    RanksDisagree,
    agree,
    agree_on_mapping,
    barrier,
    broadcast_json,
    from_a_collective,
)
from megacid.distributed.parallel import Parallel
from megacid.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_DISAGREE,
    EXIT_NOT_FINITE,
    EXIT_NOT_SAVED,
    EXIT_STOPPED,
    EXIT_USER,
    UserError,
)
from megacid.losses import Objective
from megacid.probes import probe
from megacid.runtime.drift import check_drift, settings_of_this_rank, write_config
from megacid.runtime.estimate import memory_estimate
from megacid.runtime.guard import Guard, TooManySkips, Verdict
from megacid.runtime.lifecycle import Launcher, Lifecycle, RunLock, die_with_parent
from megacid.runtime.metrics import Metrics, setup_logging
from megacid.runtime.resume import Continuity, find_checkpoint
from megacid.runtime.schedule import learning_rate_share, parameter_groups
from megacid.runtime.watchdog import Watchdog
from megacid.student import Student
from megacid.tower import FeatureTower

log = logging.getLogger("megacid")


EXIT_CODES: dict[type[Exception], int] = {
    UserError: EXIT_USER,
    TooManySkips: EXIT_NOT_FINITE,
    DataBudgetError: EXIT_DATA,
    RanksDisagree: EXIT_DISAGREE,
    SaveFailed: EXIT_NOT_SAVED,
}
ON_EVERY_RANK = tuple(EXIT_CODES)
"""Errors that all ranks raise together, with the same text."""


# ---- the loop ----------------------------------------------------------------------------------------------------


def train(run: RunFile, args: argparse.Namespace, parallel: Parallel) -> int:
    # deepspeed takes seconds to import: not before the settings are known to be good.
    from megacid.distributed.engine import Engine

    config, directory = run.megacid.run, run.directory
    lock = together(lambda: RunLock(directory) if parallel.is_first else None, parallel)
    setup_logging(parallel.rank, directory)
    start_from = together(lambda: find_checkpoint(run, args.resume) if parallel.is_first else None, parallel)
    start_from = broadcast_json(start_from, parallel.group)
    if start_from is not None and store.read_manifest(Path(start_from))["step"] >= config.total_steps:
        log.info("already finished: %s has all %d steps", start_from, config.total_steps)
        return 0
    data = open_data(run, parallel)
    student = together(lambda: make_student(run, data), parallel)
    width = student.embed_dim
    run = run.with_embed_dim(width)
    if start_from is not None:
        together(lambda: check_drift(run, directory), parallel)
    head, row_optimizer = together(lambda: make_classifier(run, data, width, parallel), parallel)
    objective = make_objective(run, head, parallel)
    student.to(parallel.device)
    report_memory(run, student, head, parallel)
    engine = Engine(
        student,
        parameter_groups(student, float(run.deepspeed["optimizer"]["params"].get("weight_decay", 0.0))),
        run,
        parallel,
    )
    guard = Guard(run.gradient_clipping, run.megacid.guard, parallel.group)
    rows: dict[str, state.RowState] = (
        {"head": head, "optimizer": row_optimizer} if head is not None and row_optimizer is not None else {}
    )
    identity = {"num_classes": head.num_classes if head else 0, "embed_dim": width}

    start = 0
    if start_from is not None:
        engine.materialise_state(student.image_shape, student.text_length, run.accumulation)
        start = state.restore(Path(start_from), engine, rows, identity)
        guard.load_state(store.read_manifest(Path(start_from))["guard"])
        log.info("resumed from %s", start_from)
    elif parallel.is_first:
        write_config(run, directory, parallel.world)
    barrier(parallel.group)

    saver = Saver(directory, keep_last=config.keep_last, group=parallel.group, background=config.save_in_background)
    lifecycle = Lifecycle(parallel.group)
    watchdog = Watchdog(
        directory, parallel.rank, parallel.world, token=broadcast_json(str(time.time_ns()), parallel.group),
        limit_s=config.timeout_s, exit_code=EXIT_AGAIN, gone=Launcher().gone, on_orphan=lifecycle.ask,
    )  # fmt: skip
    continuity = Continuity(directory, start if start_from is not None else None, tolerance=1e-2 if run.bf16 else 1e-4)
    saved_at = start

    def save(step: int) -> None:
        nonlocal saved_at
        watchdog.beat("save", step, config.save_timeout_s)
        facts = {
            **identity,
            "updates": step - guard.skipped,
            "samples_seen": step * run.global_batch,
            "world": parallel.world,
            "guard": guard.state(),
        }
        saver.save(step, engine, rows, (head.class_start, head.class_stop) if head else (0, 0), facts)
        saved_at = step
        continuity.saved(step)

    metrics = Metrics(
        directory, first=parallel.is_first, start_step=start, total_steps=config.total_steps,
        global_batch=run.global_batch, world=parallel.world, log_every=config.log_every,
    )  # fmt: skip
    batches = iter(data.stream(start))
    stopped = False
    probe("start:ready", step=start)
    try:
        for step in range(start, config.total_steps):
            # The first step may compile kernels and open every shard.
            beat = partial(watchdog.beat, step=step, limit_s=config.save_timeout_s if step == start else None)
            share = learning_rate_share(step, config.total_steps, run.megacid.schedule)
            loss, terms, sample_ids, finite, failure = accumulate(
                step, run, batches, engine, objective, head, metrics, beat
            )
            probe("train:gradients", step=step, engine=engine, head=head)
            beat("decision")
            student_norm = engine.gradient_norm()
            head_norm_sq = head.grad_norm_sq() if head else None
            asked = lifecycle.asked or step + 1 == args.stop_after
            verdict = guard.decide(
                step,
                loss,
                student_norm,
                head_norm_sq,
                partial(describe, terms, sample_ids, finite),
                failure=failure,
                stop=asked,
            )
            if verdict.failure is not None:
                if step > saved_at:
                    save(step)
                raise DataBudgetError(verdict.failure)
            beat("update")
            step_both(engine, row_optimizer, verdict, share, peak_rates(run))
            probe("train:applied", step=step, engine=engine, head=head, verdict=verdict, sample_ids=sample_ids)
            if parallel.is_first:
                continuity.first_loss(step, verdict.loss)
            if metrics.due(step):
                diagnostics = {f"classifier/{n}": float(value) for n, value in head.metrics().items()} if head else {}
                facts = {
                    "train/lr": share * peak_rates(run)[0],
                    "train/grad_norm": verdict.grad_norm,
                    "train/skipped": float(guard.skipped),
                }
                metrics.log(step, loss, terms, {**facts, **diagnostics})
            if config.check_every and (step + 1) % config.check_every == 0:
                beat("check")
                check_ranks(step, engine, parallel)
            saver.poll()
            stopped = verdict.stop
            if stopped or (step + 1) % config.save_every == 0 or step + 1 == config.total_steps:
                save(step + 1)
                if head is not None:
                    report_classes(step, head, metrics, parallel)
                stopped = lifecycle.stop_requested() or stopped
            probe("train:step_end", step=step)
            if stopped:
                break
        watchdog.beat("end", step, config.save_timeout_s)
        saver.finish()
    except ON_EVERY_RANK:
        saver.finish()  # what is being written is of a good state
        raise
    finally:
        watchdog.close()
    metrics.close({"steps": step + 1 - start, "start_step": start, "skipped": guard.skipped, "world": parallel.world})
    if lock is not None:
        lock.release()
    if stopped and step + 1 < config.total_steps:
        log.info("stopped after step %d as asked; the same command goes on from there", step + 1)
        return EXIT_STOPPED
    log.info("finished: %s", directory)
    return 0


def accumulate(
    step: int,
    run: RunFile,
    batches: Iterator[Batch],
    engine: Any,
    objective: Objective,
    head: PartialFC | None,
    metrics: Metrics,
    beat: Callable[[str], None],
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int], list[torch.Tensor], str | None]:
    """Forward and backward of the micro-batches of one step: (mean loss, mean terms, sample ids of this rank, which of
    them have finite embeddings, why the data of this rank end the run)."""
    losses: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    sample_ids: list[int] = []
    finite: list[torch.Tensor] = []
    failure = None
    for micro in range(run.accumulation):
        beat("data")
        began = time.perf_counter()
        batch = next(batches)
        sample_ids += batch.sample_id.tolist()
        failure = failure or batch.failure
        batch = batch.to(engine.device)
        metrics.waited_for_data(time.perf_counter() - began)
        probe("train:batch", step=step, batch=batch)
        if head is not None:
            head.set_step(step)  # micro-batches share their negatives: the rows of a step stay as many
        beat("forward")
        out = engine(batch.image, batch.text)
        loss, terms = objective(out, batch)
        finite.append(torch.isfinite(out.image.detach()).all(dim=-1))
        beat("backward")
        engine.backward(loss)
        if micro + 1 < run.accumulation:
            engine.micro_step()
        losses.append(loss.detach())
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value / run.accumulation
    return torch.stack(losses).mean(), sums, sample_ids, finite, failure


def step_both(
    engine: Any, row_optimizer: RowAdamW | RowSGD | None, verdict: Verdict, share: float, peaks: tuple[float, float]
) -> None:
    """Both optimizers step with the one clipping factor, or neither does."""
    if verdict.apply:
        engine.step(lr=share * peaks[0], clip_scale=verdict.clip_scale)
        if row_optimizer is not None:
            row_optimizer.lr = share * peaks[1]
            row_optimizer.step(grad_scale=verdict.clip_scale)
    else:
        engine.skip()
    if row_optimizer is not None:
        row_optimizer.zero_grad()


def describe(terms: dict[str, torch.Tensor], sample_ids: list[int], finite: list[torch.Tensor]) -> tuple[bool, str]:
    """For the guard's warnings: whether samples of this rank have non-finite embeddings, and loss terms and samples."""
    bad = [number for number, good in zip(sample_ids, torch.cat(finite).tolist()) if not good]
    named = bad or sample_ids
    shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
    kind = "samples with a non-finite embedding" if bad else "samples"
    said = ", ".join(f"{name} {float(value):.6g}" for name, value in terms.items())
    return bool(bad), f"terms {said}; {kind} {shown}"


def check_ranks(step: int, engine: Any, parallel: Parallel) -> None:
    """RanksDisagree when ranks are at different steps, or their replicas of the student differ in a bit."""
    agree(str(step), "the step", parallel.group)
    digest = engine.replica_digest()
    if digest is not None:
        agree(digest, f"the student's weights after step {step + 1} (replicas have drifted apart)", parallel.group)


def report_classes(step: int, head: PartialFC, metrics: Metrics, parallel: Parallel) -> None:
    """Facts about the classes as a whole, at every checkpoint. A collective."""
    facts = health(head)
    metrics.log_classes(step, facts, hit_histogram(head))
    for concern in concerns(facts) if parallel.is_first else ():
        log.warning("%s", concern)


# ---- start -------------------------------------------------------------------------------------------------------


def report_memory(run: RunFile, student: Student | FeatureTower, head: PartialFC | None, parallel: Parallel) -> None:
    parameters = sum(p.numel() for p in student.parameters())
    parts = memory_estimate(
        run, parameters, head.num_classes if head else 0, student.embed_dim, parallel.world, parallel.device.type
    )
    log.info("student %s: %.2f M parameters, width %d; classes %d; ranks %d; ZeRO stage %d; batch %d = %d x %d x %d ranks",
             run.megacid.student.model, parameters / 1e6, student.embed_dim, head.num_classes if head else 0, parallel.world, run.zero_stage,
             run.global_batch, run.micro_batch, run.accumulation, parallel.world)  # fmt: skip
    log.info(
        "memory of rank 0 without activations: %.1f MiB (%s)",
        sum(parts.values()),
        ", ".join(f"{name} {size:.1f}" for name, size in parts.items()),
    )


def dry_run(run: RunFile, parallel: Parallel) -> int:
    """Everything that can be checked without training: data, joins, one batch, student, classifier, memory. Writes nothing to the run directory."""
    setup_logging(parallel.rank, None)
    data = open_data(run, parallel)
    together(lambda: next(iter(data.stream(0))), parallel)
    student = together(lambda: make_student(run, data), parallel)
    together(lambda: check_drift(run.with_embed_dim(student.embed_dim), run.directory), parallel)
    head, _ = together(lambda: make_classifier(run, data, student.embed_dim, parallel), parallel)
    make_objective(run, head, parallel)
    report_memory(run, student, head, parallel)
    log.info("dry run: %s is good for %d steps on %d ranks", run.path, run.megacid.run.total_steps, parallel.world)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a student: contrastive, distillation and cluster terms by weight."
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        required=True,
        metavar="RUN.json",
        help="the run file: DeepSpeed's keys and a megacid block",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the run file; may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="newest whole checkpoint of the run (default), none, or this one",
    )
    parser.add_argument(
        "--stop-after",
        type=int,
        default=0,
        metavar="STEP",
        help="save and stop after this step (exit code 143), as if asked by a signal",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what the run needs, train nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved run file as JSON and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    die_with_parent()
    first = os.environ.get("RANK", "0") == "0"
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        run = load_run(args.deepspeed_config, args.set, world=world)
        if args.print_config:
            if first:
                print(json.dumps(run.resolved(), indent=2))
            return 0
        limits = run.megacid.run
        # The watchdog speaks first; the collectives' own timeout is for when it cannot.
        longest = max(limits.timeout_s, limits.save_timeout_s) + 60
        parallel = parallel_module.init(longest, always=not args.dry_run)
        agree_on_mapping(settings_of_this_rank(run, world), "the run", parallel.group)
        return dry_run(run, parallel) if args.dry_run else train(run, args, parallel)
    except ON_EVERY_RANK as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES[type(error)]
    except Exception as error:
        if not from_a_collective(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error: rank {rank} cannot reach the other ranks any more ({str(error).strip().splitlines()[0]}): one has "
              "ended or is late, its own message says why; start the same command again", file=sys.stderr, flush=True)  # fmt: skip
        return EXIT_AGAIN
    finally:
        parallel_module.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
