"""The models that a figure compares, the blocks of their image towers, and their patch features.

Shapes: B images, H x W patches, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from figure_kinds.labels import Source, check_distinct
from megacid.errors import UserError
from megacid.evaluate.export import student_from_run
from megacid.evaluate.tasks import weights_name
from megacid.models.clip import LoadedClip, load_clip
from megacid.models.hub import has_own_weights
from megacid.models.student import loaded_student

T = TypeVar("T")
SPEC = "run directory, local-dir:PATH, hf-hub:ORG/NAME, or open_clip's ARCHITECTURE,WEIGHTS with a tag or a file"


def load_model(given: Source, device: str) -> tuple[str, LoadedClip]:
    """A model of the form `SPEC` and its label; of a run, the newest valid checkpoint. Raises UserError."""
    text = given.text
    if not has_own_weights(text) and Path(text).is_dir():
        student, step = student_from_run(Path(text))
        clip = loaded_student(student, weights_name(Path(text), step), device)
        return given.label or Path(text).resolve().name, clip
    model, _, pretrained = (text, "", "") if has_own_weights(text) else text.partition(",")
    clip = load_clip(model, pretrained or None, device=device)
    return given.label or clip.name, clip


def of_models(sources: Sequence[Source], device: str, measure: Callable[[LoadedClip], T]) -> dict[str, T]:
    """What `measure` returns of each model, by label. One model is in memory at a time.

    Raises UserError when one cannot be loaded, or two have one label.
    """
    found: dict[str, T] = {}
    for given in sources:
        label, clip = load_model(given, device)
        check_distinct([*found, label])
        found[label] = measure(clip)
        del clip  # before the next one is loaded
    return found


def blocks_of(clip: LoadedClip) -> list[nn.Module]:
    """The transformer blocks of the image tower. Raises UserError for a tower that is no vision transformer."""
    tower = clip.model.visual
    if isinstance(tower, VisionTransformer):
        return list(tower.transformer.resblocks)
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "num_prefix_tokens") and hasattr(tower.trunk, "blocks"):
        return list(tower.trunk.blocks)
    kind = type(tower.trunk if isinstance(tower, TimmModel) else tower).__name__
    raise UserError(
        f"the image tower of {clip.name} is a {kind}, expected a vision transformer of open_clip or timm, which has "
        "blocks and patch tokens: leave this model out"
    )


def last_linear(block: nn.Module, clip: LoadedClip) -> nn.Linear:
    """The second layer of the MLP of a block, its last fully connected one."""
    mlp = getattr(block, "mlp", None)
    layer = getattr(mlp, "c_proj", None) or getattr(mlp, "fc2", None)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"a block of the image tower of {clip.name} ({type(block).__name__}) has no mlp.c_proj or mlp.fc2, "
            "expected the second layer of its MLP: leave this model out"
        )
    return layer


@torch.no_grad()
def patch_features(clip: LoadedClip, image_B3HW: Tensor) -> Tensor:
    """Features of the patches after the last block and the final norm, float32 [B, H, W, C] on the CPU.

    image_B3HW: uint8, as `preprocess_eval` gives it.
    """
    blocks_of(clip)  # refuses other towers
    tower: Any = clip.model.visual
    pixels = clip.normalize(image_B3HW).to(clip.device, clip.dtype)
    # An attention pooling has its norm behind it, in another width.
    norm = not isinstance(tower, VisionTransformer) or tower.attn_pool is None
    options = {"indices": 1, "normalize_intermediates": norm, "intermediates_only": True, "output_fmt": "NCHW"}
    (last_BCHW,) = tower.forward_intermediates(pixels, **options)["image_intermediates"]
    return last_BCHW.permute(0, 2, 3, 1).float().cpu()
