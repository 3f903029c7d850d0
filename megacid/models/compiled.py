"""torch.compile of a student's towers, in place, so that names of parameters and checkpoints stay."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from megacid.errors import UserError

if TYPE_CHECKING:
    from megacid.models.student import Student  # open_clip takes seconds to import

BACKEND = "inductor"


def check_compiler(device: torch.device) -> None:
    """Raise UserError without the compiler that inductor calls on this type of device."""
    # On a GPU, Triton builds its launcher.
    variable, usual = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++"])
    programs = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, programs)):
        raise UserError(
            f'"megacid.student.compile" is true, which needs a compiler, and {" or ".join(programs)} was not '
            f"found: install one, set the variable {variable} to it, or remove the setting"
        )


def compile_towers(student: Student) -> None:
    """Compile both towers at their first forward, separately for each shape of their input.

    Random operations draw the numbers of eager mode, so forwards with and without graph have the same dropout.
    """
    clip = student.clip
    for tower in (clip.visual, getattr(clip, "text", None) or clip.transformer):
        assert isinstance(tower, torch.nn.Module)
        tower.compile(backend=BACKEND, dynamic=False, options={"fallback_random": True})


def eager_towers(compiled: bool) -> AbstractContextManager[Any]:
    """Towers run eagerly in this context. compiled: whether they are, since torch imports its compiler for it."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
