"""Loads a run file: reads JSON or Hjson, applies `--set`, refuses unknown keys, checks every value.

One file describes one run. It holds DeepSpeed's own keys and a "megacid" block:

    run = load_run("configs/digits_cpu.json", ["classifier.sample_rate=0.2"], world=2)
    run.megacid     a `MegacidConfig`, every field checked
    run.deepspeed   the dict for deepspeed.initialize, with all three batch sizes

An unknown key is an error in both parts: `sections.py` defines the keys of the block, `deepspeed_keys.py` DeepSpeed's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hjson
from pydantic import ValidationError

from megacid.config.deepspeed import lint_deepspeed
from megacid.config.deepspeed_keys import REFUSED, DeepSpeedKeys
from megacid.config.fields import expanded_path
from megacid.config.messages import check_tree, user_error
from megacid.config.schema import SECTIONS, MegacidConfig, RunFile
from megacid.errors import UserError, nearest, one_line

_RUN_FILE_CHARACTERS = 1 << 20


def _apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value` to the "megacid" block or to DeepSpeed's keys; null removes the key.

    Values are JSON, else text.
    """
    path, sign, text = assignment.partition("=")
    shown = f"--set {assignment[:200]!r}"
    if not sign or not path:
        raise UserError(f"{shown}: expected section.key=value, for example --set classifier.sample_rate=0.2")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the type of the field decides
        value = text
    *sections, key = path.removeprefix("megacid.").split(".")
    top = sections[0] if sections else key
    known = [*SECTIONS, *DeepSpeedKeys.model_fields]
    if top not in {*known, *REFUSED}:
        near = nearest(top, sorted(known))
        raise UserError(f"{shown}: unknown section {top[:100]!r}: {near}")
    node = tree.setdefault("megacid", {}) if top in SECTIONS else tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{shown}: {section[:100]!r} is a value, expected a block")
    if value is None:
        node.pop(key, None)
    else:
        node[key] = value


def expand_path(path: str, name: str) -> str:
    """`path` with a leading ~ or ~user replaced by the home directory. UserError for a variable, which is not expanded.

    Args:
        name: of the setting or option, for the message.
    """
    try:
        return expanded_path(path)
    except ValueError as error:
        raise UserError(f"{name} is {json.dumps(path)}, expected {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise UserError(f"key {json.dumps(key)[:200]} is written twice in one block of the run file: keep one")
        seen[key] = value
    return seen


def load_run(path: str | Path, assignments: list[str] | None = None, *, world: int) -> RunFile:
    """Read, override and check a run file.

    Args:
        assignments: `section.key=value` texts, applied in order.
        world: number of ranks; completes the batch sizes.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is invalid.
    """
    path = Path(path)
    try:
        with open(path) as file:
            text = file.read(_RUN_FILE_CHARACTERS + 1)
        if len(text) > _RUN_FILE_CHARACTERS:
            raise UserError(f"the run file {path} has more than {_RUN_FILE_CHARACTERS} characters: correct its path")
        tree = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"cannot read the run file {path} ({error.strerror}): correct --deepspeed_config") from None
    except UserError:
        raise
    except OverflowError:  # hjson rounds a float to look for an integer
        raise UserError(f"the run file {path} has a number that no float can hold, such as 1e400: correct it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the run file {path} is neither JSON nor Hjson: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"the run file {path} holds {type(tree).__name__}, expected a block {{...}}")
    for assignment in assignments or []:
        _apply_set(tree, assignment)
    check_tree(tree)
    block = tree.pop("megacid", None)
    if block is None:
        raise UserError(
            f'the run file {path} has no "megacid" block, expected one next to DeepSpeed\'s keys: see configs/'
        )
    try:
        megacid = MegacidConfig.model_validate(block)
    except ValidationError as error:
        raise user_error(error, MegacidConfig, "megacid") from None
    run = RunFile(path, megacid, lint_deepspeed(tree, world))
    if megacid.student.compile and run.zero_stage == 3:
        raise UserError(
            '"megacid.student.compile" is true at "zero_optimization.stage" 3, whose parameters are empty when '
            "torch.compile traces the towers: use stage 2, or remove student.compile"
        )
    return run
