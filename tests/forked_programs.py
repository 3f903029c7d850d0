"""Runs a Python program in such a way that the Python programs it starts are forked from its process.

    python tests/forked_programs.py SCRIPT [ARGUMENT ...]

They share one import of PyTorch, DeepSpeed and open_clip, which takes 2 to 5 s of CPU time. Their streams, folder,
environment, process group and signals are those that `subprocess.Popen` gives them. Of the interpreter's options only
-m and -c have an effect, and what libraries read from the environment at their import is read once.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that runs `[sys.executable, ...]` in its fork, in the place of the new interpreter."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
        **options: Any,
    ) -> None:
        def run() -> None:
            if preexec_fn is not None:
                preexec_fn()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # among them the pipe on which Popen waits for the exec
            os._exit(exit_code(args[1:], os.environ if env is None else env))

        forks = args[0] == sys.executable
        sys.stdout.flush()
        super().__init__(args, env=env, preexec_fn=run if forks else preexec_fn, **options)


def exit_code(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program as `python WORDS` would, and return its exit code."""
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    try:
        run_program(list(words))
        return 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_program(words: list[str]) -> None:
    """words: as after `python`."""
    while words[0] in ("-W", "-u"):
        del words[: 2 if words[0] == "-W" else 1]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], os.getcwd()
        exec(words[1], types.ModuleType("__main__").__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401
    import torch._dynamo  # noqa: F401

    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    run_program(sys.argv[1:])
