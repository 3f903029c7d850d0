#!/usr/bin/env python3
"""Index a folder of tar shards for random access by the loader, or verify an existing index.

    tools/index_shards.py data/digits/train
    tools/index_shards.py data/digits/train --verify      # hash every tar; exit code 1 when something differs

Training builds a missing index itself.
"""

import logging
import sys

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser
from megacid.data.index import load_index, verify_index
from megacid.data.index_report import lost_samples, summary
from megacid.data.tar_samples import LOST
from megacid.distributed.progress import progress_bar
from megacid.errors import run_tool


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("shards", help="directory with *.tar")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the sizes, sha256 and tables of all tars with the index; change nothing",
    )
    parser.add_argument(
        "--allow-bad",
        action="store_true",
        help="use the intact samples of damaged tars, and of shards that lose more than 5 %% of their samples, instead "
        "of refusing them",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    with progress_bar("verify" if args.verify else "index", "tar") as bar:

        def on_shard(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if args.verify:
            problems = verify_index(args.shards, on_shard)
        else:
            index = load_index(args.shards, allow_bad=args.allow_bad, on_shard=on_shard)
    if args.verify:
        print("\n".join(problems) or f"{args.shards}: all tars match the index; images were not decoded")
        return 1 if problems else 0
    size = sum(shard["bytes"] for shard in index.shards)
    totals = f"{len(index.names)} shards, {summary(index.shards)}, {size:,} bytes"
    print(f"{args.shards}: {totals}, digest {index.digest[:12]}")
    for reason in lost_samples(index.shards):
        print(f"  {reason}: {LOST[reason]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
