#!/usr/bin/env python3
"""Draw the figures of the CLIP-CID paper, and those of a study, from files that other tools wrote.

    tools/figures.py balance --balance balance --out figures                    Figure 2
    tools/figures.py results new=results/new old=results/old --out figures      Figure 1
    tools/figures.py weights new=runs/new old=ViT-B-32,laion400m_e32 --out figures   Figure 4
    tools/figures.py patches new=runs/new old=runs/old --images test/0.tar --out figures   Figure 5
    tools/figures.py study configs/study/icons.json --results runs/study/results --out figures
    tools/figures.py curves runs/new runs/old --out figures

Each figure is written as .png, .svg and .pdf; existing files are replaced. Equal input gives equal files. The word
"balance" may be left out. Needs matplotlib. `tools/figures.py KIND --help` lists the options of a kind.
"""

import argparse
import sys

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from figure_kinds import balance, curves, patches, results, study, weights
from megacid.distributed.stopping import run_alone
from megacid.errors import run_tool
from megacid.offline.figure_style import figure_style

KINDS = {
    "balance": balance,
    "results": results,
    "weights": weights,
    "patches": patches,
    "study": study,
    "curves": curves,
}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        text = str(kind.__doc__)
        part = kinds.add_parser(name, description=text, help=text.splitlines()[0])
        kind.add_arguments(part)
        part.add_argument("--out", required=True, type=local_path, metavar="OUT", help="directory to write")
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["balance", *argv]
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if argv is None else argv)
    with figure_style():  # entered before any input is read, since it needs matplotlib
        paths = KINDS[args.kind].draw(args)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: run_alone(main)))
