#!/usr/bin/env python3
"""Measure which tiles make the fused kernels fastest on this GPU, and write the table that they look up.

    tools/tune.py --out table.json                        widths 512, 768, 1024 in fp16 and bf16
    MEGACID_KERNEL_TABLE=table.json deepspeed ...         train with it
    tools/tune.py --list --architecture sm_90             list the candidates, and which do not fit (needs no GPU)

Nothing is tuned during training: the table is read once, so all ranks use the same tiles and runs are repeatable.
"""

import argparse
import sys
from collections.abc import Callable

import torch

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, positive
from benchmarks import measure, tile_search
from benchmarks.suite import Row, interpreted, print_table
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import write_atomic
from megacid_kernels.fused.tuning import Key, Tiles, architecture_of, as_json

_INTERPRETED_SHARED = 24 << 10  # bytes that let two tiles of a kernel pass, to test the search in Triton's interpreter
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: str(row["kernel"]),
    "tile": lambda row: str(row["tile"]),
    "ms p50 [p20, p80]:": lambda row: measure.format_ms(row["seconds"]),
    "TFLOP/s:": lambda row: f"{row['tflops']:,.0f}",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--out", type=local_path, metavar="TABLE.json", help="file to write the table to")
    parser.add_argument("--list", action="store_true", help="list the candidates without measuring")
    parser.add_argument(
        "--architecture", choices=tuple(tile_search.SHARED_BYTES), default="sm_90", help="of the GPU that --list is for"
    )
    parser.add_argument(
        "--widths", type=positive, nargs="+", default=[512, 768, 1024], help="embedding widths (default 512 768 1024)"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=tuple(DTYPES),
        default=["float16", "bfloat16"],
        help="of the unit rows (default float16 bfloat16)",
    )
    parser.add_argument("--samples", type=positive, default=8192, help="batch size (default 8192)")
    parser.add_argument("--classes", type=positive, default=131_072, help="class rows (default 131072)")
    args = parser.parse_args(argv)
    if not args.list:
        if args.out is None:
            raise UserError("--out is missing, expected a file for the table: add --out table.json, or --list")
        if not (torch.cuda.is_available() or interpreted()):
            raise UserError(
                "torch finds no GPU, expected the one to tune for: run this there, or list the candidates with --list"
            )
    return args


def print_candidates(args: argparse.Namespace) -> None:
    shared = tile_search.SHARED_BYTES[args.architecture]
    print(f"{args.architecture}, {shared / 1024:.0f} KiB of shared memory per block")
    print("| kernel | dtype | tile | |\n|---|---|---|---|")
    for kernel in tile_search.KERNELS:
        for name in args.dtypes:
            for tile in tile_search.candidates(kernel, DTYPES[name].itemsize):
                if tile.descriptors and args.architecture.startswith("sm_8"):
                    continue
                excess = tile_search.excess(tile, DTYPES[name].itemsize, shared)
                use = f"skipped: {excess}" if excess else "measured"
                print(f"| {kernel} | {name} | {tile_search.tile_name(tile)} | {use} |")


def tune(args: argparse.Namespace) -> dict[Key, Tiles]:
    device = torch.device("cpu" if interpreted() else "cuda")
    timer = measure.timer_of(argparse.Namespace(device=device.type, clock="wall"))
    architecture, shared, has_descriptors = architecture_of(device), _INTERPRETED_SHARED, True
    if device.type == "cuda":
        has_descriptors = torch.cuda.get_device_capability(device) >= (9, 0)
        shared = int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
    print(f"{architecture}; {args.samples:,} x {args.classes:,}")
    table: dict[Key, Tiles] = {}
    for name in args.dtypes:
        for width in args.widths:
            case = tile_search.Case.random(args.samples, args.classes, width, DTYPES[name], device)
            chosen = {
                kernel: tile_search.fitting(kernel, DTYPES[name], shared, descriptors=has_descriptors)
                for kernel in tile_search.KERNELS
            }
            table[architecture, name, width], rows = tile_search.tune(case, chosen, timer)
            print(f"\n{name}, width {width}")
            print_table(sorted(rows, key=lambda row: (row["kernel"], -row.get("tflops", 0.0))), COLUMNS)
    return table


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print_candidates(args)
        return
    write_atomic(args.out, as_json(tune(args)).encode())
    print(f"\nwrote {args.out}: set MEGACID_KERNEL_TABLE={args.out} to use it")


if __name__ == "__main__":
    sys.exit(run_tool(main))
