"""Suite head: forward and backward over all classes.

On a CPU PartialFC against the published scheme (see `step`); on a GPU every schedule of the kernels against cuBLAS's
products and other packages (see `head_gpu`).
"""

from __future__ import annotations

import argparse

from benchmarks import analytic, head_gpu, step
from benchmarks.suite import Bar, Report, report
from megacid.errors import UserError

HELP = "forward and backward over all classes: on a CPU against the published scheme, on a GPU against cuBLAS and peers"


# Default None: whether they were given can be seen, and one that would do nothing is refused.
_GPU_DEFAULTS = {"providers": list(head_gpu.PROVIDERS), "geometry": "trained", "budget_gib": 20.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    step.add_arguments(parser)
    parser.set_defaults(repeats=None)
    parser.add_argument("--analytic", action="store_true", help="print floors by arithmetic, measure nothing")
    gpu = parser.add_argument_group("on a GPU (without --repeats: as many as there is time for)")
    gpu.add_argument("--providers", nargs="+", metavar="NAME", help=f"of {', '.join(head_gpu.PROVIDERS)} (all)")
    gpu.add_argument("--geometry", choices=("trained", "init"), help="of embeddings and their classes (trained)")
    gpu.add_argument("--budget-gib", type=float, help="for chunks of 16-bit logits (20)")


def run(args: argparse.Namespace) -> Report:
    on_gpu = args.device == "cuda" and not args.analytic
    for name in ["repeats"] if on_gpu else _GPU_DEFAULTS:
        if getattr(args, name) is not None:
            where = "--analytic" if args.analytic else f"--device {args.device}"
            raise UserError(f"--{name.replace('_', '-')} is given, but does nothing with {where}: leave it out")
    if args.analytic:
        if args.check or args.compare:
            raise UserError("--analytic measures nothing, so there is nothing to --check or --compare: leave one out")
        print("\n".join(analytic.lines(step.shapes_of(args, head_gpu.SHAPES))))
        return report(args, [])
    if not on_gpu:
        args.repeats = step.REPEATS if args.repeats is None else args.repeats
        return step.run(args)
    for name, value in _GPU_DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if not args.budget_gib > 0:
        raise UserError(f"--budget-gib is {args.budget_gib}, expected above 0: leave it out for the default")
    return head_gpu.run(args, step.shapes_of(args, head_gpu.SHAPES))


def check(found: Report) -> list[Bar]:
    return head_gpu.check(found) if found["arguments"]["device"] == "cuda" else step.check(found)
