"""The closing summary of a start: what was done, where its results are, and the next command."""

from __future__ import annotations

import shlex
from typing import Any

from megacid.checkpoint import store
from megacid.config.schema import RunFile


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:d}:{rest // 60:02d}:{rest % 60:02d}"


def where_to_go_on(run: RunFile, *, finished: bool) -> dict[str, Any]:
    """{"checkpoint": newest checkpoint or None, "curves": where to see them, "next": a command, or what to do}."""
    directory, name, features = str(run.directory), run.megacid.run.name, run.megacid.data.features
    checkpoints = store.list_steps(run.directory)
    curves = {
        "tensorboard": shlex.join(["tensorboard", "--logdir", directory]),
        "wandb": "wandb",
        "trackio": "trackio show",
    }
    if features is not None:
        words = ["tools/eval.py", "--run", directory, "--features", features, "--out", "results"]
    else:
        words = ["tools/export.py", "--run", directory, "--out", f"export/{name}"]
    return {
        "checkpoint": str(checkpoints[-1][1]) if checkpoints else None,
        "curves": [curves[tracker] for tracker in run.megacid.run.trackers],
        "next": shlex.join(["python", *words]) if finished else "run the same command again to continue",
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The content of train_summary.json as a few lines."""
    loss, evaluation = summary["last_loss"], summary["last_evaluation"]
    results = f"last logged loss {'none' if loss is None else f'{loss:.4f}'}"
    if evaluation is not None:
        values = "  ".join(f"{tag} {value:.4f}" for tag, value in evaluation.items() if tag != "step")
        results += f", last evaluation at step {evaluation['step']}: {values}"
    return [
        f"{summary['steps']} steps, {summary['samples']} samples in {clock(summary['seconds'])}, "
        f"{summary['samples_per_second']:.1f} samples/s, data wait {100 * summary['data_wait_share']:.0f} %, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB, {summary['skipped']} steps skipped",
        results,
        f"checkpoint {summary['checkpoint'] or 'none'}, curves: {', '.join(summary['curves']) or 'none'}",
        f"next: {summary['next']}",
    ]
