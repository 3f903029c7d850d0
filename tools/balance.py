#!/usr/bin/env python3
"""Image semantic balance: link near images inside clusters, keep one per group, report what was removed.

    tools/balance.py --embeddings data/digits/teacher --clusters data/digits/clusters --out data/digits/balance --target-keep 0.563
    tools/balance.py --embeddings teacher --clusters clusters --out balance --threshold 0.35 --link greedy --keep caption
    tools/balance.py --embeddings teacher --clusters clusters --out balance --threshold 0.1 --neighbor-clusters 4 --reshard kept

Writes keep/<tar>.npy (bool, in tar order), representative/<tar>.npy (the sample that is kept for each, counted over all tars; -1:
without an embedding), report.json, gallery.html and, when the shards carry uids, DataComp's subset.npy.
Run it again after an interruption: it goes on with the links that OUT/.work holds and gives the same result. SIGTERM and
Ctrl-C end it soon, on all ranks, with exit code 143 and 130. Other arguments for the same OUT make it afresh.
Samples without an embedding (they could not be decoded) are not kept. Where samples carry an `origin` (tools/synthesize.py),
the report says how many of the planted copies were found.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.data.index import load_index
from megacid.distributed.parallel import Parallel, accept_launcher_arguments
from megacid.distributed.stopping import StopRequest, run_stage
from megacid.errors import UserError, run_tool
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.reshard import reshard
from megacid.offline.balance.stage import balance
from megacid.storage.metadata import read_meta

WAIT_S = 7200.0  # clusters are split by an estimate of their cost


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, type=Path, help="directory written by tools/embed.py")
    parser.add_argument("--clusters", required=True, type=Path, help="directory written by tools/cluster.py")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--shards", "--origins", type=Path, help="the tars (default: where tools/embed.py found them)")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--target-keep", type=float, help="share of samples to keep; the threshold is searched")
    how.add_argument(
        "--threshold", type=float, help="Euclidean distance of normalised embeddings below which two are linked"
    )
    parser.add_argument(
        "--link",
        choices=("components", "greedy"),
        default="components",
        help="components: union-find; greedy: a sample stays unless near a kept one",
    )
    parser.add_argument(
        "--keep",
        choices=("nearest", "farthest", "random", "caption"),
        default="nearest",
        help="who stays: by distance to the centroid, or best image-text cosine",
    )
    parser.add_argument("--cap", type=int, help="keep at most so many samples of one cluster")
    parser.add_argument(
        "--neighbor-clusters",
        type=int,
        default=0,
        metavar="M",
        help="also compare every sample with the M other clusters whose centroids are nearest to it: copies fall on both "
        "sides of a border (default 0; 4 finds nearly all; --target-keep counts with it)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--search-rows",
        type=int,
        default=200_000,
        help="samples (whole clusters) the threshold is searched on (default 200000)",
    )
    parser.add_argument("--block", type=int, default=1024, help="rows of one block of pairwise products")
    parser.add_argument(
        "--reshard",
        type=Path,
        metavar="DIR",
        help="also copy the kept samples to new tars there, with sizes.json; embeddings and labels join them as they are",
    )
    parser.add_argument("--gallery-groups", type=int, default=40, help="groups shown in gallery.html")
    accept_launcher_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.gallery_groups < 0:
        raise UserError(f"--gallery-groups is {args.gallery_groups}, expected 0 or more")
    settings = BalanceSettings(
        threshold=args.threshold,
        target_keep=args.target_keep,
        link=args.link,
        keep=args.keep,
        cap=args.cap,
        neighbor_clusters=args.neighbor_clusters,
        seed=args.seed,
        search_rows=args.search_rows,
        block=args.block,
    )
    return run_stage(lambda parallel, stop: work(args, settings, parallel, stop), args.out, WAIT_S)


def work(args: argparse.Namespace, settings: BalanceSettings, parallel: Parallel, stop: StopRequest) -> None:
    with tqdm(unit="row", desc="balance", disable=not parallel.is_first, unit_scale=True) as bar:

        def start_progress(total: int):
            bar.reset(-(-total // parallel.world))
            return stop.polling(bar.update)

        balance(
            args.embeddings,
            args.clusters,
            args.out,
            settings,
            parallel,
            shards=args.shards,
            gallery_groups=args.gallery_groups,
            start_progress=start_progress,
        )
    if args.reshard is not None:
        copy_kept(args, parallel, stop)
    if parallel.is_first:
        print_report(args, json.loads((args.out / "report.json").read_text()))


def copy_kept(args: argparse.Namespace, parallel: Parallel, stop: StopRequest) -> None:
    shards = args.shards or read_meta(args.out, expect="balance")["source"]["shards"]
    with tqdm(unit="sample", desc="reshard", disable=not parallel.is_first, unit_scale=True) as bar:

        def start_progress(total: int):
            bar.reset(-(-total // parallel.world))
            return stop.polling(bar.update)

        meta = reshard(args.out, load_index(shards), args.reshard, parallel, start_progress=start_progress)
    if parallel.is_first:
        print(f"{args.reshard}: {meta['kept']:,} samples in {len(meta['bytes']):,} tars")


def print_report(args: argparse.Namespace, report: dict) -> None:
    wanted = f" (asked for {args.target_keep:.2%})" if args.target_keep is not None else ""
    print(
        f"{args.out}: {report['kept']:,} of {report['total']:,} samples kept, {report['share_kept']:.2%}{wanted}, threshold {report['threshold']:.5f}"
    )
    if args.target_keep is not None:
        exact = report["searched_samples"] >= report["total"]
        print(
            f"  threshold searched on {report['searched_samples']:,} samples{'' if exact else ' (a sample of the clusters)'}"
        )
    across = f" ({report['removed_across_clusters']:,} of them across clusters)" if args.neighbor_clusters else ""
    print(
        f"  removed: {report['removed_by_links']:,} by links{across}, {report['removed_by_cap']:,} by the cap; without an embedding: {report['without_embedding']:,}"
    )
    for name, value in report.get("planted_copies", {}).items():
        print(f"  planted copies, {name}: {value if not isinstance(value, float) else f'{value:.4f}'}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
