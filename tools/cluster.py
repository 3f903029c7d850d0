#!/usr/bin/env python3
"""Cluster teacher embeddings with k-means: centroids that initialise the classifier, and a label per sample.

    tools/cluster.py --embeddings data/digits/teacher --out data/digits/clusters --k 100
    torchrun --nproc_per_node 8 tools/cluster.py --embeddings teacher --out clusters --k 1000000 --method hierarchical
    tools/cluster.py --embeddings teacher --out clusters --k 100000 --keep balance
    tools/cluster.py --embeddings new/teacher --out new/clusters --assign-only data/digits/clusters --top-labels 3

The same command continues an interrupted run; a finished or started OUT made with other arguments is refused. A
continued run gives the same bits as an uninterrupted one. SIGTERM (exit code 143) and Ctrl-C (130) stop all ranks.
"""

import argparse
import logging
import sys
from dataclasses import fields, replace

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path, natural, positive, real, seed_number
from megacid.distributed.consensus import fail_together
from megacid.distributed.parallel import Parallel, accept_launcher_arguments
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import StopRequest, run_stage
from megacid.errors import run_tool
from megacid.offline.cluster.cost import describe_cost
from megacid.offline.cluster.modality import embedding_rows
from megacid.offline.cluster.stage import assign_only, cluster
from megacid.offline.cluster.state import PLUS_PLUS_K, TWO_LEVELS_K, KMeansSettings, default_settings
from megacid.storage.metadata import read_meta

COLLECTIVE_TIMEOUT_S = 7200.0  # ranks may have disks of different speed


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--embeddings", required=True, type=local_path, help="directory written by tools/embed.py")
    add("--out", required=True, type=local_path, metavar="OUT", help="directory to write or continue")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--k", type=positive, help="number of clusters")
    task.add_argument(
        "--assign-only",
        type=local_path,
        metavar="CLUSTERS_DIR",
        help="assign labels from the centroids of this finished directory; of the options below only --backend and "
        "--top-labels apply",
    )
    add(
        "--features",
        choices=("image", "text", "mean"),
        default="image",
        help="embeddings to cluster: of the images (default), of the captions, or the normalised mean of both",
    )
    add(
        "--keep",
        type=local_path,
        metavar="BALANCE_DIR",
        help="train on the samples that this output of tools/balance.py keeps (default: all); all samples get labels",
    )
    add("--iterations", type=positive, default=20, help="hierarchical: of each level (default 20)")
    tolerance = "stop when the objective improves by less than this fraction (default 0: never)"
    add("--tolerance", type=real(0, 1, without=(1,)), default=0.0, help=tolerance)
    add("--seed", type=seed_number, default=0, help="seed of all random choices (default 0)")
    add_method(parser)
    add("--metric", choices=("cosine", "euclidean"), default="cosine", help="default: cosine")
    add(
        "--init",
        choices=("random", "k-means++"),
        help="initial centroids; k-means++ takes k steps on a sample of 4 to 32 k rows (default: k-means++, but "
        f"random for flat clusterings of more than {PLUS_PLUS_K:,} clusters)",
    )
    add(
        "--train-sample",
        type=positive,
        metavar="ROWS",
        help="train on a random sample of this many rows (default: all rows); all rows get labels",
    )
    add(
        "--backend",
        choices=("auto", "torch", "faiss", "triton"),
        default="auto",
        help="implementation of the nearest-centroid search; auto (default): triton on a GPU; on a CPU faiss, if "
        "installed and the embeddings have 128 columns or more, but not on AMD's with AVX-512; else torch",
    )
    add("--memory-gb", type=real(0, 1e6, without=(0,)), default=4.0, help="memory bound of one rank (default 4)")
    add("--top-labels", type=positive, default=1, help="labels per sample: label, label_1, ... (default 1)")
    accept_launcher_arguments(parser)
    return parser.parse_args(argv)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Options of flat and hierarchical clustering."""
    add = parser.add_argument
    add(
        "--method",
        choices=("flat", "hierarchical"),
        help="flat: one k-means over all rows; hierarchical: about sqrt(k) coarse clusters, k-means inside each, then "
        f"--refine (default: hierarchical from {TWO_LEVELS_K} clusters on, where it is faster)",
    )
    add("--refine", type=natural, default=6, help="hierarchical: final iterations over all k (default 6)")
    add(
        "--refine-cells",
        type=natural,
        default=16,
        help="hierarchical: in a --refine iteration a row is compared with the centroids of this many nearest coarse "
        "clusters (default 16; 0: with all k, as slow as a flat iteration); labels are always chosen among all k",
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    settings = None if args.assign_only else settings_of(args)
    return run_stage(lambda parallel, stop: run(args, settings, parallel, stop), args.out, COLLECTIVE_TIMEOUT_S)


def settings_of(args: argparse.Namespace) -> KMeansSettings:
    return default_settings(**{field.name: getattr(args, field.name) for field in fields(KMeansSettings)})


def run(args: argparse.Namespace, settings: KMeansSettings | None, parallel: Parallel, stop: StopRequest) -> None:
    with fail_together(parallel.group):
        rows = embedding_rows(args.embeddings, args.features)
        estimated = settings
        if settings and args.keep:
            kept = read_meta(args.keep, expect="balance")["kept"]
            estimated = replace(settings, train_sample=min(settings.train_sample or kept, kept))
    with fail_together(parallel.group):
        if parallel.is_first:
            print(
                describe_cost(estimated, rows.num_rows, rows.dim, parallel.world, parallel.device, args.top_labels)
                if estimated
                else f"{rows.num_rows:,} rows of width {rows.dim}, labels from the centroids of {args.assign_only}"
            )
        else:
            logging.getLogger("megacid").setLevel(logging.WARNING)
    with progress_bar("cluster", "row", enabled=parallel.is_first) as bar:

        def start_progress(total: int):
            bar.reset(-(-total // parallel.world))
            return stop.polling(bar.update)

        options = {"top_labels": args.top_labels, "start_progress": start_progress}
        if settings is None:
            meta = assign_only(args.embeddings, args.assign_only, args.out, parallel, backend=args.backend, **options)
        else:
            meta = cluster(
                args.embeddings, args.out, settings, parallel, features=args.features, keep=args.keep, **options
            )
    if parallel.is_first:
        print(
            f"{args.out}: k {meta['k']:,}, objective {meta['final_objective']:.6f}, imbalance {meta['imbalance']:.3f}, "
            f"empty {meta['empty']:,}" + (f", {meta['iterations']} iterations" if settings else "")
        )


if __name__ == "__main__":
    sys.exit(run_tool(main))
