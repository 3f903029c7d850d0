"""Zero-shot and kNN evaluation while training, shared over the ranks. It changes no bit of the training.

What is evaluated is a copy of the student in eval mode, outside of the engine: no hook of DeepSpeed runs and no counter
moves. At ZeRO 0 to 2 the copy shares the memory of the engine's weights; at ZeRO 3 every rank gathers all of them for
the time of an evaluation. The weights are those that the forward uses, so bf16 with "bf16".
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from megacid.checkpoint import store
from megacid.config.schema import RunFile
from megacid.distributed.consensus import agree, broadcast_json, fail_together
from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, Stopped
from megacid.errors import EXIT_STOPPED, UserError
from megacid.storage.atomic import read_json
from megacid.training.lifecycle import Lifecycle
from megacid.training.metrics import Metrics
from megacid.training.watchdog import Watchdog

if TYPE_CHECKING:
    from megacid.distributed.engine import Engine
    from megacid.evaluate.datasets import Benchmark
    from megacid.models.student import Student

log = logging.getLogger("megacid")


def open_benchmarks(run: RunFile, parallel: Parallel) -> list[Benchmark]:
    """The sets of eval.datasets, with the splits that the tasks need. A collective.

    Raises:
        UserError: a set is missing or incomplete, or two have one name; the same on every rank.
        RanksDisagree: the ranks see different content.
    """
    config = run.megacid.eval
    if not config.datasets:
        return []
    # Where a run has such sets, because importing open_clip takes seconds.
    from megacid.evaluate.datasets import load_benchmark
    from megacid.evaluate.execution import Execution

    def opening() -> list[Benchmark]:
        benchmarks = [load_benchmark(root) for root in config.datasets]
        for benchmark in benchmarks:
            for split in ("test", "train") if "knn" in config.tasks else ("test",):
                benchmark.open(split)
        _check_names(benchmarks)
        return benchmarks

    benchmarks = Execution(group=parallel.group).opened(opening)
    for benchmark in benchmarks:
        agree(benchmark.digest, f"the content of {benchmark.root}", parallel.group)
    return benchmarks


def _check_names(benchmarks: list[Benchmark]) -> None:
    roots: dict[str, Path] = {}
    for benchmark in benchmarks:
        if benchmark.name in roots:
            raise UserError(
                f'"megacid.eval.datasets" has two sets of the name {benchmark.name} ({roots[benchmark.name]}, '
                f"{benchmark.root}), expected different ones, which name the results: rename a directory"
            )
        roots[benchmark.name] = benchmark.root


def is_due(run: RunFile, step: int) -> bool:
    """Whether the student is evaluated after `step` steps."""
    config, total_steps = run.megacid.eval, run.megacid.run.total_steps
    return bool(config.datasets) and step > 0 and (step % config.every == 0 or step >= total_steps)


class Due(NamedTuple):
    """A result that is due: of a set, by its directory, and a task, for the weights or their moving average."""

    root: str
    task: str
    ema: bool


def standing_results(run: RunFile, step: int) -> list[tuple[Due, dict[str, Any] | None]]:
    """All that is due after `step` steps, with its result in the run directory or None."""
    config = run.megacid.eval
    averages = (False,) if run.megacid.student.ema_decay is None else (False, True)
    found: list[tuple[Due, dict[str, Any] | None]] = []
    for due in itertools.starmap(Due, itertools.product(config.datasets, config.tasks, averages)):
        result = read_json(_file(run, step, Path(due.root).resolve().name, due))
        metrics = result.get("metrics") if isinstance(result, dict) else None
        stands = isinstance(metrics, dict) and metrics.get("k", config.neighbors) == config.neighbors
        found.append((due, result if stands else None))
    return found


def is_finished(run: RunFile, checkpoint: str, parallel: Parallel) -> bool:
    """Whether the checkpoint has all steps, and their last evaluation is there, too. A collective."""
    step = store.read_manifest(Path(checkpoint))["step"]
    if step < run.megacid.run.total_steps:
        return False
    missing = parallel.is_first and is_due(run, step) and any(not result for *_, result in standing_results(run, step))
    if broadcast_json(missing, parallel.group):
        return False
    log.info("already finished: %s has all %d steps", checkpoint, run.megacid.run.total_steps)
    return True


def _file(run: RunFile, step: int, dataset: str, due: Due) -> Path:
    from megacid.evaluate.tasks import TASKS, result_file, weights_name

    folder, weights = run.directory / "eval" / store.step_name(step), weights_name(run.directory, step, ema=due.ema)
    return result_file(folder, dataset, run.megacid.student.model, weights, TASKS[due.task])


class StudentCopy:
    """A student without weights of its own: it uses those of another one for a time."""

    def __init__(self, student: Student) -> None:
        """Call it before an engine adds hooks to the student's modules."""
        tensors = [*student.parameters(), *student.buffers()]
        empty = {id(tensor): _empty_like(tensor) for tensor in tensors}
        self.student = copy.deepcopy(student, empty)

    @contextlib.contextmanager
    def using(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Student]:
        """The student with these parameters and buffers, by name; it shares their memory."""
        own = dict([*self.student.named_parameters(), *self.student.named_buffers()])
        try:
            for name, value in weights:
                own[name].data = value
            yield self.student
        finally:
            for tensor in own.values():
                tensor.data = tensor.new_empty(0)


def weights_of(engine: Engine, *, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of the parameters and buffers that the engine's forward uses. A collective.

    These are the module's own tensors; at ZeRO 3 the parameters are copies.

    ema: copies of the moving average in place of the trained parameters, in the dtype of the forward.
    """
    average = engine.average if ema else None
    for name, p in engine.module.named_parameters():
        if average is not None and name in average.parameters:
            yield name, average.whole(name).view(getattr(p, "ds_shape", p.shape)).to(p.dtype)
            continue
        with engine.gathered(p, None):
            yield name, p.detach().clone() if engine.stage == 3 else p.detach()
    yield from engine.module.named_buffers()


def _empty_like(tensor: Tensor) -> Tensor:
    empty = tensor.detach().new_empty(0)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@contextlib.contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state of torch, NumPy and Python at the end of the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class Evaluation:
    """Evaluates the student of a run, as the "eval" section says."""

    def __init__(self, run: RunFile, benchmarks: list[Benchmark], student: nn.Module, parallel: Parallel) -> None:
        """student: before an engine has it."""
        self.run, self.parallel = run, parallel
        self.benchmarks = dict(zip(run.megacid.eval.datasets, benchmarks, strict=True))
        self.copy = StudentCopy(cast("Student", student)) if benchmarks else None

    def after(self, engine: Engine, metrics: Metrics, watchdog: Watchdog, lifecycle: Lifecycle, step: int) -> bool:
        """Evaluate the student after `step` steps, where a result is due and missing. A collective.

        Returns:
            Whether a rank was asked to stop, which ends the evaluation; complete results are kept.
        """
        if self.copy is None or not is_due(self.run, step):
            return False

        def poll(rows: int) -> None:
            watchdog.beat("evaluation", step, self.run.megacid.run.save_timeout_s)
            if lifecycle.asked:
                raise Stopped(EXIT_STOPPED)

        watchdog.beat("evaluation", step, self.run.megacid.run.save_timeout_s)
        began = time.perf_counter()
        found = broadcast_json(
            standing_results(self.run, step) if self.parallel.is_first else None, self.parallel.group
        )
        standing, missing = [r for _, r in found if r], [Due(*due) for due, r in found if not r]
        new: list[dict[str, Any]] = []
        try:
            for ema in (False, True):
                if what := [due for due in missing if due.ema == ema]:
                    new += self.evaluate(step, what, weights_of(engine, ema=ema), poll)
        except Stopped:
            return True
        seconds = time.perf_counter() - began
        metrics.leave_out(seconds)
        # Scalars after the step that the run resumes from were purged with those of the steps that are repeated.
        shown = scalars(new if step == metrics.start_step else standing + new)
        metrics.write(shown, step - 1)
        if new:
            accuracies = "  ".join(f"{tag.removeprefix('eval/')} {shown[tag]:.4f}" for tag in shown if "acc1" in tag)
            log.info("evaluation after step %d: %s  (%.1f s)", step, accuracies, seconds)
        return False

    def evaluate(
        self, step: int, what: list[Due], weights: Iterable[tuple[str, Tensor]], poll: Progress
    ) -> list[dict[str, Any]]:
        """Evaluate weights, and write the results to the run directory. A collective.

        Bad data of a set are a warning, and leave its result out.

        Args:
            what: results that are due for these weights.
            weights: (name, whole tensor) of the student's parameters and buffers, on the run's device.
            poll: called after every batch.

        Raises:
            Stopped: on every rank, when `poll` raised it on one.
        """
        from megacid.evaluate.execution import Execution
        from megacid.evaluate.tasks import evaluate, weights_name, write_result
        from megacid.models.student import loaded_student

        assert self.copy is not None
        results, group, config = [], self.parallel.group, self.run.megacid
        how = Execution(self.run.micro_batch, config.data.workers, group, lambda describe, total: nullcontext(poll))
        with unchanged_random_state(self.parallel.device), self.copy.using(weights) as student:
            dtype = next(student.parameters()).dtype
            name = weights_name(self.run.directory, step, ema=what[0].ema)
            clip = loaded_student(student, name, self.parallel.device, dtype)
            for due in what:
                benchmark = self.benchmarks[due.root]
                try:
                    result = evaluate(due.task, clip, benchmark, how, neighbors=config.eval.neighbors)
                    with fail_together(group):
                        if self.parallel.is_first:
                            write_result(_file(self.run, step, benchmark.name, due), result)
                except UserError as error:  # of all ranks
                    if self.parallel.is_first:
                        reason = str(error).replace("--workers", "data.workers")
                        log.warning("no %s on %s after step %d: %s", due.task, benchmark.name, step, reason)
                else:
                    results.append(result)
        return results


def scalars(results: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracies of results by tag, such as eval/cifar10/zero_shot_acc1, and eval/cifar10/ema_knn_acc1 for EMA."""
    from megacid.evaluate.tasks import is_of_average

    found = {}
    for result in results:
        for name, value in result["metrics"].items():
            if "acc" in name or "recall" in name:
                prefix = "ema_" * is_of_average(result) + "zero_shot_" * (not name.startswith("knn_"))
                found[f"eval/{result['dataset']}/{prefix}{name}"] = float(value)
    return found
