#!/usr/bin/env python3
"""Embed every pair of a folder of shards with a frozen teacher (open_clip), in clip-retrieval's layout.

    tools/embed.py --shards data/digits/train --out data/digits/teacher --model local-dir:exports/teacher
    tools/embed.py --shards laion --out teacher --model ViT-bigG-14 --pretrained laion2b_s39b_b160k
    torchrun --nproc_per_node 8 tools/embed.py ...       (or deepspeed): shards are split over the ranks

Run it again after an interruption: partitions that are complete are skipped. SIGTERM and Ctrl-C end it after the batch
under way, on all ranks, with exit code 143 and 130.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tqdm import tqdm

from megacid.data.index import load_index
from megacid.distributed.collectives import agree, fail_together
from megacid.distributed.parallel import Parallel, launched
from megacid.errors import UserError, run_tool
from megacid.offline import embed
from megacid.offline.ranks import accept_launcher_arguments
from megacid.offline.stopping import StopRequest, run_stage
from megacid.runtime.lifecycle import die_with_parent
from megacid.student import load_clip

DAY_S = 86400.0  # shards are split beforehand: the first rank to finish waits for the last one


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="directory with *.tar")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="directory to write; continued when it was begun with the same arguments",
    )
    parser.add_argument("--model", required=True, help="open_clip name, or local-dir:PATH")
    parser.add_argument("--pretrained", help="open_clip tag or weights file; not for local-dir")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per forward pass and rank (default 256)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="arithmetic of the teacher (default: bf16 on a GPU, else fp32)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes per rank that decode; 0: none besides this one",
    )
    accept_launcher_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megacid").setLevel(logging.INFO)
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(
            f"--batch-size is {args.batch_size} and --workers {args.workers}, wanted at least 1 and at least 0"
        )
    if launched():
        die_with_parent()
    return run_stage(lambda parallel, stop: work(args, parallel, stop), args.out, DAY_S)


def work(args: argparse.Namespace, parallel: Parallel, stop: StopRequest) -> None:
    # One rank makes a missing index, the others find it.
    with fail_together(parallel.group):
        index = load_index(args.shards) if parallel.is_first else None
    with fail_together(parallel.group):
        index = index or load_index(args.shards)
        precision = args.precision or ("bf16" if parallel.device.type == "cuda" else "fp32")
        clip = load_clip(args.model, args.pretrained, device=parallel.device, precision=precision)
        settings = {
            "model": args.model,
            "pretrained": args.pretrained,
            "precision": precision,
            "weights": embed.weights_digest(args.model, args.pretrained),
            "dim": clip.embed_dim,
            "shards_digest": index.digest,
        }
    agree(str(settings), "shards and model", parallel.group)
    with fail_together(parallel.group):
        if parallel.is_first:
            each = embed.seconds_per_sample(clip, index, args.batch_size)
            hours = each * index.num_samples / parallel.world / 3600
            print(
                f"{index.num_samples:,} pairs in {len(index.names)} shards, width {clip.embed_dim}, {precision}: about {hours:.3g} h of model time on {parallel.world} ranks"
            )
    with tqdm(unit="sample", desc="embed", disable=not parallel.is_first, unit_scale=True) as bar:

        def progress(total: int):
            bar.reset(total)
            return stop.ticking(bar.update)

        meta = embed.embed(
            index,
            clip,
            args.out,
            parallel,
            settings=settings,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=progress,
        )
    if parallel.is_first:
        print(f"{args.out}: {meta['num_samples']:,} samples embedded, {meta['failures']['count']:,} left out")
        for name in meta["failures"]["named"]:
            print(f"  left out: {name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
