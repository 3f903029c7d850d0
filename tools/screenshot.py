#!/usr/bin/env python3
"""Take a picture of the curves of runs as TensorBoard shows them.

    tools/screenshot.py runs/demo docs/images/tensorboard.png
    tools/screenshot.py runs/my_student curves.png --tags "train/(loss|mfu|data_time)$"

Needs Chromium or Chrome, which runs without a window.
"""

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import writing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S, BROWSER_S = 120.0, 120.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description="Take a picture of the curves of runs as TensorBoard shows them.")
    parser.add_argument("runs", type=local_path, help="run directory, or a directory of runs")
    parser.add_argument("out", type=local_path, help="the picture, a .png file")
    parser.add_argument(
        "--tags", default="train/(loss|cosine_image|grad_norm|logit_scale)$",
        help="regular expression of the tags that are shown (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


@contextlib.contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """TensorBoard over `runs` for a `with` block; yields its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *where]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + START_S
            while not _has_scalars(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"TensorBoard shows no scalars of {runs} within {START_S:.0f} s: check its files")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


def _has_scalars(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=10) as answer:
            return len(answer.read()) > 2  # "{}" until the files are read
    except (urllib.error.URLError, OSError):
        return False


def take(browser: str, address: str, out: Path) -> None:
    """Write the page at `address` as a picture of 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1650,1020",
            "--disable-3d-apis",  # curves drawn by WebGL are missing in the picture
            "--virtual-time-budget=20000", f"--user-data-dir={folder}/profile", f"--screenshot={picture}", address,
        ]  # fmt: skip
        try:
            subprocess.run(command, capture_output=True, timeout=BROWSER_S, check=True)
            page = Image.open(picture)
        except (subprocess.SubprocessError, OSError) as error:
            raise UserError(f"{browser} took no picture ({error}): run it by hand to see why") from None
        with page, writing(out) as temporary:
            page.convert("RGB").quantize(256).save(temporary, "PNG", optimize=True)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"none of {', '.join(BROWSERS)} is installed, expected one of them: install chromium")
    if not any(args.runs.rglob("events.out.tfevents.*")):
        raise UserError(f"{args.runs} has no TensorBoard files, expected a run directory or a directory of runs")
    query = urllib.parse.urlencode({"smoothing": 0, "tagFilter": args.tags})
    with tensorboard(args.runs) as address:
        take(browser, f"{address}?{query}#timeseries", args.out)
    print(f"{args.out}: curves of {args.runs}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
