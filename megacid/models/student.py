"""The CLIP student: an open_clip model with the teacher's embedding width, its construction and its export.

Shapes: B batch, D embedding, T context length, H x W pixels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megacid.errors import UserError
from megacid.models.clip import (
    LoadedClip,
    PixelNormalization,
    StudentSpec,
    check_weights,
    create_model,
    model_config,
    preprocess_cfg,
    preprocess_for,
)
from megacid.models.freezing import frozen_modules
from megacid.models.output import StudentOutput
from megacid.models.pretrained import has_weights, load_weights

MAX_LOGIT_SCALE = 100.0
SIGLIP_LOGITS = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # Zhai et al. 2023, arXiv 2303.15343


def image_shape(config: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one image of a `model_cfg`: (3, H, W)."""
    size = config["vision_cfg"]["image_size"]
    return (3, *size) if isinstance(size, list) else (3, size, size)


class _UpperBound(torch.autograd.Function):
    """min(x, bound) that masks only gradients which would increase x above the bound.

    `p.clamp_()` after a step has no effect if the optimizer owns a master copy of p (ZeRO). A plain clamp has gradient
    0 above the bound, so p could never return.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bound: float) -> torch.Tensor:
        ctx.save_for_backward(x > bound)
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (above,) = ctx.saved_tensors
        (grad,) = grads
        return grad.masked_fill(above & (grad < 0), 0.0), None


class Student(nn.Module):
    """An open_clip model (`clip`) with the teacher's embedding width; see `build_student`.

    logit_scale and logit_bias have shape [1]: DeepSpeed 0.19 cannot broadcast a 0-d parameter at start.
    """

    def __init__(self, clip: nn.Module, spec: StudentSpec, config: dict[str, Any]) -> None:
        super().__init__()
        self.clip = clip
        self.spec = spec
        self._model_config = config

    model = property(lambda self: self.spec.model)
    pretrained = property(lambda self: self.spec.pretrained)
    image_size = property(lambda self: self.spec.image_size)
    context_length = property(lambda self: self.spec.context_length)

    @property
    def model_config(self) -> dict[str, Any]:
        """A copy of open_clip's `model_cfg` with the overrides applied."""
        return copy.deepcopy(self._model_config)

    @property
    def embed_dim(self) -> int:
        return int(self._model_config["embed_dim"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: (3, H, W)."""
        return image_shape(self._model_config)

    @property
    def text_length(self) -> int:
        """Tokens of one text, T."""
        return int(self.clip.context_length)  # type: ignore[arg-type]

    def freeze(self, names: set[str]) -> None:
        """Freeze parameters of `clip`, before an optimizer has them. Modules without others stay in eval mode."""
        for name in names:
            self.clip.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        for module in frozen_modules(self):
            module.eval()  # no dropout, and batch normalisation with its stored statistics
        return self

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> StudentOutput:
        """image [B, 3, H, W] float, text [B, T] int64 -> `StudentOutput`."""
        # Not encode_image and encode_text: ZeRO-3 fetches a module's parameters in its forward, and the root module
        # owns positional_embedding, text_projection and logit_scale.
        out = self.clip(image, text)
        scale, bias = out["logit_scale"].float().reshape(()), out.get("logit_bias")
        # Normalises again in fp32: in bf16 open_clip's own normalisation leaves norms off by up to 0.4 %.
        return StudentOutput(
            F.normalize(out["image_features"].float(), dim=-1),
            F.normalize(out["text_features"].float(), dim=-1),
            _UpperBound.apply(scale, MAX_LOGIT_SCALE),
            torch.zeros_like(scale.detach()) if bias is None else bias.float().reshape(()),
        )


def clamp_logit_scale(student: Student) -> None:
    """Clamp the logit_scale parameter to ln(100) in place, so an export holds the value that forward used."""
    with torch.no_grad():
        student.clip.get_parameter("logit_scale").clamp_(max=math.log(MAX_LOGIT_SCALE))


def student_config(spec: StudentSpec) -> dict[str, Any]:
    """open_clip's `model_cfg` of a student: the architecture's with the overrides of `spec`.

    Raises:
        UserError: an unknown architecture, one that is not a two-tower CLIP, or a projection that has no effect.
    """
    config = model_config(spec.model)
    if "multimodal_cfg" in config:
        raise UserError(
            f"model {spec.model!r} has a caption decoder, expected a two-tower CLIP: use one such as ViT-B-32"
        )
    image, text = config["vision_cfg"], config["text_cfg"]
    overrides = (config, "embed_dim"), (image, "image_size"), (text, "context_length")
    for section, name in overrides:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise UserError(f"student {name} is {value}, expected >= 1")
        if value is not None:
            section[name] = value
    if spec.projection:
        without = ((image, "timm_proj"), (text, "proj_type"))
        changed = [(section, name) for section, name in without if section.get(name) == "none"]
        if not changed:
            raise UserError(
                f'"student.projection" is true, but both towers of {spec.model!r} have a projection to embed_dim: '
                "remove it"
            )
        for section, name in changed:
            section[name] = "linear"
    return config | (SIGLIP_LOGITS if spec.sigmoid else {})


def create_clip(spec: StudentSpec, config: dict[str, Any], *, seed: int, **options: Any) -> Any:
    """The open_clip model of a student with random weights, without changing the global random generator.

    Args:
        config: `student_config(spec)`.
        options: further ones of open_clip.create_model.
    """
    if spec.embed_dim is not None:
        options["embed_dim"] = spec.embed_dim
    if spec.projection:
        # These replace the blocks in which open_clip turns off the weights of other sources.
        options["vision_cfg"] = config["vision_cfg"] | {"timm_model_pretrained": False}
        if spec.patch_dropout is not None:
            options["vision_cfg"] |= {"patch_dropout": spec.patch_dropout}
        options["text_cfg"] = config["text_cfg"] | {"hf_model_pretrained": False}
    if spec.sigmoid:
        options |= SIGLIP_LOGITS
    with torch.random.fork_rng(devices=[]):  # the CPU generator alone: the weights must not depend on the machine
        torch.manual_seed(seed)
        return create_model(
            spec.model,
            None,
            load_weights=False,
            force_image_size=spec.image_size,
            force_patch_dropout=spec.patch_dropout,
            force_context_length=spec.context_length,
            pretrained_text=False,
            output_dict=True,
            nonscalar_logit_scale=True,  # see `Student`; `open_clip_tensors` reverts it
            **options,
        )


def clip_on_meta(spec: StudentSpec, config: dict[str, Any]) -> Any:
    """The student's open_clip model without memory for its weights. Arguments as for `create_clip`."""
    with torch.device("meta"):
        return create_clip(spec, config, seed=0, device="meta").eval()


def projections(spec: StudentSpec, config: dict[str, Any]) -> set[str]:
    """Names of the tensors whose shape depends on embed_dim, those of the projections to the joint embedding."""
    one, other = (
        clip_on_meta(replace(spec, embed_dim=width), config).state_dict()
        for width in (config["embed_dim"], 2 * config["embed_dim"])
    )
    return {name for name in one if one[name].shape != other[name].shape}


def build_student(
    model: str,
    *,
    embed_dim: int | None,
    image_size: int | None = None,
    context_length: int | None = None,
    pretrained: str | None = None,
    projection: bool = False,
    patch_dropout: float | None = None,
    sigmoid: bool = False,
    seed: int,
    grad_checkpointing: bool = False,
) -> Student:
    """Build the student on the CPU in fp32.

    Args:
        model: open_clip architecture of a two-tower CLIP.
        embed_dim: the teacher's width; None is the architecture's own, also for image_size and context_length.
        pretrained: tag or file of the initial weights; None draws them from `seed` alone, without changing the global
            random generator. Projections of another width than `embed_dim` are drawn from `seed`, too.
        projection: add a linear projection to each tower without one.
        patch_dropout: share of the image patches that are left out in training; no part of `model_config`.
        sigmoid: give the student a logit bias, for the sigmoid form of the loss. It starts at SigLIP's value, and so
            does the logit scale, unless the initial weights have both.
        grad_checkpointing: recompute activations in backward.

    Raises:
        UserError: an unknown architecture, one that is not a two-tower CLIP, or weights that do not fit.
    """
    spec = StudentSpec(model, embed_dim, image_size, context_length, pretrained, projection, patch_dropout, sigmoid)
    config = student_config(spec)
    check_weights(model, pretrained)
    with_weights = has_weights(spec)
    timm = "timm_model_name" in config["vision_cfg"]  # such a tower is resized with its weights
    clip = create_clip(replace(spec, image_size=None) if timm and with_weights else spec, config, seed=seed)
    if with_weights:
        load_weights(clip, spec, lambda: projections(spec, config))
    if grad_checkpointing:
        clip.set_grad_checkpointing(True)
    return Student(clip, replace(spec, embed_dim=config["embed_dim"]), config)


def loaded_student(
    student: Student, pretrained: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedClip:
    """The student as a `LoadedClip`, frozen and moved to `device`; `pretrained` names its weights in results.

    dtype: of its weights.
    """
    student.clip.eval().requires_grad_(False).to(device)
    transform, tokenizer = preprocess_for(student)
    normalize, where, width = PixelNormalization(student, device), torch.device(device), student.embed_dim
    return LoadedClip(student.clip, transform, normalize, tokenizer, width, student.model, pretrained, where, dtype)


def open_clip_tensors(student: Student) -> dict[str, torch.Tensor]:
    """The student's weights with open_clip's names and shapes: fp32 on the CPU, logit_scale 0-d."""
    tensors = {key: value.detach().cpu().float().contiguous() for key, value in student.clip.state_dict().items()}
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in tensors.items()}


def open_clip_config(student: Student) -> dict[str, Any]:
    """Content of `open_clip_config.json`, from which open_clip rebuilds the student."""
    cfg = preprocess_cfg(student)
    preprocess = {"mean": list(cfg.mean), "std": list(cfg.std)}
    preprocess |= {"interpolation": cfg.interpolation, "resize_mode": cfg.resize_mode}
    return {"model_cfg": student.model_config, "preprocess_cfg": preprocess}
