#!/usr/bin/env python3
"""Draw Figure 2 of the CLIP-CID paper for a finished balance stage.

    tools/figures.py --demo runs/demo --out runs/demo/figures
    tools/figures.py --balance balance --out figures
    tools/figures.py --balance balance --out figures --cluster 4711

Writes fig2a_perceptual (copies of an image), fig2b_semantic (similar images), fig2c_process (one cluster before and
after) and fig2d_clusters (cluster sizes) as .png and .pdf, and index.html with captions and numbers. Existing files are
replaced. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, integer, natural, positive, real
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.offline.balance.figures import Choice, make_figures, read_balanced


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--demo", type=Path, metavar="DIR", help="directory written by tools/demo.sh")
    source.add_argument("--balance", type=Path, metavar="DIR", help="directory written by tools/balance.py")
    for name, tool in (("clusters", "cluster"), ("embeddings", "embed")):
        text = f"directory written by tools/{tool}.py (default: the one that tools/balance.py read)"
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="the tars (default: those that tools/balance.py read)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="directory to write")
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    choice = Choice(args.groups, args.members, args.perceptual, args.cluster)
    if args.demo is not None and (args.clusters or args.embeddings or args.shards):
        raise UserError("--demo implies --clusters, --embeddings and --shards: leave them out, or use --balance")
    balanced = read_balanced(args.balance or args.demo / "balance", args.clusters, args.embeddings, args.shards)
    for path in make_figures(balanced, choice, args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: run_alone(main)))
