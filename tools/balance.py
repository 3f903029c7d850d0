#!/usr/bin/env python3
"""Image semantic balance: link near images inside clusters, keep one sample per group, report what was removed.

    tools/balance.py --embeddings teacher --clusters clusters --out balance --target-keep 0.563
    tools/balance.py --embeddings teacher --clusters clusters --out balance --threshold 0.35 --keep caption
    tools/balance.py --embeddings teacher --clusters clusters --out balance --threshold 0.1 --neighbor-clusters 4
    tools/balance.py --embeddings teacher --clusters clusters --out balance --eps 0.05 --link semdedup --keep farthest
    tools/balance.py --embeddings teacher --cells 1000 --out balance --target-keep 0.563 --keep medoid
    torchrun --nproc_per_node 8 tools/balance.py ...       (or deepspeed): ranks divide the clusters

With --cells it works before clustering; then tools/cluster.py --keep OUT makes clusters of the samples that are kept.

Writes, for every tar, keep/<tar>.npy (bool, one value per sample) and representative/<tar>.npy (int64, the sample kept
for each, numbered over all tars; -1: without an embedding), and report.json, gallery.html and, when the shards have
uids, DataComp's subset.npy. Samples without an embedding (they could not be decoded) are not kept. When samples have
an `origin` (tools/synthesize.py), the report counts the planted copies that were found.
SIGTERM (exit code 143) and Ctrl-C (130) stop all ranks soon.

The same command continues an interrupted run; an OUT made with other arguments is refused.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, natural, positive, real, seed_number, share_of_all
from megacid.data.captions import recorded_caption
from megacid.data.index import load_index
from megacid.distributed.divided_work import Workers
from megacid.distributed.parallel import Parallel, accept_launcher_arguments, long_waits
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import Progress, StartProgress, StopRequest, run_stage
from megacid.errors import run_tool
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.reshard import reshard
from megacid.offline.balance.stage import balance
from megacid.storage.metadata import read_meta

COLLECTIVE_TIMEOUT_S = 7200.0  # while --cells are made; the other collectives wait for days


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--embeddings", required=True, type=local_path, metavar="DIR", help="directory written by tools/embed.py")
    clusters = parser.add_mutually_exclusive_group(required=True)
    clusters.add_argument("--clusters", type=local_path, metavar="DIR", help="directory written by tools/cluster.py")
    clusters.add_argument(
        "--cells",
        type=positive,
        metavar="K",
        help="make K coarse clusters for the comparisons in OUT/cells, as tools/cluster.py --k K would; more cells are "
        "faster and miss more pairs on their borders, unless --neighbor-clusters finds them",
    )
    add(
        "--memory-gb",
        type=real(0, 1e6, without=(0,)),
        default=4.0,
        help="memory bound of a rank for --cells, and for a copy of embeddings that exceed the memory (default 4)",
    )
    add("--out", required=True, type=local_path, metavar="OUT", help="directory to write or continue")
    add(
        "--shards",
        metavar="TARS",
        help="directory, braces, glob, .tar or URL (default: where tools/embed.py read them)",
    )
    linking_arguments(parser)
    add("--seed", type=seed_number, default=0, help="of --keep random, --cells and the threshold search (default 0)")
    add(
        "--search-rows",
        type=positive,
        default=200_000,
        metavar="N",
        help="samples, in whole clusters, on which --target-keep searches the threshold (default 200000)",
    )
    add("--block", type=positive, default=1024, metavar="N", help="rows of one block of products (default 1024)")
    add(
        "--reshard",
        type=local_path,
        metavar="DIR",
        help="also copy the kept samples to new tars in DIR, with sizes.json; the embeddings and labels of the whole "
        "set can be used with them",
    )
    add("--gallery-groups", type=natural, default=40, metavar="N", help="groups shown in gallery.html (default 40)")
    accept_launcher_arguments(parser)
    return parser.parse_args(argv)


def linking_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which samples are near and which of them are kept."""
    add = parser.add_argument
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--target-keep", type=share_of_all, metavar="SHARE", help="share of samples to keep; searches the threshold"
    )
    goal.add_argument(
        "--threshold",
        type=real(0, 2),
        help="Euclidean distance below which a pair is linked; of unit embeddings, so it says the same as a cosine",
    )
    goal.add_argument(
        "--eps", type=real(0, 2), help="link pairs of a cosine above 1 - EPS, as in SemDeDup: --threshold sqrt(2 EPS)"
    )
    add(
        "--link",
        choices=("components", "greedy", "semdedup"),
        default="components",
        help="components (default): connected components of the links; greedy: keep a sample unless it is linked to "
        "a preferred one that is kept; semdedup: unless it is linked to a preferred one, kept or removed",
    )
    add(
        "--keep",
        choices=("nearest", "farthest", "random", "caption", "medoid"),
        default="nearest",
        help="which sample of a group is kept: nearest to the centroid (default), farthest from it, any, the one with "
        "the best image-text cosine, or the medoid: nearest to the mean of its group (with --link components)",
    )
    add("--cap", type=positive, metavar="N", help="samples kept per cluster, at most (default: no limit)")
    add(
        "--neighbor-clusters",
        type=natural,
        default=0,
        metavar="M",
        help="also compare every sample with the M other clusters whose centroids are nearest to it: copies can lie on "
        "both sides of a border (default 0; 4 finds nearly all)",
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.eps is not None:
        args.threshold = math.sqrt(2 * args.eps)  # |x - y|^2 = 2 - 2 cosine
    settings = BalanceSettings(**{field.name: getattr(args, field.name) for field in fields(BalanceSettings)})
    return run_stage(lambda parallel, stop: run(args, settings, parallel, stop), args.out, COLLECTIVE_TIMEOUT_S)


@contextmanager
def report_progress(name: str, unit: str, parallel: Parallel, stop: StopRequest) -> Iterator[StartProgress]:
    with progress_bar(name, unit, enabled=parallel.is_first) as bar:

        def start_progress(total: int) -> Progress:
            bar.reset(-(-total // parallel.world))
            return stop.polling(bar.update)

        yield start_progress


def run(args: argparse.Namespace, settings: BalanceSettings, parallel: Parallel, stop: StopRequest) -> None:
    with report_progress("balance", "row", parallel, stop) as start:
        balance(
            args.embeddings,
            args.clusters,
            args.out,
            settings,
            parallel,
            shards=args.shards,
            memory_gb=args.memory_gb,
            gallery_groups=args.gallery_groups,
            start_progress=start,
        )
    if args.reshard is not None:
        shards = args.shards or read_meta(args.out, expect="balance")["source"]["shards"]
        with report_progress("reshard", "sample", parallel, stop) as start, long_waits(parallel) as waiting:
            caption = recorded_caption(read_meta(args.embeddings, expect="embed"))
            index = load_index(shards, caption=caption, workers=Workers(waiting, poll=stop.poll))
            meta = reshard(args.out, index, args.reshard, waiting, start_progress=start)
        if parallel.is_first:
            print(f"{args.reshard}: {meta['kept']:,} samples in {len(meta['bytes']):,} tars")
    if parallel.is_first:
        print_report(args, json.loads((args.out / "report.json").read_text()))


def print_report(args: argparse.Namespace, report: dict) -> None:
    target = f" (target {args.target_keep:.2%})" if args.target_keep is not None else ""
    print(
        f"{args.out}: {report['kept']:,} of {report['total']:,} samples kept, {report['share_kept']:.2%}{target}, "
        f"threshold {report['threshold']:.5f} (cosine above {report['cosine']:.5f})"
    )
    if args.target_keep is not None:
        part = " (a sample of the clusters)" if report["searched_samples"] < report["total"] else ""
        print(f"  threshold searched on {report['searched_samples']:,} samples{part}")
    across = f" ({report['removed_across_clusters']:,} of them across clusters)" if args.neighbor_clusters else ""
    print(
        f"  removed: {report['removed_by_links']:,} by links{across}, {report['removed_by_cap']:,} by the cap; "
        f"without an embedding: {report['without_embedding']:,}"
    )
    for name, value in report.get("planted_copies", {}).items():
        print(f"  planted copies, {name}: {value if not isinstance(value, float) else f'{value:.4f}'}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
