"""The command-line tools. Installed, this package is megacid_tools, and its functions are the console scripts."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path


def _script(name: str) -> Callable[[], None]:
    def run() -> None:
        folder = Path(__file__).parent
        sys.path.insert(0, str(folder))  # as `python tools/NAME.py` does
        runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")

    return run


embed, cluster, balance, evaluate, export = map(_script, ("embed", "cluster", "balance", "eval", "export"))
