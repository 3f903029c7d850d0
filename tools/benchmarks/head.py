"""Suite head: forward and backward over all classes.

On a CPU PartialFC and the published scheme (see `training_step`); on a GPU every schedule of the kernels, cuBLAS's
products and other packages (see `head_gpu`).
"""

from __future__ import annotations

import argparse

from argtypes import real
from benchmarks import cost_model, head_gpu, training_step
from benchmarks.suite import Limit, Report, interpreted, make_report, of_gpu_code
from megacid.errors import UserError

HELP = (
    "forward and backward over all classes, compared on a CPU with the published scheme, on a GPU with cuBLAS and peers"
)


# The parser's defaults are None: an option that has no effect is refused if it is given.
_GPU_DEFAULTS = {"providers": list(head_gpu.PROVIDERS), "geometry": "trained", "budget_gib": 20.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training_step.add_arguments(parser)
    parser.set_defaults(repeats=None)
    parser.add_argument("--analytic", action="store_true", help="print computed lower bounds and measure nothing")
    gpu = parser.add_argument_group("on a GPU (where --repeats does not apply)")
    gpu.add_argument("--providers", nargs="+", metavar="NAME", help=f"default all: {', '.join(head_gpu.PROVIDERS)}")
    gpu.add_argument(
        "--geometry", choices=("trained", "init"), help="how close embeddings are to their classes (default trained)"
    )
    gpu.add_argument("--budget-gib", type=real(0, without=(0,)), help="memory of a chunk of 16-bit logits (default 20)")


def run(args: argparse.Namespace) -> Report:
    on_gpu = (args.device == "cuda" or interpreted()) and not args.analytic
    for name in ["repeats"] if on_gpu else _GPU_DEFAULTS:
        if getattr(args, name) is not None:
            where = "--analytic" if args.analytic else f"--device {args.device}"
            raise UserError(f"--{name.replace('_', '-')} is given, but has no effect with {where}: leave it out")
    if args.analytic:
        if args.check or args.compare:
            raise UserError("--analytic measures nothing, so there is nothing to --check or --compare: leave one out")
        print("\n".join(cost_model.lines(training_step.shapes_of(args, head_gpu.SHAPES))))
        return make_report(args, [])
    if not on_gpu:
        args.repeats = training_step.REPEATS if args.repeats is None else args.repeats
        return training_step.run(args)
    for name, value in _GPU_DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if not args.budget_gib > 0:
        raise UserError(f"--budget-gib is {args.budget_gib}, expected above 0: leave it out for the default")
    return head_gpu.run(args, training_step.shapes_of(args, head_gpu.SHAPES))


def check(report: Report) -> list[Limit]:
    return head_gpu.check(report) if of_gpu_code(report) else training_step.check(report)
