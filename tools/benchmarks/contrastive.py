"""Suite contrastive: the instance loss, forward and backward, against the same loss from materialised matrices.

Legend: G batch, D width.

megacid            megacid.losses.instance.instance_loss, as the trainer calls it
materialised       both [G, G] logit matrices in fp32, each used for its two directions by F.cross_entropy
materialised-bf16  the same with bf16 products (GPU only)

Loss and gradients are first compared with float64. Extra memory is the peak above the inputs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.suite import Limit, Report, Row, gpu_code, make_report, parse_sizes, print_table
from megacid.errors import UserError
from megacid.losses.instance import instance_loss

HELP = "time and memory of the instance loss of large batches, compared with materialised logits"
Shape = tuple[int, int]
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(2048, 512), (4096, 512)],
    "cuda": [(8192, 768), (16_384, 768), (32_768, 768), (65_536, 768)],
}
SCALE, SEED, ROUNDS = 100.0, 0, 3
LARGE_BATCH = 8192
# fp32 rounds logits of up to SCALE to 4e-6, bf16 factors to SCALE * 2^-8 / sqrt(D), see
# `head_megacid.allowed_loss_error`.
_MAX_ERROR = {"megacid": 1e-4, "materialised": 1e-4, "materialised-bf16": 5e-2}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def materialised(
    image_S: Tensor,
    text_S: Tensor,
    image_T: Tensor,
    text_T: Tensor,
    logit_scale: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    own = torch.arange(len(image_S), device=image_S.device)
    loss = image_S.new_zeros(())
    for student, teacher in ((image_S, text_T), (text_S, image_T)):
        product = student @ teacher.T if dtype is None else (student.to(dtype) @ teacher.to(dtype).T).to(student.dtype)
        logits = logit_scale * product
        loss = loss + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss


PROVIDERS: dict[str, Loss] = {
    "megacid": instance_loss,
    "materialised": materialised,
    "materialised-bf16": lambda *tensors: materialised(*tensors, dtype=torch.bfloat16),
}


def batch_of(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """(student's image, text, teacher's image, text), unit rows [G, D], and the scale. Pairs are closer than other
    rows, as in training; the student's rows and the scale require a gradient."""
    generator = torch.Generator(device).manual_seed(SEED)
    rows = [F.normalize(torch.randn(*shape, generator=generator, device=device)) for _ in range(4)]
    mixed = [F.normalize(0.4 * rows[0] + 0.6 * each) for each in rows]
    scale = torch.tensor(SCALE, device=device)
    return mixed[0].requires_grad_(), mixed[1].requires_grad_(), mixed[2], mixed[3], scale.requires_grad_()


def step(name: str, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(loss, gradients of the student's image, its text and the scale)."""
    image_S, text_S, image_T, text_T, scale = batch
    loss = PROVIDERS[name](image_S, text_S, image_T, text_T, scale)
    return (loss.detach(), *torch.autograd.grad(loss, (image_S, text_S, scale)))


def check_accuracy(names: list[str], device: torch.device) -> None:
    batch = batch_of((300, 64), device)
    exact = step("materialised", tuple(t.detach().double().requires_grad_(t.requires_grad) for t in batch))
    for name in names:
        for what, value, want in zip(("loss", "image", "text", "scale"), step(name, batch), exact):
            error = measure.relative_error(value, want)
            if not error < _MAX_ERROR[name]:
                raise UserError(
                    f"{what} or its gradient of {name} differs from float64 by {error:.1e} of its norm, expected < "
                    f"{_MAX_ERROR[name]:g}: no speed is printed; run tests/losses/test_losses.py"
                )


def shape_of(text: str) -> Shape:
    batch, width = parse_sizes(text, "batch,width", "16384,768")
    return batch, width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", metavar="G,D", help="batch,width of every case")


def run(args: argparse.Namespace) -> Report:
    device, timer = torch.device(args.device), measure.timer_of(args)
    shapes = [shape_of(text) for text in args.shapes] if args.shapes else SHAPES[args.device]
    names = [name for name in PROVIDERS if gpu_code(device) or name != "materialised-bf16"]
    check_accuracy(names, device)
    rows = [row for shape in shapes for row in measure_shape(shape, names, args, timer)]
    print_table(rows, COLUMNS)
    return make_report(args, rows)


def measure_shape(shape: Shape, names: list[str], args: argparse.Namespace, timer: measure.Timer) -> list[Row]:
    device = torch.device(args.device)
    batch = batch_of(shape, device)
    rows: dict[str, Row] = {name: {"shape": f"{shape[0]},{shape[1]}", "provider": name} for name in names}
    first: dict[str, float] = {}
    for name, row in rows.items():
        try:
            timer(functools.partial(step, name, batch), 1)
            first[name] = timer(functools.partial(step, name, batch), 1)[0]
        except torch.OutOfMemoryError:
            row["skipped"] = "out of memory"
            continue
        row |= peak(shape, name, args)
    runs = {name: functools.partial(step, name, batch) for name in first}
    repeats = {name: measure.repeats_for(seconds) for name, seconds in first.items()}
    for name, seconds in measure.take_turns(runs, timer, ROUNDS, repeats).items():
        rows[name]["seconds"] = seconds
    for row in rows.values():
        speed = measure.ratio(measure.median(rows["materialised"]), measure.median(row))
        row |= {} if speed is None else {"speed_over_materialised": speed}
    return list(rows.values())


def peak(shape: Shape, name: str, args: argparse.Namespace) -> dict[str, Any]:
    request = {"shape": shape, "name": name, "device": args.device, "threads": args.threads}
    if gpu_code(torch.device(args.device)):
        return answer(request)
    return measure.ask_process("benchmarks.contrastive", request, measure.RETURN_FREED)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"peak_extra_bytes"} of one step of provider request["name"]."""
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    batch = batch_of(tuple(request["shape"]), device)
    step(request["name"], batch)
    return {"peak_extra_bytes": float(measure.peak_extra_bytes(lambda: step(request["name"], batch), device))}


def of_one_matrix(row: Row) -> float | None:
    """Extra memory over that of one fp32 [G, G] matrix."""
    return measure.ratio(row.get("peak_extra_bytes"), 4.0 * shape_of(row["shape"])[0] ** 2)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch x width": lambda row: "{:,} x {}".format(*shape_of(row["shape"])),
    "provider": lambda row: str(row["provider"]),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "speed:": lambda row: measure.format_value(row.get("speed_over_materialised"), unit="x"),
    "extra MiB:": lambda row: f"{row['peak_extra_bytes'] / 2**20:,.1f}",
    "of one fp32 [G, G]:": lambda row: measure.format_value(of_one_matrix(row)),
}


def check(report: Report) -> list[Limit]:
    """The extra memory must stay below one fp32 [G, G] matrix."""
    limits = []
    for row in report["results"]:
        batch, width = shape_of(row["shape"])
        if row["provider"] == "megacid" and batch >= LARGE_BATCH:
            what = f"{batch:,} x {width}: extra memory over one fp32 [G, G]"
            limits.append(Limit(what, of_one_matrix(row), 1.0, at_least=False))
    return limits


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
