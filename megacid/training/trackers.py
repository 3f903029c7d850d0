"""Experiment trackers, which take the scalars of a run: tensorboard files, Weights & Biases, trackio.

A tracker counts steps from 1: step n is the state after n optimizer steps. Only rank 0 has trackers.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megacid.config.schema import RunFile
from megacid.errors import UserError, one_line
from megacid.storage.atomic import read_json, write_json_atomic

log = logging.getLogger("megacid")

_PROJECT = "megacid"
_OF_THIS_PROCESS: list[Trackers] = []


class Tracker(Protocol):
    """Shows the scalars of a run. Any exception ends the tracker, not the run."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """values: by tag, such as "train/loss"."""

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        """counts: of each bin; edges: of the bins, one more than counts."""

    def close(self, *, failed: bool) -> None:
        """Write everything that is buffered. failed: whether an error ended the run."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError when the package of one of run.trackers cannot be imported."""
    for name in set(names) - {"tensorboard"}:  # which is a base requirement
        try:
            # A folder of this name, such as the one that wandb writes, is imported as an empty package.
            importlib.import_module(name).init  # noqa: B018
        except Exception as error:  # packages with extensions raise more than ImportError
            raise UserError(
                f'"megacid.run.trackers" has "{name}", but its package cannot be used ({one_line(error)}): pip install '
                f'"megacid[{name}]", or remove "{name}" from run.trackers'
            ) from None


class Trackers:
    """The trackers of a run. The first error of one is one warning, after which the run continues without it."""

    def __init__(self, run: RunFile, start_step: int) -> None:
        """start_step: steps that the run has done already; what a crashed start logged beyond them is repeated."""
        self.directory = run.directory
        self._open: dict[str, Tracker] = {}
        _OF_THIS_PROCESS.append(self)
        for name in run.megacid.run.trackers:
            with self._without_errors(name):
                self._open[name] = _TRACKERS[name](run, start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, tracker in [*self._open.items()]:
            with self._without_errors(name):
                tracker.scalars(values, step)

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        """See `Tracker`."""
        for name, tracker in [*self._open.items()]:
            with self._without_errors(name):
                tracker.histogram(tag, edges, counts, step)

    def close(self, *, failed: bool = False) -> None:
        """See `Tracker`."""
        for name in [*self._open]:
            with self._without_errors(name):
                self._open.pop(name).close(failed=failed)

    @contextlib.contextmanager
    def _without_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # not only OSError: tensorboard has its own where tensorflow is installed
            self._open.pop(name, None)
            what = self.directory / name if name == "tensorboard" else f"tracker {name}"
            log.warning("%s cannot be written any more (%s): the run continues without it", what, one_line(error))


def close_after_error(within_s: float = 5.0) -> None:
    """Close the trackers that an error has left open, as those of a failed run; give up after `within_s`.

    An upload may take as long as the network is away. So the message of an error is printed before; the traceback of an
    unexpected exception follows, at most `within_s` later.
    """

    def close() -> None:
        for trackers in _OF_THIS_PROCESS:
            trackers.close(failed=True)

    if _OF_THIS_PROCESS:
        thread = threading.Thread(target=close, name="close trackers", daemon=True)
        thread.start()
        thread.join(within_s)


class _Tensorboard:
    """Event files in the run directory's tensorboard/."""

    def __init__(self, run: RunFile, start_step: int) -> None:
        _silence_writer_thread()
        folder = run.directory / "tensorboard"
        is_new = not any(folder.glob("events.*"))
        self._writer = _curve(folder, start_step + 1)
        if is_new:
            self._writer.add_text("config", f"```\n{json.dumps(run.resolved(), indent=1)}\n```", start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        middle = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
        last = max((i for i, count in enumerate(counts) if count), default=0)
        self._writer.add_histogram_raw(
            tag, min=middle[0], max=edges[last + 1], num=sum(counts),
            sum=sum(n * m for n, m in zip(counts, middle)), sum_squares=sum(n * m * m for n, m in zip(counts, middle)),
            bucket_limits=edges[1:], bucket_counts=counts, global_step=step,
        )  # fmt: skip

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def _curve(folder: Path, step: int) -> SummaryWriter:
    """A new event file that starts at `step` and purges what a crashed run wrote beyond its last checkpoint.

    Readers order the files by name, which is the start in whole seconds and then the process id. A second start within
    the same second could be read before the first, so it waits for the next second.
    """
    while list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=step)


def _silence_writer_thread() -> None:
    """Let tensorboard's thread end without a traceback on an error, which the next call of the writer raises."""
    report = threading.excepthook

    def excepthook(args: threading.ExceptHookArgs) -> None:
        if "AsyncWriter" not in type(args.thread).__name__:
            report(args)

    threading.excepthook = excepthook


class _Wandb:
    """A run of Weights & Biases, continued by every later start of the run directory.

    wandb's own environment variables choose its mode, project, entity and server.
    """

    def __init__(self, run: RunFile, start_step: int) -> None:
        import wandb

        self._histogram = wandb.Histogram
        with _identity(run.directory, "wandb") as (identity, is_new):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run.megacid.run.name,
                id=identity,
                resume="allow",
                dir=str(run.directory),
                config=run.resolved() if is_new else None,
                settings=wandb.Settings(console="off"),  # log.txt has the output
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        # wandb takes no step twice. Steps that a crashed start logged are repeated with the same values.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        if step >= self._run.step:
            bins = np.array(counts), np.array(edges)
            self._run.log({tag: self._histogram(np_histogram=bins)}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, continued by every later start of the run directory."""

    def __init__(self, run: RunFile, start_step: int) -> None:
        import trackio

        self._histogram = trackio.Histogram
        with _identity(run.directory, "trackio") as (identity, _):
            self._run = trackio.init(
                project=_PROJECT,
                name=f"{run.megacid.run.name}-{identity}",  # trackio knows runs by their names
                resume="allow",
                config=run.resolved(),  # a start without it would remove the settings that trackio has of the run
                embed=False,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def histogram(self, tag: str, edges: list[float], counts: list[int], step: int) -> None:
        self._run.log({tag: self._histogram(np_histogram=(counts, edges))}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()  # which knows no failed run


@contextlib.contextmanager
def _identity(directory: Path, tracker: str) -> Iterator[tuple[str, bool]]:
    """The id of the run in a tracker, and whether it is new; kept in trackers.json when the block succeeds."""
    path = directory / "trackers.json"
    found: Any = read_json(path)
    identities: dict[str, str] = found if isinstance(found, dict) else {}
    known = identities.get(tracker)
    identity = known if isinstance(known, str) else secrets.token_hex(4)
    yield identity, identity != known
    if identity != known:
        write_json_atomic(path, {**identities, tracker: identity})


_TRACKERS: dict[str, Callable[[RunFile, int], Tracker]] = {
    "tensorboard": _Tensorboard, "wandb": _Wandb, "trackio": _Trackio
}  # fmt: skip
