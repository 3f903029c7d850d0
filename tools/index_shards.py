#!/usr/bin/env python3
"""Index tar shards for random access by the loader, join them with side tables, or verify an existing index.

    tools/index_shards.py data/digits/train
    tools/index_shards.py data/digits/train --verify      # hash every tar; exit code 1 when something differs
    tools/index_shards.py 'cc12m/{00000..01242}.tar' --caption json:caption
    tools/index_shards.py laion --join --teacher teacher --labels clusters --keep balance
    MEGACID_CACHE_DIR=/nvme/cache tools/index_shards.py s3://bucket/laion
    torchrun --nnodes 4 --nproc-per-node 1 ... tools/index_shards.py laion/     # on several nodes, one rank on each

All cores share the tars. A build that was stopped continues, and every number of processes and ranks gives the same
files. Training builds a missing index and a missing joined table itself.
"""

import argparse
import os
import sys

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, positive, share
from megacid.data.captions import CaptionSource
from megacid.data.ensemble import open_teachers
from megacid.data.index import ShardIndex, load_index
from megacid.data.index_report import MAX_LOST, lost_samples, lost_share, percent, summary
from megacid.data.index_verify import verify_index
from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.tar_samples import remedy
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import DEFAULT_TIMEOUT_S, Parallel, accept_launcher_arguments
from megacid.distributed.stopping import StopRequest, run_stage
from megacid.errors import UserError, run_tool


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("shards", nargs="+", help="directory with *.tar, .tar files, quoted globs or braces, URLs")
    parser.add_argument(
        "--caption",
        default="txt",
        metavar="SOURCE",
        help="where captions are: txt (default), the ending of another text member, json:FIELD of the .json member, or "
        "json:FIELD.* for all texts of a list",
    )
    parser.add_argument(
        "--keep-blank-captions",
        action="store_true",
        help='use samples whose caption is empty, or a missing value written as text such as "nan", instead of leaving '
        "them out; stored in the index, so embedding and training follow. Not with json:FIELD.*",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the sizes, sha256 and tables of all tars with the index; change nothing",
    )
    parser.add_argument(
        "--max-lost",
        type=share,
        default=MAX_LOST,
        metavar="SHARE",
        help="share of the samples that may be lost; more end the tool with an error (default 0.05)",
    )
    parser.add_argument(
        "--allow-bad",
        action="store_true",
        help="use the intact samples of damaged tars instead of refusing them, whatever share of the samples is lost",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes of each rank (default: the cores of the host, divided by the ranks on it)",
    )
    parser.add_argument("--join", action="store_true", help="also make the joined table that training reads")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="DIR", help="with --join: as data.teacher")
    parser.add_argument("--labels", metavar="DIR", help="with --join: as data.labels")
    parser.add_argument("--keep", metavar="DIR", help="with --join: as data.keep")
    accept_launcher_arguments(parser)
    args = parser.parse_args(argv)
    if not args.join and (args.teacher or args.labels or args.keep):
        parser.error("--teacher, --labels and --keep have no effect without --join: add it, or leave them out")
    if args.join and args.verify:
        parser.error("--verify changes nothing, --join writes: leave one of them out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.keep_blank_captions and CaptionSource.parse(args.caption).several:
        raise UserError(
            f"--keep-blank-captions is set, but --caption is {args.caption}, which never uses blank texts of a list: "
            f"leave the option out, or name one caption, such as {args.caption.removesuffix('*')}0"
        )

    code = 0

    def stage(parallel: Parallel, stop: StopRequest) -> None:
        nonlocal code
        code = index_or_verify(args, Workers(parallel, args.workers, stop.poll))

    return run_stage(stage, None, DEFAULT_TIMEOUT_S) or code


def index_or_verify(args: argparse.Namespace, workers: Workers) -> int:
    """Returns the exit code: 1 if --verify finds a mismatch."""
    shards = "::".join(args.shards)
    if args.verify:
        problems = verify_index(shards, caption=args.caption, workers=workers)
        if workers.rank == 0:
            print("\n".join(problems) or f"{shards[:200]}: all tars match the index; images were not decoded")
        return 1 if problems else 0
    index = load_index(
        shards,
        caption=args.caption,
        keep_blank=args.keep_blank_captions or None,
        allow_bad=args.allow_bad,
        max_lost=args.max_lost,
        ask=True,
        workers=workers,
    )
    if workers.rank == 0:
        print_summary(index, 1.0 if args.allow_bad else args.max_lost)
    if args.join:
        join(index, args, workers)
    return 0


def join(index: ShardIndex, args: argparse.Namespace, workers: Workers) -> None:
    """Make the joined table of an index."""
    with workers.together():
        sources = JoinSources(
            index,
            open_teachers(args.teacher, index) if args.teacher else None,
            LabelTable(args.labels, index) if args.labels else None,
            KeepTable(args.keep, index) if args.keep else None,
        )
    joined = open_joined(sources, workers=workers)
    usable, lacking = joined.counts.sum(axis=0).tolist()
    if workers.rank == 0:
        print(f"{joined.folder}: {usable:,} usable samples, {lacking:,} without an embedding")


def print_summary(index: ShardIndex, max_lost: float) -> None:
    size = sum(shard["bytes"] for shard in index.shards)
    totals = f"{len(index.names)} shards, {summary(index.shards)}, {size:,} bytes"
    accepted = ", more were accepted before" if lost_share(index.shards) > max_lost else ""
    print(f"{index.paths}: {totals}, digest {index.digest[:12]}; at most {percent(max_lost)} may be lost{accepted}")
    for reason in lost_samples(index.shards):
        print(f"  {reason}: {remedy(reason, index.caption)}")


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"  # ranks exchange messages only
    sys.exit(run_tool(main))
