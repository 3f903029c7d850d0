"""A CLIP whose image features are those before the projection to the joint embedding."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from megacid.errors import UserError
from megacid.models.clip import LoadedClip

_TIMM_PROJECTIONS = ("drop", "proj", "mlp")  # the last parts of a head; a pooling may come before


class _ImageTower(nn.Module):
    """The part of an open_clip model that encodes images."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor) -> Tensor:
        features: Tensor = self.visual(image)
        return features


def before_projection(clip: LoadedClip) -> LoadedClip:
    """`clip` without the projection of its image tower. It shares the weights, and encodes images alone.

    Raises:
        UserError: the image tower has no linear or MLP projection of open_clip.
    """
    tower: Any = clip.model.visual
    visual: nn.Module = copy.copy(tower)  # with the same submodules and parameters
    if isinstance(tower, VisionTransformer) and tower.proj is not None and not tower.output_tokens:
        width = tower.proj.shape[0]
        visual._parameters = tower._parameters | {"proj": None}
    elif isinstance(tower, TimmModel) and (first := _input(tower.head)) is not None:
        width = first.in_features
        kept = ((name, part) for name, part in tower.head.named_children() if name not in _TIMM_PROJECTIONS)
        visual._modules = tower._modules | {"head": nn.Sequential(OrderedDict(kept))}
    else:
        raise UserError(
            f"the image tower of {clip.name} is a {type(tower).__name__}, expected a vision transformer or a timm "
            "model with a projection: use the task linear_probe"
        )
    return replace(clip, model=_ImageTower(visual), embed_dim=width)


def _input(head: Any) -> nn.Linear | None:
    """The linear layer that a projection of open_clip's timm models begins with."""
    first: nn.Linear | None = head.mlp.fc1 if hasattr(head, "mlp") else getattr(head, "proj", None)
    return first
