"""The student towers, and every other CLIP model the project loads, through open_clip's stable surface.

Shapes: B batch, D embedding, T context length, H x W pixels.
Nothing here imports deepspeed or torch.distributed.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megacid.errors import UserError
from megacid.models.clip import (
    LoadedClip,
    StudentSpec,
    check_pretrained,
    create_quietly,
    get_parameter,
    model_config,
    preprocess_cfg,
    preprocess_for,
)

MAX_LOGIT_SCALE = 100.0


class StudentOutput(NamedTuple):
    """A tuple of tensors, so that DeepSpeed's module hooks see every one of them."""

    image: torch.Tensor  # [B, D] fp32, L2-normalised
    text: torch.Tensor  # [B, D] fp32, L2-normalised
    logit_scale: torch.Tensor  # 0-d fp32, min(exp(parameter), 100)


class _UpperBound(torch.autograd.Function):
    """min(x, bound) whose gradient stops only what would raise x further.

    The usual `p.clamp_()` after the step changes nothing when an optimizer owns a master copy of p (ZeRO);
    a plain clamp has gradient 0 above the bound, so that p could never come back.
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
    """An open_clip model with the teacher's embedding width.

    `clip` is the open_clip model itself; its logit_scale (and logit_bias) have shape [1], see `build_student`.
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
        """open_clip's `model_cfg` with the overrides applied; a copy."""
        return copy.deepcopy(self._model_config)

    @property
    def embed_dim(self) -> int:
        return int(self._model_config["embed_dim"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input image without the batch: (3, H, W)."""
        side = self._model_config["vision_cfg"]["image_size"]
        return (3, side, side)

    @property
    def text_length(self) -> int:
        """Tokens of one text, T."""
        return int(self.clip.context_length)  # type: ignore[arg-type]

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> StudentOutput:
        """image [B, 3, H, W] float, text [B, T] int64 -> `StudentOutput`.

        Calls the open_clip model's own forward, not encode_image and encode_text: ZeRO-3 fetches a module's parameters
        when its forward runs, and positional_embedding, text_projection and logit_scale belong to that root module.
        """
        out = self.clip(image, text)
        # Normalised again in fp32: in bf16 the towers' own normalisation leaves the norm off by up to 0.4 %.
        return StudentOutput(
            F.normalize(out["image_features"].float(), dim=-1),
            F.normalize(out["text_features"].float(), dim=-1),
            _UpperBound.apply(out["logit_scale"].float().reshape(()), MAX_LOGIT_SCALE),
        )


def clamp_logit_scale(student: Student) -> None:
    """Bound the logit_scale parameter itself to ln(100), in place, without gradient.

    Training does not need it (the forward bounds the value used); the export does, so that the file holds that value.
    """
    with torch.no_grad():
        get_parameter(student.clip, "logit_scale").clamp_(max=math.log(MAX_LOGIT_SCALE))


def build_student(
    model: str,
    *,
    embed_dim: int | None,
    image_size: int | None = None,
    context_length: int | None = None,
    pretrained: str | None = None,
    seed: int,
    grad_checkpointing: bool = False,
) -> Student:
    """Build the student on the CPU in fp32.

    `embed_dim` is the teacher's width (None: the architecture's own). The initial weights are a function of `seed` alone;
    the global random generator is left as it was. With `pretrained` (tag or file) the weights come from there instead.
    Raises UserError for an unknown architecture, one that is no two-tower CLIP, or weights that do not fit.
    """
    config = model_config(model)
    if "multimodal_cfg" in config:
        raise UserError(f"model {model!r} has a caption decoder; a student must be a two-tower CLIP such as ViT-B-32")
    for name, value in (("embed_dim", embed_dim), ("image_size", image_size), ("context_length", context_length)):
        if value is not None and value < 1:
            raise UserError(f"student {name} is {value}; it must be at least 1")
    if pretrained is not None:
        check_pretrained(model, pretrained)
    overrides: dict[str, Any] = {} if embed_dim is None else {"embed_dim": embed_dim}
    with torch.random.fork_rng(devices=[]):  # the CPU generator alone: the weights must not depend on the machine
        torch.manual_seed(seed)
        clip = create_quietly(
            model,
            pretrained,
            force_image_size=image_size,
            force_context_length=context_length,
            pretrained_text=False,
            output_dict=True,
            # Shape [1], not 0-d: DeepSpeed 0.19 cannot broadcast a 0-d parameter when it starts. The export turns it back.
            nonscalar_logit_scale=True,
            **overrides,
        )
    config["embed_dim"] = embed_dim if embed_dim is not None else config["embed_dim"]
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length
    if grad_checkpointing:
        clip.set_grad_checkpointing(True)
    return Student(clip, StudentSpec(model, config["embed_dim"], image_size, context_length, pretrained), config)


def loaded_student(student: Student, pretrained: str, device: torch.device | str = "cpu") -> LoadedClip:
    """The same view on a student in memory; `pretrained` says where its weights come from."""
    student.clip.eval().requires_grad_(False).to(device)
    transform, tokenizer = preprocess_for(student)
    return LoadedClip(
        student.clip,
        transform,
        tokenizer,
        student.embed_dim,
        student.model,
        pretrained,
        torch.device(device),
        torch.float32,
    )


def open_clip_tensors(student: Student) -> dict[str, torch.Tensor]:
    """The student's weights as stock open_clip names and shapes them: fp32 on the CPU, logit_scale 0-d."""
    tensors = {key: value.detach().cpu().float().contiguous() for key, value in student.clip.state_dict().items()}
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in tensors.items()}


def open_clip_config(student: Student) -> dict[str, Any]:
    """The content of `open_clip_config.json` that lets stock open_clip rebuild the student from a directory."""
    cfg = preprocess_cfg(student)
    preprocess = {"mean": list(cfg.mean), "std": list(cfg.std)}
    preprocess |= {"interpolation": cfg.interpolation, "resize_mode": cfg.resize_mode}
    return {"model_cfg": student.model_config, "preprocess_cfg": preprocess}
