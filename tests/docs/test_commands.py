"""Every command in README.md, CONTRIBUTING.md, kernels/README.md and docs/ is accepted by the program it calls.

The tool's own parser reads the arguments, run files are loaded with their overrides, and named files must exist. A
block that needs hardware, data or a network is marked by `<!-- needs: ... -->`; programs of others may be absent there.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, ROOT, Block, blocks

from megacid.config.load import load_run

BASH = [block for page in PAGES for block in blocks(page, "bash")]
REPOSITORY = ("tools/", "tests/", "configs/", "examples/", "megacid/", "kernels/", "docs/")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})


class Parsed(BaseException):
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def parse_only(script: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the script's own parser makes of argv; the script goes no further than that."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        raise Parsed(parse_args(self, *args, **options))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *argv])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit as error:
            raise AssertionError(f"{script.name} refuses {argv} (exit {error.code})") from None
    raise AssertionError(f"{script.name} parsed no arguments")


def launched(words: list[str]) -> tuple[int, list[str]]:
    """(ranks, script and its arguments) of a deepspeed or torchrun command line, read by that launcher's parser."""
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        read = parse_args(words[1:])
        return max(1, read.num_gpus), [read.user_script, *read.user_args]
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words[1:])
    return int(read.nproc_per_node), [read.training_script, *read.training_script_args]


def run_file(block: Block, name: str, tmp_path: Path) -> Path:
    """A run file of the repository, or one that the page shows under `<!-- file: NAME -->`."""
    if (ROOT / name).is_file():
        return ROOT / name
    shown = [one for one in blocks(block.page, "json") if one.marks.get("file") == name]
    assert shown, f"{block.name}: the run file {name} is neither in the repository nor on the page"
    (tmp_path / "run.json").write_text(shown[0].text)
    return tmp_path / "run.json"


def check_script(block: Block, ranks: int, words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    script, argv = ROOT / words[0], words[1:]
    assert script.is_file(), f"{block.name}: {words[0]} does not exist"
    arguments = parse_only(script, argv, patch)
    if "deepspeed_config" in arguments:
        load_run(run_file(block, arguments.deepspeed_config, tmp_path), arguments.set, world=ranks)


def check_command(block: Block, words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words or words[0] in ("export", "cd", "source"):
        return
    for word in words:
        path = word.split("::")[0]
        if path.startswith(REPOSITORY) and not any(sign in path for sign in "*{"):
            assert (ROOT / path).exists(), f"{block.name}: {path} does not exist"
    program = words[0]
    if program == "python" and words[1].endswith(".py"):
        check_script(block, 1, words[1:], tmp_path, patch)
    elif program == "python":
        assert words[1] in ("-c", "-m"), f"{block.name}: {words}"
    elif program in ("deepspeed", "torchrun"):
        ranks, rest = launched(words)
        check_script(block, ranks, rest, tmp_path, patch)
    elif program.startswith("megacid-"):
        assert program in SCRIPTS, f"{block.name}: pyproject.toml has no console script {program}"
    elif "needs" not in block.marks:
        assert shutil.which(program) or (Path(sys.executable).parent / program).exists(), f"{block.name}: {program}"


def commands(text: str) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[: words.index(">")] if ">" in words else words for words in split if words]


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.name)
def test_commands_of_a_block_are_accepted(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(block.text):
        check_command(block, words, tmp_path, monkeypatch)


@pytest.mark.parametrize("words", ["python tools/balance.py --no-such-option", "python tools/nothing.py"])
def test_a_wrong_command_is_found(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(ROOT / "README.md", 1, "bash", words)
    with pytest.raises(AssertionError):
        check_command(block, words.split(), tmp_path, monkeypatch)


def test_options_in_benchmark_tables_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    found = re.findall(r"\| `([^`]*--suite [^`]*)` \|$", page, re.MULTILINE)
    assert len(found) >= 8
    for options in found:
        parse_only(ROOT / "tools" / "bench.py", options.split(), monkeypatch)


def test_complete_run_files_on_pages_are_good(tmp_path: Path) -> None:
    shown = [block for page in PAGES for block in blocks(page, "json") if '"train_batch_size"' in block.text]
    assert len(shown) >= 2
    for number, block in enumerate(shown):
        path = tmp_path / f"{number}.json"
        path.write_text(block.text)
        load_run(path, [], world=2)
