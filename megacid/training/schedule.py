"""Learning rates as a pure function of the step, and the student's parameter groups."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from megacid.config.schema import RunFile
from megacid.config.sections import ScheduleConfig
from megacid.models.freezing import TOWERS, part_of

# "visual.transformer.resblocks.3", "visual.layer1.0", "text.encoder.layer.3"; stems and heads may be numbered, too.
_BLOCK = re.compile(r"(?!text\.proj\.|visual\.head\.|.*\b(?:stem|patch_embed)\b)(.*?\.\d+)\.")
_EMBEDDING = re.compile(
    r"(?<!attnpool\.)\b(conv\d|bn\d|class_embedding|positional_embedding|token_embedding|cls_emb|ln_pre|embeddings|"
    r"patch_embed|stem|pos_embed|cls_token|reg_token|norm_pre)\b"
)


def learning_rate_share(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Fraction of the peak learning rate at `step` (from 0): linear warm-up to 1, then as schedule.kind says.

    A decay reaches final_share at total_steps. The shapes of wsd: Hägele et al. 2024, arXiv 2405.18392.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    start = schedule.decay_start(total_steps)
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    if schedule.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = 1 - (progress if schedule.decay_shape == "linear" else math.sqrt(progress))
    return schedule.final_share + (1 - schedule.final_share) * shape


def peak_rates(run: RunFile) -> tuple[float, float]:
    """Peak learning rates of the student and of the class rows."""
    student = float(run.deepspeed["optimizer"]["params"]["lr"])
    rows = run.megacid.classifier.lr
    return student, student if rows is None else rows


def learning_rate_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter of a student, by depth in its tower, as in BEiT.

    In a tower of n blocks the embeddings have layer_decay^(n + 1), block i (from 0) has layer_decay^(n - i), and what
    follows the blocks has 1, as have parameters of no tower. Bao et al. 2021, arXiv 2106.08254.
    """
    towers: dict[str, dict[str, str]] = {}  # tower -> parameter -> its block, "" before the blocks or "-" after them
    for name, _ in module.named_parameters():
        own = name.removeprefix("clip.")
        block = _BLOCK.match(own)
        place = block[1] if block else "" if _EMBEDDING.search(own) else "-"
        towers.setdefault(part_of(own), {})[name] = place
    scales: dict[str, float] = {}
    for tower, places in towers.items():
        blocks = [place for place in dict.fromkeys(places.values()) if place not in ("", "-")]
        depth = {"": len(blocks) + 1, "-": 0} | {place: len(blocks) - i for i, place in enumerate(blocks)}
        scales |= {name: layer_decay ** depth[place] if tower in TOWERS else 1.0 for name, place in places.items()}
    return scales


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the weight matrices in the towers' blocks, which Muon updates.

    Embeddings, output projections and convolutions are not among them, as in Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon.
    """
    return {
        name
        for name, p in module.named_parameters()
        if p.ndim == 2 and name.endswith("weight") and _BLOCK.match(name.removeprefix("clip."))
    }


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Optimizer groups: `weight_decay` for matrices, none for biases, norms and the logit scale (ndim < 2).

    With layer decay there is a group for each `lr_scale`, the factor of its learning rate.

    muon: whether `hidden_matrices` get groups of their own, in which "muon" is true.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    scales = learning_rate_scales(module, layer_decay)
    hidden = hidden_matrices(module) if muon else set()
    groups = [
        {"params": [p for name, p in trained
                    if (p.ndim >= 2, name in hidden) == (matrices, own) and scales[name] == scale],
         "weight_decay": weight_decay if matrices else 0.0, "lr_scale": scale, **({"muon": own} if muon else {})}
        for matrices, own in ((True, True), (True, False), (False, False))
        for scale in sorted(set(scales.values()))
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


def groups_of_run(run: RunFile, module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer groups that a run file asks for."""
    optimizer = run.deepspeed["optimizer"]
    weight_decay = float(optimizer["params"].get("weight_decay", 0.0))
    return parameter_groups(module, weight_decay, run.megacid.student.layer_decay, muon=optimizer["type"] == "Muon")
