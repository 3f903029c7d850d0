"""One rank of suite step-time: takes the steps of every point of the grid in turns.

    python -m benchmarks.step_time_ranks REQUEST

with the launcher's environment variables. Every rank prints the answer as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch

from benchmarks.accumulation import Timeless, batches_of, one_step, state_of
from benchmarks.ranks import Steps, take_turns
from megacid.distributed.parallel import Parallel, init, shutdown


def steps_of(settings: list[str], width: int, classes: int, parallel: Parallel) -> Steps:
    """The trainer's own steps, on one random batch."""
    state = state_of(settings, width, classes, parallel)
    student, numbers = state.student, itertools.count()
    batches = itertools.cycle(batches_of(state.run.micro_batch, 1, width, student.image_shape, student.text_length))

    def steps(count: int) -> float:
        return [one_step(state, batches, numbers, Timeless()) for _ in range(count)][-1]

    return steps


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{name of the point: wall seconds of a step, CPU seconds of a step over all ranks}, by round."""
    torch.set_num_threads(request["threads"])
    parallel = init(always=True)
    try:
        points = {
            name: steps_of(point["settings"], request["width"], point["classes"], parallel)
            for name, point in request["points"].items()
        }
        return take_turns(points, request["rounds"], request["repeats"], parallel)
    finally:
        shutdown()


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
