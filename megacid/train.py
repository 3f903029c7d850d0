"""Train a student: the entry point and the whole training loop, top to bottom.

    deepspeed megacid/train.py --deepspeed_config configs/RUN.json

`torchrun` and plain `python` start it as well; `--help` lists the options. One file describes one run. The objective is
a weighted sum, so plain CLIP training, distillation and cluster discrimination differ only in their weights. A pure
classification experiment trains on feature vectors with the cluster term alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Launchers put this folder first on sys.path, where our modules would be found under bare names. Replace it by the
# repository and its kernels/, so that a plain checkout works too.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(_ROOT), *([str(_ROOT / "kernels")] if (_ROOT / "kernels" / "megacid_kernels").is_dir() else [])] + [
    p for p in sys.path if Path(p or ".").resolve() != _ROOT / "megacid"
]

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megacid.checkpoint.saver import Saver
from megacid.config.schema import RunFile
from megacid.data.batch import Batch, DataBudgetError
from megacid.data.copied_ahead import copied_ahead
from megacid.distributed.parallel import Parallel
from megacid.failpoints import failpoint
from megacid.training.cli import ERRORS_OF_ALL_RANKS, run_main
from megacid.training.evaluation import is_finished
from megacid.training.gradient_cache import GradientCache
from megacid.training.guard import Verdict
from megacid.training.lifecycle import Lifecycle, RunLock
from megacid.training.metrics import Metrics
from megacid.training.observe import observe
from megacid.training.profile import StepProfiler
from megacid.training.reports import report_classes, report_step
from megacid.training.resume import ResumeLossCheck, make_saver, open_run
from megacid.training.schedule import learning_rate_share, peak_rates
from megacid.training.state import StepOutput, TrainState, build_train_state, resume
from megacid.training.watchdog import Watchdog

log = logging.getLogger("megacid")


def train(run: RunFile, args: argparse.Namespace, parallel: Parallel) -> int:
    """Train `run` to its end, or until a rank is asked to stop. Returns the exit code, the same on every rank."""
    config, directory = run.megacid.run, run.directory
    lock, mirror, start_from = open_run(run, args.resume, args.fork, parallel)
    if start_from is not None and is_finished(run, start_from, parallel):
        return 0
    state = build_train_state(run, parallel, start_from)
    start = resume(state, start_from, mirror, going_back=args.resume not in ("auto", "never"))
    lifecycle = Lifecycle(parallel.group, stop_after=args.stop_after)
    saver = make_saver(run, mirror, lifecycle, parallel)
    watchdog = Watchdog(run, parallel, lifecycle)
    resumed_at = start if start_from and state.data.position is None else None  # with a position the data differ
    loss_check = ResumeLossCheck(directory, resumed_at, tolerance=1e-2 if run.bf16 else 1e-4)
    metrics = Metrics(run, parallel, start, state.flops)
    profiler = StepProfiler(args.profile_steps, start, directory, parallel)
    save = partial(save_checkpoint, state, saver, loss_check, watchdog)
    evaluate = partial(state.evaluation.after, state.engine, metrics, watchdog, lifecycle)
    batches = copied_ahead(state.data.stream(start), Batch.copied, parallel.device)
    failpoint("start:ready", step=start)
    try:
        step, stopped = start - 1, evaluate(start)  # the checkpoint may lack its evaluation
        for step in () if stopped else range(start, config.total_steps):
            # The first step may compile kernels and open every shard.
            beat = partial(watchdog.beat, step=step, limit_s=config.save_timeout_s if step == start else None)
            with profiler.around(step):
                output, verdict = train_step(step, state, batches, metrics, beat, lifecycle)
            if verdict.failure is not None:
                if step > max(start, saver.last_step):
                    save(step)  # the data are at fault, not the steps before
                if not (stopped := verdict.stop):  # a signal to the process group ends the loader workers, too
                    raise DataBudgetError(verdict.failure)
                step -= 1
                break
            if parallel.is_first:
                loss_check.first_loss(step, verdict.loss)
            report_step(step, state, output, verdict, metrics)
            check_replicas(step, state, beat)
            saver.poll()
            if (stopped := verdict.stop) or (step + 1) % config.save_every == 0 or step + 1 == config.total_steps:
                save(step + 1)
                report_classes(step, state, metrics)
                stopped = lifecycle.stop_requested() or stopped
            if not stopped and (stopped := evaluate(step + 1)) and saver.last_step <= step:
                save(step + 1)
            failpoint("train:step_end", step=step)
            if stopped:
                break
        watchdog.beat("end", step, config.save_timeout_s)
        profiler.close()
        saver.close(0.9 * config.save_timeout_s)
    except ERRORS_OF_ALL_RANKS:
        saver.close()  # a checkpoint in progress holds the state before the error
        profiler.close()
        raise
    finally:
        watchdog.close()
        metrics.close_bar()
    metrics.summarize(steps=step + 1 - start, skipped=state.guard.skipped)
    return close_run(run, step, lifecycle if stopped else None, lock, metrics)


def close_run(run: RunFile, step: int, stopped: Lifecycle | None, lock: RunLock | None, metrics: Metrics) -> int:
    """Release the run directory, log how the run ended after `step` and close the trackers. Returns the exit code.

    A collective.

    stopped: has the request to stop that ended the run; None without one.
    """
    if lock is not None:
        lock.release()
    code = 0
    if stopped is not None and step + 1 < run.megacid.run.total_steps:
        code = stopped.stopped_after(step)
    else:
        log.info("finished: %s", run.directory)
    metrics.close_trackers()  # last, since an upload may take as long as the network is away
    return code


def train_step(
    step: int,
    state: TrainState,
    batches: Iterator[Batch],
    metrics: Metrics,
    beat: Callable[[str], None],
    lifecycle: Lifecycle,
) -> tuple[StepOutput, Verdict]:
    """Forward and backward, one decision of all ranks, then both optimizers step or neither does.

    The decision also carries a request to stop from any rank to all ranks, at no extra collective.
    """
    run, engine, head = state.run, state.engine, state.head
    output = accumulate(step, state, batches, metrics, beat)
    failpoint("train:gradients", step=step, engine=engine, head=head)
    beat("decision")
    student_norm = engine.gradient_norm()
    head_norm_sq = head.grad_norm_sq() if head is not None else None
    verdict = state.guard.decide(
        step,
        output.loss,
        student_norm,
        head_norm_sq,
        partial(output.describe, state.data.name_of),
        failure=output.failure,
        stop=lifecycle.asked_after(step),
        observed=output.observed,
    )
    beat("update")
    step_both(state, verdict, learning_rate_share(step, run.megacid.run.total_steps, run.megacid.schedule))
    failpoint("train:applied", step=step, engine=engine, head=head, verdict=verdict, sample_ids=output.sample_ids)
    return output, verdict


def save_checkpoint(
    state: TrainState, saver: Saver, loss_check: ResumeLossCheck, watchdog: Watchdog, step: int
) -> None:
    """Save the state after `step` steps."""
    watchdog.beat("save", step, state.run.megacid.run.save_timeout_s)
    saver.save(step, state.engine, state.rows, state.row_range, state.manifest(step))
    loss_check.saved(step)


def check_replicas(step: int, state: TrainState, beat: Callable[[str], None]) -> None:
    """Compare the ranks' weights after every run.check_every steps."""
    every = state.run.megacid.run.check_every
    if every and (step + 1) % every == 0:
        beat("check")
        state.check_replicas(step)


def accumulate(
    step: int, state: TrainState, batches: Iterator[Batch], metrics: Metrics, beat: Callable[[str], None]
) -> StepOutput:
    """Forward and backward of the micro-batches of one step; the gradients stay in the engine and the classifier.

    Loss and gradients are those of the whole batch of the step, however it is divided into micro-batches.
    """
    if state.head is not None:
        state.head.set_step(step)
    if state.run.accumulation == 1 or state.objective.is_mean_over_samples:
        return accumulate_directly(step, state, batches, metrics, beat)
    return accumulate_with_gradient_cache(step, state, batches, metrics, beat)


def accumulate_directly(
    step: int, state: TrainState, batches: Iterator[Batch], metrics: Metrics, beat: Callable[[str], None]
) -> StepOutput:
    """One forward and backward per micro-batch; the step's loss is their mean."""
    accumulation = state.run.accumulation
    losses, all_terms, read, finite, observed = [], [], [], [], []
    for micro in range(accumulation):
        batch = next_batch(step, state, batches, metrics, beat)
        beat("forward")
        started = state.objective.start(batch)  # gathers the teacher's embeddings during the student's forward
        out = state.embed(step, micro, batch)
        loss, terms = state.objective(out, started)
        beat("backward")
        state.engine.backward(loss / accumulation)
        if micro + 1 < accumulation:
            state.engine.micro_step()
        losses.append(loss.detach())
        all_terms.append(terms)
        read.append((batch.sample_id, batch.failure))  # not the batch: its images would stay in the GPU's memory
        finite.append(torch.isfinite(out.image.detach()).all(dim=-1))
        observed.append(observe(out, batch))
    means = {name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]}
    seen = torch.stack(observed).mean(0)
    return StepOutput.of(torch.stack(losses).mean(), means, read, torch.cat(finite), seen)


def accumulate_with_gradient_cache(
    step: int, state: TrainState, batches: Iterator[Batch], metrics: Metrics, beat: Callable[[str], None]
) -> StepOutput:
    """The objective once on the embeddings of all micro-batches, then the backward of each; see `GradientCache`."""
    accumulation, cache = state.run.accumulation, GradientCache()
    for micro in range(accumulation):
        cache.batches.append(next_batch(step, state, batches, metrics, beat))
        beat("forward")
        last = micro + 1 == accumulation
        if last:
            cache.start(state.objective)
        with torch.set_grad_enabled(last):  # the last graph is kept, which saves a forward
            out = state.embed(step, micro, cache.batches[micro])
        cache.add(out)
    beat("objective")
    loss, terms, observed = cache.differentiate(state.objective)
    for micro in reversed(range(accumulation)):
        beat("backward")
        if micro + 1 < accumulation:
            out = state.embed(step, micro, cache.batches[micro])
        state.engine.backward(cache.surrogate(micro, out))
        if micro > 0:
            state.engine.micro_step()
    read = [(batch.sample_id, batch.failure) for batch in cache.batches]
    return StepOutput.of(loss, terms, read, torch.isfinite(cache.image).all(dim=-1), observed)


def next_batch(
    step: int, state: TrainState, batches: Iterator[Batch], metrics: Metrics, beat: Callable[[str], None]
) -> Batch:
    """Wait for the next micro-batch."""
    beat("data")
    began = time.perf_counter()
    batch = next(batches)
    metrics.waited_for_data(time.perf_counter() - began)
    if state.data.position is not None:
        state.data.position.advance(batch)
    failpoint("train:batch", step=step, batch=batch)
    return batch


def step_both(state: TrainState, verdict: Verdict, rate_share: float) -> None:
    """Step both optimizers with one clipping factor, or neither. rate_share: fraction of the peak learning rates."""
    student_rate, row_rate = peak_rates(state.run)
    if verdict.apply:
        state.engine.step(lr=rate_share * student_rate, clip_scale=verdict.clip_scale)
        if state.row_optimizer is not None:
            state.row_optimizer.group["lr"] = rate_share * row_rate
            state.row_optimizer.step(grad_scale=verdict.clip_scale)
    else:
        state.engine.skip()
    if state.row_optimizer is not None:
        state.row_optimizer.zero_grad()


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit code; `megacid.errors` lists them."""
    return run_main(argv, train)


if __name__ == "__main__":
    sys.exit(main())
