#!/usr/bin/env python3
"""Draw what the balance stage did: perceptual redundancy, semantic redundancy, one cluster step by step, cluster sizes.

    tools/figures.py --demo runs/demo --out runs/demo/figures
    tools/figures.py --balance balance --out figures
    tools/figures.py --balance balance --clusters clusters --embeddings teacher --shards laion --out figures --cluster 4711

Writes fig2a_perceptual, fig2b_semantic, fig2c_process and fig2d_clusters (Figure 2 of the paper) as .png and .pdf, and
index.html with captions and numbers, which needs nothing from elsewhere. All of it is read from what the stages wrote; folders
that are not named are those that tools/balance.py was given. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.offline.balance.figures import Choice, make_figures, read_balanced


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", type=Path, help="output directory of tools/demo.sh")
    what.add_argument("--balance", type=Path, help="directory written by tools/balance.py")
    parser.add_argument("--clusters", type=Path, help="directory written by tools/cluster.py")
    parser.add_argument("--embeddings", type=Path, help="directory written by tools/embed.py")
    parser.add_argument("--shards", type=Path, help="the tars")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--groups", type=int, default=9, help="groups in (a) and in (b) (default 9)")
    parser.add_argument("--members", type=int, default=6, help="pictures of a group, at most (default 6)")
    parser.add_argument(
        "--perceptual",
        type=float,
        metavar="DISTANCE",
        help="groups whose removed pictures are all nearer than this to the kept one are (a), others (b); default: half the threshold",
    )
    parser.add_argument(
        "--cluster",
        type=int,
        help="the cluster of (c); default: of those with two groups or more, the one of median size",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    choice = Choice(args.groups, args.members, args.perceptual, args.cluster)
    if args.demo is not None and (args.clusters or args.embeddings or args.shards):
        raise UserError("--demo names all folders: leave --clusters, --embeddings and --shards out, or give --balance")
    found = read_balanced(args.balance or args.demo / "balance", args.clusters, args.embeddings, args.shards)
    for path in make_figures(found, choice, args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: run_alone(main)))
