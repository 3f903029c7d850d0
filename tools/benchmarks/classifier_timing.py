"""Time and memory of the classifier providers.

Providers that are compared take turns in one process; peak memory, and the time of the suite scale, are measured in a
process per provider: `python -m benchmarks.classifier_timing REQUEST`. Request and answer are JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure
from benchmarks.classifier_providers import GRAPH, PRODUCTS, SEED, Shape, class_rows, make_provider
from benchmarks.suite import Row, clock_of
from megacid.errors import UserError

WARM_UP = 2
_REQUEST_OPTIONS = ("suite", "repeats", "threads", "device", "clock")


def take_turns(names: list[str], shape: Shape, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every repeat by provider. Raises UserError if their losses differ."""
    device = torch.device(args.device)
    torch.manual_seed(SEED)  # the published scheme draws its rows with PyTorch's generator
    weight = class_rows(shape, device)
    runs = {name: make_provider(name, shape, weight, device, train=args.suite != "head") for name in names}
    del weight
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    clock = clock_of(args)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(WARM_UP + args.repeats):
        for name, provider in runs.items():
            wait()
            start = clock()
            loss = provider.run(step)
            wait()
            if step >= WARM_UP:
                seconds[name].append(clock() - start)
            if loss is not None:
                first.setdefault(name, float(loss))
    most = 1e-4 if shape.rate == 1 else 0.5  # with sampling, each provider draws its own rows
    if not all(abs(one - other) <= most * other for one in first.values() for other in first.values()):
        raise UserError(f"the providers' losses are {first}, expected equal losses: no speed is printed")
    return seconds


def needed_bytes(name: str, shape: Shape, train: bool) -> int:
    """An upper estimate: weight, moments, and copies during construction or the backward; of megacid's logits only a
    chunk."""
    if name in ("megacid", GRAPH, PRODUCTS):
        logits = min(2 * shape.batch * shape.rows, 4 << 30)
        return 4 * 3 * (shape.classes + shape.rows) * shape.width + logits
    copies = 6 if train else 3
    return 4 * (copies * shape.classes * shape.width + shape.rows * (6 * shape.width + 5 * shape.batch))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a separate process to {"what": "time" or "memory", "name": a provider, "shape", options of
    args}."""
    args, shape, name = argparse.Namespace(**request), Shape.parse(request["shape"]), request["name"]
    torch.set_num_threads(args.threads)
    if args.what == "time":
        return {"seconds": take_turns([name], shape, args)[name]}
    device = torch.device(args.device)
    provider = make_provider(name, shape, class_rows(shape, device), device, train=args.suite != "head")
    provider.run(0)
    return {"peak_extra_bytes": float(measure.peak_extra_bytes(lambda: provider.run(1), device))}


def ask(what: str, name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    request = {"what": what, "name": name, "shape": shape.option} | {
        key: getattr(args, key) for key in _REQUEST_OPTIONS
    }
    return measure.ask_process(
        "benchmarks.classifier_timing", request, measure.RETURN_FREED if what == "memory" else {}
    )


def measure_shape(shape: Shape, names: list[str], args: argparse.Namespace) -> list[Row]:
    """A row per provider: {"shape", "provider", "seconds", "peak_extra_bytes"} or {..., "skipped"}."""
    taken, free = 0, 0.9 * measure.free_bytes(torch.device(args.device))
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    # The tuned variant comes last: it is skipped if memory is short.
    for name in sorted(results, key=("megacid", GRAPH, PRODUCTS, "eager", "eager-tuned").index):
        needed = needed_bytes(name, shape, args.suite != "head") + taken
        if needed > free:
            results[name] = {"skipped": f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"}
        elif args.suite != "scale":
            taken = needed
    fit = [name for name in results if not results[name]]
    if args.suite == "scale":
        for name in fit:
            results[name] = ask("time", name, shape, args)
    else:
        taken_turns = take_turns(fit, shape, args) if fit else {}
        results |= {name: {"seconds": seconds} for name, seconds in taken_turns.items()}
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the processes below need the memory
    for name in fit:
        if "seconds" in results[name]:
            results[name] |= ask("memory", name, shape, args)
    return [{"shape": shape.option, "provider": name} | values for name, values in results.items()]


def compare(mine: Row, other: Row) -> tuple[float | None, float | None]:
    """(other's time / mine, my extra memory / other's); None where one was not measured."""
    speed = memory = None
    if "seconds" in mine and "seconds" in other:
        speed = statistics.median(o / m for o, m in zip(other["seconds"], mine["seconds"]))
    if "peak_extra_bytes" in mine and other.get("peak_extra_bytes"):
        memory = mine["peak_extra_bytes"] / other["peak_extra_bytes"]
    return speed, memory


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
