"""Small checkpoints and their mirror, saved without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacid.checkpoint.copier import Copier
from megacid.checkpoint.mirror import Mirror
from megacid.checkpoint.saver import Saver

GUARD = {"skipped": 0, "consecutive": 0, "recent": [], "losses": []}


class Weights:
    """The part of the engine that a saver needs: three tensors, whose values are the step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for number in range(3):
            yield f"clip.layer{number}", {"param": torch.full((50 + number,), float(self.step))}

    def named_buffers(self) -> dict[str, Tensor]:
        return {}


def save(saver: Saver, *steps: int) -> None:
    for step in steps:
        saver.save(step, Weights(step), {}, (0, 0), {"updates": step, "guard": GUARD})  # type: ignore[arg-type]


def make_saver(root: Path, url: str, **options: Any) -> Saver:
    copier = Copier(Mirror(url, keep_last=2), **{"wait_s": 30, **options})
    return Saver(root, keep_last=2, group=options.get("group"), copier=copier)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
