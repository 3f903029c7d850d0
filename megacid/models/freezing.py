"""Parameters of a student that stay as they are: `student.freeze`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from megacid.errors import UserError

TOWERS = ("image", "text")


def part_of(name: str) -> str:
    """What a parameter of an open_clip model belongs to: "image", "text", "logit_scale" or "logit_bias"."""
    if name.startswith("logit_"):
        return name
    return "image" if name.startswith("visual.") else "text"


def frozen_parameters(clip: nn.Module, patterns: Sequence[str], trained: Iterable[str]) -> set[str]:
    """Names of the parameters of an open_clip model that patterns select.

    Args:
        patterns: of fnmatch, over open_clip's names; the words "image" and "text" select a tower.
        trained: the outputs of the student that the objective differentiates, as `part_of` names them.

    Raises:
        UserError: a pattern selects nothing, or no tower is left that the objective trains.
    """
    names = [name for name, _ in clip.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if (part_of(name) if pattern in TOWERS else name) == pattern}
        found |= {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5]
            raise UserError(
                f'"megacid.student.freeze" has the pattern {pattern!r}, which matches no parameter: the nearest names '
                f'are {", ".join(near)}; write one of them, a pattern such as "visual.*", or "image" or "text"'
            )
        frozen |= found
    left = {part_of(name) for name in names if name not in frozen} & set(TOWERS)
    if patterns and not left & set(trained):
        only = (
            "" if not left else f": the objective trains the {' and '.join(sorted(set(trained) & set(TOWERS)))} tower"
        )
        raise UserError(
            f'"megacid.student.freeze" is {list(patterns)}, which leaves no parameter of a tower with a gradient{only}'
            ": remove a pattern, or add a term of the loss that trains the other tower"
        )
    return frozen


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The modules of which every parameter is frozen, and that have one."""
    trains = {inner: [p.requires_grad for p in inner.parameters()] for inner in module.modules()}
    return [inner for inner, flags in trains.items() if flags and not any(flags)]
