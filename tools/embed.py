#!/usr/bin/env python3
"""Embed every image-text pair of a folder of shards with a frozen open_clip teacher.

    tools/embed.py --shards data/digits/train --out data/digits/teacher --model local-dir:exports/teacher
    tools/embed.py --shards laion --out teacher --model ViT-bigG-14 --pretrained laion2b_s39b_b160k
    tools/embed.py --shards laion --out teacher --model ViT-L-14 --pretrained openai --adopt clip_retrieval_output
    tools/embed.py --shards s --out t --model ViT-L-14 --pretrained openai --caption 'json:captions.*' --views 8
    torchrun --nproc_per_node 8 tools/embed.py ...       (or deepspeed): ranks divide the shards

Writes clip-retrieval's layout, which embedding-reader and autofaiss also read, one file of each kind per tar:
img_emb/*.npy and text_emb/*.npy (float16, L2-normalised), metadata/*.parquet, and failures/*.parquet with the reason
for every skipped sample. --views also writes view_emb/*.npy, the embeddings of the crops. With json:FIELD.*,
caption_emb/*.npy has those of all captions, and the column `captions` of metadata/*.parquet their number per sample.
SIGTERM (exit code 143) and Ctrl-C (130) stop all ranks after the current batch.

The same command continues an interrupted run; a finished or started OUT made with other arguments is refused.
"""

import argparse
import os
import sys
from collections import Counter

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, natural, positive, seed_number, share
from megacid.data.captions import CaptionSource
from megacid.data.index import ShardIndex, load_index
from megacid.data.index_report import MAX_LOST, listed, percent, summary
from megacid.distributed.consensus import agree, fail_together
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel, accept_launcher_arguments
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import Progress, StopRequest, run_stage
from megacid.errors import UserError, run_tool
from megacid.models.clip import LoadedClip, check_weights, load_clip
from megacid.offline.embed import adopt as adopting
from megacid.offline.embed import encoding
from megacid.offline.embed import stage as embed_stage
from megacid.offline.embed.foreign import open_foreign
from megacid.offline.embed.input import Crops

SHOWN = 10  # shards with skipped samples, and skipped samples, that are printed
COLLECTIVE_TIMEOUT_S = 86400.0  # with --sharding static the first rank to finish waits for the last one


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--shards",
        required=True,
        nargs="+",
        metavar="TARS",
        help="directory with *.tar, .tar files, a quoted glob or brace pattern, or URLs of these",
    )
    parser.add_argument(
        "--caption",
        default="txt",
        metavar="SOURCE",
        help="where captions are: txt (default), the ending of another text member, json:FIELD of the .json member, or "
        "json:FIELD.* for all texts of a list",
    )
    parser.add_argument("--out", required=True, type=local_path, metavar="OUT", help="directory to write or continue")
    parser.add_argument("--model", required=True, help="open_clip name, local-dir:PATH, or hf-hub:ORG/NAME")
    parser.add_argument("--pretrained", help="open_clip tag or weights file of an open_clip name")
    add_views(parser)
    parser.add_argument(
        "--max-lost",
        type=share,
        default=MAX_LOST,
        metavar="SHARE",
        help="share of the samples that may be skipped; more end the tool with an error (default 0.05)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=256, help="samples per forward pass and rank (default 256)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="arithmetic of the teacher (default: bf16 on a GPU, else fp32)"
    )
    parser.add_argument(
        "--workers",
        type=natural,
        default=min(8, os.cpu_count() or 1),
        help="decoding processes per rank (default: number of cores, at most 8); 0: decode in the main process",
    )
    parser.add_argument(
        "--sharding",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic (default): a rank that is done takes over shards that no rank has started; needs file locks that "
        "work between nodes. static: shard number modulo number of ranks. Both write the same files",
    )
    parser.add_argument(
        "--adopt",
        type=local_path,
        metavar="FOLDER",
        help="take the embeddings of this folder of clip-retrieval or DataComp instead of computing them; --model and "
        "--pretrained name their teacher; of the other options --caption, --max-lost and --arrays apply",
    )
    parser.add_argument(
        "--arrays",
        metavar="NAME",
        help="of the .npz files of --adopt: take NAME_img and NAME_txt (default: the only pair)",
    )
    accept_launcher_arguments(parser)
    return parser.parse_args(argv)


def add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views",
        type=natural,
        default=0,
        metavar="N",
        help="also embed N random crops of every image, for training with data.augment random_resized_crop (default 0)",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the crops of --views (default 0)")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.arrays is not None and args.adopt is None:
        raise UserError(f"--arrays is {args.arrays}, expected only with --adopt: leave it out")
    if args.precision is not None and args.adopt is not None:
        raise UserError(f"--precision is {args.precision}, but --adopt computes no embedding: leave it out")
    if args.adopt is not None and CaptionSource.parse(args.caption).several:
        raise UserError(
            f"--caption is {args.caption}, but --adopt takes one text embedding per sample: name one caption, such as "
            f"{args.caption.removesuffix('*')}0"
        )
    if args.views and args.adopt is not None:
        raise UserError(f"--views is {args.views}, but --adopt computes no embedding: leave it out")
    if args.seed and not args.views:
        raise UserError(f"--seed is {args.seed}, expected only with --views: leave it out")
    return run_stage(lambda parallel, stop: embed(args, parallel, stop), args.out, COLLECTIVE_TIMEOUT_S)


def embed(args: argparse.Namespace, parallel: Parallel, stop: StopRequest) -> None:
    with fail_together(parallel.group):
        if args.adopt is None:
            check_weights(args.model, args.pretrained)
    index = load_index(
        "::".join(args.shards),
        caption=args.caption,
        max_lost=args.max_lost,
        workers=Workers(parallel, poll=stop.poll),
    )
    with fail_together(parallel.group):
        index.check_captions()
    if args.adopt is not None:
        adopt_folder(args, index, parallel, stop)
        return
    with fail_together(parallel.group):
        precision = args.precision or ("bf16" if parallel.device.type == "cuda" else "fp32")
        clip = load_clip(args.model, args.pretrained, device=parallel.device, precision=precision)
        crops = None
        if args.views:
            crops = encoding.teacher_crops(args.model, args.pretrained, args.views, args.seed)
        settings = {
            "model": args.model,
            "pretrained": args.pretrained,
            "precision": precision,
            "weights": embed_stage.weights_digest(args.model, args.pretrained),
            "dim": clip.embed_dim,
            "shards_digest": index.digest,
            **index.caption.setting,
            **(crops.views.setting if crops else {}),
        }
    agree(str(settings), "shards and model", parallel.group)
    with progress_bar("embed", "sample", enabled=parallel.is_first) as bar:

        def start_progress(total: int) -> Progress:
            if parallel.is_first and total:
                print(estimate(index, clip, crops, args, total, precision, parallel.world))
            bar.reset(total)
            return stop.polling(bar.update)

        meta = embed_stage.embed(
            index,
            clip,
            args.out,
            parallel,
            settings=settings,
            batch_size=args.batch_size,
            workers=args.workers,
            crops=crops,
            sharding=args.sharding,
            max_lost=args.max_lost,
            start_progress=start_progress,
        )
        done, seconds = bar.n, bar.elapsed
    if parallel.is_first:
        print_result(args, index, meta)
        if done:
            speed = f"{done / seconds:,.1f} samples/s on {parallel.world} ranks"
            print(f"  this run: {done:,} samples in {seconds:,.0f} s, {speed}")


def adopt_folder(args: argparse.Namespace, index: ShardIndex, parallel: Parallel, stop: StopRequest) -> None:
    with fail_together(parallel.group):
        folder = open_foreign(args.adopt, args.arrays)
        settings = adopting.settings_of(folder, index, args.model, args.pretrained)
    agree(str(settings), "shards and embeddings", parallel.group)
    with progress_bar("adopt", "sample", enabled=parallel.is_first) as bar:

        def start_progress(total: int) -> Progress:
            bar.reset(-(-total // parallel.world))
            return stop.polling(bar.update)

        meta = adopting.adopt(
            *(index, folder, args.out, parallel),
            settings=settings,
            max_lost=args.max_lost,
            start_progress=start_progress,
        )
    if parallel.is_first:
        print_result(args, index, meta)
        adopted = meta["adopted"]
        print(f"  {adopted['rows']:,} rows of {args.adopt}, {adopted['surplus']:,} of them in no tar")


def estimate(
    index: ShardIndex,
    clip: LoadedClip,
    crops: Crops | None,
    args: argparse.Namespace,
    total: int,
    precision: str,
    ranks: int,
) -> str:
    """The amount of work, an estimate of its duration where there is one, and samples that could not be decoded."""
    speed = encoding.measure_speed(clip, index, args.batch_size, crops)
    views = f"{args.views} views, " if crops else ""
    shards = f"{len(index.names):,} shards, {views}width {clip.embed_dim}, {precision}"
    amount = f"{total:,} of {index.num_samples:,} pairs in {shards}"
    if speed.model is None:
        return f"{amount}: no estimate of the time, {speed.problem}"
    decoding, model = speed.decoding / max(1, args.workers), speed.model
    # Workers decode while the model runs; without workers decoding and the model alternate.
    each = max(decoding, model) if args.workers else decoding + model
    problem = f"\n  {speed.problem}" if speed.problem else ""
    return (
        f"{amount}: about {each * total / ranks / 3600:.3g} h on {ranks} rank{'s' if ranks > 1 else ''} (per sample "
        f"and rank: {1e3 * model:.3g} ms in the model, {1e3 * decoding:.3g} ms decoding with {args.workers} workers)"
        f"{problem}"
    )


def print_result(args: argparse.Namespace, index: ShardIndex, meta: dict) -> None:
    out, failed, by_shard = args.out, meta["failures"], meta["failures_by_shard"]
    reasons = f" ({listed(Counter(meta['failures_by_reason']))})" if failed["count"] else ""
    limit = f"at most {percent(args.max_lost)} may be"
    print(f"{out}: {meta['num_samples']:,} samples embedded, {failed['count']:,} skipped{reasons}; {limit}")
    print(f"  the index of the shards: {summary(index.shards)}")
    if by_shard:
        worst = sorted(by_shard, key=by_shard.__getitem__, reverse=True)[:SHOWN]
        counts = ", ".join(f"{stem}: {by_shard[stem]:,}" for stem in worst)
        print(f"  skipped in {len(by_shard):,} shards, most in {counts}")
        print(f"  reasons are in {out / 'failures'}; the first skipped samples:")
    for name in failed["named"][:SHOWN]:
        print(f"  skipped: {name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
