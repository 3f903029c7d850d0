#!/usr/bin/env python3
"""Export a run's student to a directory that stock open_clip loads, with a pickle-free .safetensors and a .pt file.

--transformers adds the files that CLIPModel and CLIPProcessor of Hugging Face transformers load, and a model card.

tools/export.py --run runs/digits --out export/digits
tools/export.py --run runs/digits --step 200 --out export/digits --name digits-200
tools/export.py --run runs/digits --out export/digits --transformers --ema
"""

import argparse
import sys

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.evaluate.export import export_student, read_run_block, student_from_run
from megacid.evaluate.model_card import model_card
from megacid.models.clip import LOCAL_DIR
from megacid.storage.atomic import disk_errors, remove_temporary_files


def parse_step(text: str) -> int | None:
    """'latest' -> None, otherwise a step."""
    if text == "latest":
        return None
    if not text.isdigit():
        raise UserError(f"--step is {text!r}, expected a step or 'latest'")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--run", type=local_path, required=True, help="run directory written by train.py")
    parser.add_argument(
        "--step", default="latest", help="step of the checkpoint (default: latest, the newest valid one)"
    )
    parser.add_argument("--out", type=local_path, required=True, help="directory for the files")
    parser.add_argument("--name", help="name of the model and of its .pt and .json file (default: name of the run)")
    parser.add_argument(
        "--ema", action="store_true", help="export the moving average of the weights (student.ema_decay)"
    )
    parser.add_argument(
        "--transformers", action="store_true", help="also write what transformers loads (CLIPModel), and a model card"
    )
    args = parser.parse_args(argv)
    return run_alone(lambda: export(args))


def export(args: argparse.Namespace) -> int:
    student, step = student_from_run(args.run, parse_step(args.step), ema=args.ema)
    name = args.name or args.run.resolve().name
    source = {"run": str(args.run), "step": step, "weights": "ema" if args.ema else "student"}
    card = None
    if args.transformers:
        card = model_card(student, name, args.run, step, read_run_block(args.run), ema=args.ema)
    with disk_errors(args.out):
        remove_temporary_files(args.out)
        files = export_student(student, args.out, name=name, source=source, card=card)
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    print(f"exported step {step}; load it with open_clip.create_model_and_transforms('{LOCAL_DIR}{args.out}')")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
