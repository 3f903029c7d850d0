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
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megacid.checkpoint import store
from megacid.checkpoint.saver import SaveFailed, Saver
from megacid.classifier.health import health, health_warnings, hit_histogram
from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.data.batch import Batch, DataBudgetError
from megacid.distributed import parallel as parallel_module
from megacid.distributed.consensus import (
    RanksDisagree,
    agree,
    agree_on_mapping,
    broadcast_json,
    from_a_collective,
    gather_json,
)
from megacid.distributed.parallel import Parallel
from megacid.distributed.parent_process import set_parent_death_signal
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
from megacid.failpoints import failpoint
from megacid.training.components import make_classifier, make_objective, make_student, open_data, peak_rates, together
from megacid.training.guard import TooManySkips, Verdict
from megacid.training.lifecycle import Launcher, Lifecycle, RunLock
from megacid.training.metrics import Metrics, setup_logging
from megacid.training.resume import ResumeLossCheck, find_checkpoint
from megacid.training.run_settings import check_same_settings, settings_of_this_rank
from megacid.training.schedule import learning_rate_share
from megacid.training.state import Parts, build, report_memory, resume
from megacid.training.watchdog import Watchdog

log = logging.getLogger("megacid")


EXIT_CODES: dict[type[Exception], int] = {
    TooManySkips: EXIT_NOT_FINITE,
    DataBudgetError: EXIT_DATA,
    RanksDisagree: EXIT_DISAGREE,
    SaveFailed: EXIT_NOT_SAVED,
}
ON_EVERY_RANK = tuple(EXIT_CODES)
"""Errors that all ranks raise together, with the same text."""


# ---- the loop ----------------------------------------------------------------------------------------------------


def train(run: RunFile, args: argparse.Namespace, parallel: Parallel) -> int:
    config, directory = run.megacid.run, run.directory
    lock = together(lambda: RunLock(directory) if parallel.is_first else None, parallel)
    setup_logging(parallel.rank, directory)
    start_from = together(lambda: find_checkpoint(run, args.resume) if parallel.is_first else None, parallel)
    start_from = broadcast_json(start_from, parallel.group)
    if start_from is not None and store.read_manifest(Path(start_from))["step"] >= config.total_steps:
        log.info("already finished: %s has all %d steps", start_from, config.total_steps)
        return 0
    parts = build(run, parallel)
    start = resume(parts, start_from)
    saver = Saver(directory, keep_last=config.keep_last, group=parallel.group, background=config.save_in_background)
    lifecycle = Lifecycle(parallel.group)
    watchdog = Watchdog(
        directory, parallel.rank, parallel.world, token=broadcast_json(str(time.time_ns()), parallel.group),
        limit_s=config.timeout_s, exit_code=EXIT_AGAIN, gone=Launcher().gone, on_orphan=lifecycle.request_stop,
    )  # fmt: skip
    continuity = ResumeLossCheck(
        directory, start if start_from is not None else None, tolerance=1e-2 if run.bf16 else 1e-4
    )
    metrics = Metrics(
        directory, first=parallel.is_first, start_step=start, total_steps=config.total_steps,
        global_batch=run.global_batch, world=parallel.world, log_every=config.log_every,
    )  # fmt: skip

    saved_at = start

    def save(step: int) -> None:
        nonlocal saved_at
        watchdog.beat("save", step, config.save_timeout_s)
        saver.save(step, parts.engine, parts.rows, parts.row_range, parts.facts(step))
        continuity.saved(step)
        saved_at = step

    batches = iter(parts.data.stream(start))
    failpoint("start:ready", step=start)
    try:
        for step in range(start, config.total_steps):
            # The first step may compile kernels and open every shard.
            beat = partial(watchdog.beat, step=step, limit_s=config.save_timeout_s if step == start else None)
            if step + 1 == args.stop_after:
                lifecycle.request_stop()
            done, verdict = train_step(step, parts, batches, metrics, beat, lifecycle)
            if verdict.failure is not None:
                if step > saved_at:
                    save(step)  # what was learned so far is good
                raise DataBudgetError(verdict.failure)
            if parallel.is_first:
                continuity.first_loss(step, verdict.loss)
            if metrics.due(step):
                report_step(step, parts, done, verdict, metrics)
            if config.check_every and (step + 1) % config.check_every == 0:
                beat("check")
                check_ranks(step, parts.engine, parallel)
            saver.poll()
            stopped = verdict.stop
            if stopped or (step + 1) % config.save_every == 0 or step + 1 == config.total_steps:
                save(step + 1)
                report_classes(step, parts, metrics)
                stopped = lifecycle.stop_requested() or stopped
            failpoint("train:step_end", step=step)
            if stopped:
                break
        watchdog.beat("end", step, config.save_timeout_s)
        saver.finish()
    except ON_EVERY_RANK:
        saver.finish()  # a save under way is of a good state
        raise
    finally:
        watchdog.close()
    skipped = parts.guard.skipped
    metrics.close({"steps": step + 1 - start, "start_step": start, "skipped": skipped, "world": parallel.world})
    if lock is not None:
        lock.release()
    if stopped and step + 1 < config.total_steps:
        log.info("stopped after step %d as asked; the same command goes on from there", step + 1)
        return EXIT_STOPPED
    log.info("finished: %s", directory)
    return 0


def train_step(
    step: int,
    parts: Parts,
    batches: Iterator[Batch],
    metrics: Metrics,
    beat: Callable[[str], None],
    lifecycle: Lifecycle,
) -> tuple[Accumulated, Verdict]:
    """Forward, backward, one decision of all ranks (which also tells all when one was asked to stop), and the step of both
    optimizers or of neither."""
    run, engine, head = parts.run, parts.engine, parts.head
    done = accumulate(step, parts, batches, metrics, beat)
    failpoint("train:gradients", step=step, engine=engine, head=head)
    beat("decision")
    student_norm = engine.gradient_norm()
    head_norm_sq = head.grad_norm_sq() if head is not None else None
    verdict = parts.guard.decide(
        step, done.loss, student_norm, head_norm_sq, done.describe, failure=done.failure, stop=lifecycle.asked
    )
    beat("update")
    share = learning_rate_share(step, run.megacid.run.total_steps, run.megacid.schedule)
    step_both(parts, verdict, share)
    failpoint("train:applied", step=step, engine=engine, head=head, verdict=verdict, sample_ids=done.sample_ids)
    return done, verdict


def accumulate(
    step: int, parts: Parts, batches: Iterator[Batch], metrics: Metrics, beat: Callable[[str], None]
) -> Accumulated:
    """Forward and backward of the micro-batches of one step."""
    engine, accumulation, micro_batches = parts.engine, parts.run.accumulation, []
    for micro in range(accumulation):
        beat("data")
        began = time.perf_counter()
        batch = next(batches).to(engine.device)
        metrics.waited_for_data(time.perf_counter() - began)
        failpoint("train:batch", step=step, batch=batch)
        if parts.head is not None:
            parts.head.set_step(step)  # micro-batches share their negatives: the rows of a step stay as many
        beat("forward")
        out = engine(batch.image, batch.text)
        loss, terms = parts.objective(out, batch)
        beat("backward")
        engine.backward(loss)
        if micro + 1 < accumulation:
            engine.micro_step()
        finite = torch.isfinite(out.image.detach()).all(dim=-1)
        micro_batches.append((loss.detach(), terms, batch.sample_id, finite, batch.failure))
    losses, all_terms, sample_ids, finites, failures = zip(*micro_batches)
    return Accumulated(
        torch.stack(losses).mean(),
        {name: sum(terms[name] for terms in all_terms) / accumulation for name in all_terms[0]},
        torch.cat(sample_ids).tolist(),
        torch.cat(finites),
        next(filter(None, failures), None),
    )


@dataclass(frozen=True)
class Accumulated:
    """Of one step on this rank. loss, terms: 0-d means over the micro-batches. finite: bool, for each of sample_ids
    whether its embedding is. failure: why the data of this rank end the run."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    sample_ids: list[int]
    finite: torch.Tensor
    failure: str | None

    def describe(self) -> tuple[bool, str]:
        """For the guard's warnings: whether samples of this rank have non-finite embeddings, and terms and samples."""
        bad = [number for number, good in zip(self.sample_ids, self.finite.tolist()) if not good]
        named = bad or self.sample_ids
        shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
        kind = "samples with a non-finite embedding" if bad else "samples"
        said = ", ".join(f"{name} {float(value):.6g}" for name, value in self.terms.items())
        return bool(bad), f"terms {said}; {kind} {shown}"


def step_both(parts: Parts, verdict: Verdict, share: float) -> None:
    """Both optimizers step with the one clipping factor, or neither does. share: of the peak learning rates."""
    student_rate, row_rate = peak_rates(parts.run)
    if verdict.apply:
        parts.engine.step(lr=share * student_rate, clip_scale=verdict.clip_scale)
        if parts.row_optimizer is not None:
            parts.row_optimizer.lr = share * row_rate
            parts.row_optimizer.step(grad_scale=verdict.clip_scale)
    else:
        parts.engine.skip()
    if parts.row_optimizer is not None:
        parts.row_optimizer.zero_grad()


def report_step(step: int, parts: Parts, done: Accumulated, verdict: Verdict, metrics: Metrics) -> None:
    share = learning_rate_share(step, parts.run.megacid.run.total_steps, parts.run.megacid.schedule)
    diagnostics = parts.head.metrics() if parts.head is not None else {}
    facts = {
        "train/lr": share * peak_rates(parts.run)[0],
        "train/grad_norm": verdict.grad_norm,
        "train/skipped": float(parts.guard.skipped),
        **{f"classifier/{name}": float(value) for name, value in diagnostics.items()},
    }
    metrics.log(step, done.loss, done.terms, facts)


def check_ranks(step: int, engine: Any, parallel: Parallel) -> None:
    """RanksDisagree when ranks are at different steps, or their replicas of the student differ in a bit."""
    agree(str(step), "the step", parallel.group)
    digest = engine.replica_digest()
    if digest is not None:
        agree(digest, f"the student's weights after step {step + 1} (replicas have drifted apart)", parallel.group)


def report_classes(step: int, parts: Parts, metrics: Metrics) -> None:
    """Facts about the classes as a whole, at every checkpoint. A collective."""
    if parts.head is None:
        return
    facts = health(parts.head)
    metrics.log_classes(step, facts, hit_histogram(parts.head))
    for concern in health_warnings(facts) if parts.parallel.is_first else ():
        log.warning("%s", concern)


# ---- start -------------------------------------------------------------------------------------------------------


def dry_run(run: RunFile, parallel: Parallel) -> int:
    """Everything that can be checked without training: data, joins, one batch, student, classifier, memory. Writes nothing to the run directory."""
    setup_logging(parallel.rank, None)
    data = open_data(run, parallel)
    batch = together(lambda: next(iter(data.stream(0))), parallel)
    for failure in filter(None, gather_json(batch.failure, parallel.group)):
        raise DataBudgetError(failure)
    student = together(lambda: make_student(run, data), parallel)
    together(lambda: check_same_settings(run.with_embed_dim(student.embed_dim), run.directory), parallel)
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
    if (
        parallel_module.launched()
    ):  # without a launcher the parent is a shell, whose end must not end what nohup started
        set_parent_death_signal(signal.SIGTERM)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        run = load_run(args.deepspeed_config, args.set, world=world)
    except UserError as error:
        return say(error, EXIT_USER, rank, everywhere=True)
    if args.print_config:
        if rank == 0:
            print(json.dumps(run.resolved(), indent=2))
        return 0
    try:
        limits = run.megacid.run
        # The watchdog speaks first; the collectives' own timeout is for when it cannot.
        longest = max(limits.timeout_s, limits.save_timeout_s) + 60
        parallel = parallel_module.init(longest, always=not args.dry_run)
        agree_on_mapping(settings_of_this_rank(run, world), "the run", parallel.group)
        return dry_run(run, parallel) if args.dry_run else train(run, args, parallel)
    except UserError as error:
        return say(error, EXIT_USER, rank, everywhere=error.on_every_rank)
    except ON_EVERY_RANK as error:
        return say(error, EXIT_CODES[type(error)], rank, everywhere=True)
    except Exception as error:
        if not from_a_collective(error):
            raise
        reason = str(error).strip().splitlines()[0]
        gone = RuntimeError(f"rank {rank} cannot reach the other ranks any more ({reason}): one has ended or is late, its own "
                            "message says why; start the same command again")  # fmt: skip
        return say(gone, EXIT_AGAIN, rank, everywhere=False)
    finally:
        parallel_module.shutdown()


def say(error: Exception, code: int, rank: int, *, everywhere: bool) -> int:
    """One line on stderr; by the first rank alone when all ranks say the same. Returns `code`."""
    if rank == 0 or not everywhere:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
