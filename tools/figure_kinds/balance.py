"""Figure 2 of the CLIP-CID paper for a finished balance stage.

Writes fig2a_perceptual (copies of an image), fig2b_semantic (similar images), fig2c_process (one cluster before and
after) and fig2d_clusters (cluster sizes), and index.html with captions and numbers.
"""

import argparse
from pathlib import Path

from argtypes import integer, natural, positive, real
from megacid.errors import UserError
from megacid.offline.balance.figures import Choice, make_figures, read_balanced


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--demo", type=Path, metavar="DIR", help="directory written by tools/demo.sh")
    source.add_argument("--balance", type=Path, metavar="DIR", help="directory written by tools/balance.py")
    for name, tool in (("clusters", "cluster"), ("embeddings", "embed")):
        text = f"directory written by tools/{tool}.py (default: the one that tools/balance.py read)"
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="the tars (default: those that tools/balance.py read)"
    )
    parser.add_argument("--groups", type=positive, default=9, metavar="N", help="groups in (a) and in (b) (default 9)")
    parser.add_argument(
        "--members", type=integer(2), default=6, metavar="N", help="images per group, at most (default 6)"
    )
    parser.add_argument(
        "--perceptual",
        type=real(0, 2),
        metavar="DISTANCE",
        help="(a) shows groups whose removed images are all nearer than this to the kept one, (b) the others (default: "
        "half the threshold)",
    )
    parser.add_argument(
        "--cluster",
        type=natural,
        metavar="NUMBER",
        help="cluster of (c) (default: one of median size among those with at least two groups)",
    )


def draw(args: argparse.Namespace) -> list[Path]:
    choice = Choice(args.groups, args.members, args.perceptual, args.cluster)
    if args.demo is not None and (args.clusters or args.embeddings or args.shards):
        raise UserError("--demo implies --clusters, --embeddings and --shards: leave them out, or use --balance")
    balanced = read_balanced(args.balance or args.demo / "balance", args.clusters, args.embeddings, args.shards)
    return make_figures(balanced, choice, args.out)
