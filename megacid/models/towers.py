"""Checks a student's towers on the meta device, in a second and without memory, before any weights are read or drawn.

Shapes: B batch, D embedding, T context length, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import timm.layers
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from megacid.errors import UserError, one_line
from megacid.models.clip import StudentSpec, check_weights, tokenizer_for
from megacid.models.freezing import TOWERS, frozen_parameters
from megacid.models.student import clip_on_meta, image_shape, student_config


def check_towers(
    spec: StudentSpec,
    *,
    grad_checkpointing: bool = False,
    freeze: Sequence[str] = (),
    trained: Iterable[str] = TOWERS,
) -> nn.Module:
    """Check that a student can be built, that it takes its inputs, and that both towers give the width embed_dim.

    Args:
        freeze, trained: as for `frozen_parameters`.

    Returns:
        The open_clip model on the meta device, in which a frozen parameter requires no gradient.

    Raises:
        UserError: with the remedy.
    """
    config = student_config(spec)
    check_weights(spec.model, spec.pretrained)
    width = config["embed_dim"]
    clip = clip_on_meta(replace(spec, patch_dropout=None), config)
    if grad_checkpointing:
        _check_grad_checkpointing(spec.model, clip.visual)
    frozen = frozen_parameters(clip, freeze, trained)
    if spec.patch_dropout:
        _check_patch_dropout(spec, config, frozen)
    for kind, other in zip(("images", "texts"), _widths(spec.model, clip, config)):
        if other != width:
            remedy = "" if spec.projection else 'set "student.projection": true, or '
            raise UserError(
                f'student "{spec.model}" gives {kind} of width {other} at student.embed_dim {width}, expected '
                f"{width}: {remedy}use a teacher of width {other}"
            )
    _check_tokens(spec.model, clip, tokenizer_for(spec)(["a"]))
    for name, p in clip.named_parameters():
        if name in frozen:
            p.requires_grad_(False)
    return clip


def _is_hf(clip: Any) -> bool:
    return isinstance(getattr(clip, "text", None), HFTextEncoder)


@torch.no_grad()
def _widths(model: str, clip: Any, config: dict[str, Any]) -> tuple[int, int]:
    height, width = image_shape(config)[1:]
    try:
        image = clip.encode_image(torch.empty(1, 3, height, width, device="meta")).shape[-1]
    except Exception as error:  # timm and torch raise various ones
        raise UserError(
            f'student "{model}" cannot take images of {height} x {width} pixels ({one_line(error)}): remove '
            '"student.image_size", or choose a multiple of the patch size'
        ) from None
    if _is_hf(clip):  # transformers' forward may need values
        return image, clip.text.output_dim
    tokens_1T = torch.zeros(1, clip.context_length, dtype=torch.int64, device="meta")
    return image, clip.encode_text(tokens_1T).shape[-1]


def _check_grad_checkpointing(model: str, visual: Any) -> None:
    """open_clip only warns about image towers without it, or says nothing."""
    supported = not isinstance(visual, ModifiedResNet)
    if isinstance(visual, TimmModel):
        try:
            visual.trunk.set_grad_checkpointing(True)
        except Exception:
            supported = False
    if not supported:
        raise UserError(
            f'"student.grad_checkpointing" is true, which the image tower of "{model}" does not support: write false, '
            "and use a smaller train_micro_batch_size_per_gpu if memory is short"
        )


def _check_patch_dropout(spec: StudentSpec, config: dict[str, Any], frozen: set[str]) -> None:
    """open_clip ignores it for some towers, and a frozen tower drops nothing."""
    try:
        visual = clip_on_meta(spec, config).visual
        supported = any(isinstance(module, (PatchDropout, timm.layers.PatchDropout)) for module in visual.modules())
    except UserError:  # a model of timm without the option
        supported = False
    if not supported:
        fault = f'the image tower of "{spec.model}" does not support'
    elif all(f"visual.{name}" in frozen for name, _ in visual.named_parameters()):
        fault = "a frozen image tower does not use"
    else:
        return
    raise UserError(f'"student.patch_dropout" is {spec.patch_dropout}, which {fault}: remove it')


def _check_tokens(model: str, clip: Any, tokens_1T: Tensor) -> None:
    length, largest, longest = tokens_1T.shape[1], int(tokens_1T.max()), int(clip.context_length)
    if length > longest or (length < longest and not _is_hf(clip)):
        raise UserError(
            f'the tokenizer of "{model}" gives {length} tokens, but its text tower takes {longest}: correct '
            '"student.context_length"'
        )
    if largest >= clip.vocab_size:
        raise UserError(
            f'the tokenizer of "{model}" gives the token {largest}, but its text tower has a vocabulary of '
            f"{clip.vocab_size}, expected at least {largest + 1}: correct vocab_size in its configuration"
        )
