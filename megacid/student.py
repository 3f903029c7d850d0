"""The student towers, and every other CLIP model the project loads, through open_clip's stable surface.

Shapes: B batch, D embedding, T context length, H x W pixels.
Nothing here imports deepspeed or torch.distributed.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from megacid.errors import UserError

MODELS_DIR = Path(__file__).resolve().parents[1] / "configs" / "models"
LOCAL_DIR = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
MAX_LOGIT_SCALE = 100.0

Augment = Literal["none", "random_resized_crop"]
Transform = Callable[[Any], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]


class StudentFields(Protocol):
    """What decides preprocessing: a `Student`, a `StudentSpec` or the student block of a run file."""

    @property
    def model(self) -> str: ...
    @property
    def pretrained(self) -> str | None: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def context_length(self) -> int | None: ...


@dataclass(frozen=True)
class StudentSpec:
    """The student block of a run's `config.json`; None means the architecture's own value."""

    model: str
    embed_dim: int | None = None
    image_size: int | None = None
    context_length: int | None = None
    pretrained: str | None = None

    def with_pretrained(self, pretrained: str | None) -> "StudentSpec":
        return replace(self, pretrained=pretrained)


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
        self.config = config  # open_clip model_cfg with the overrides applied

    model = property(lambda self: self.spec.model)
    pretrained = property(lambda self: self.spec.pretrained)
    image_size = property(lambda self: self.spec.image_size)
    context_length = property(lambda self: self.spec.context_length)

    @property
    def embed_dim(self) -> int:
        return int(self.config["embed_dim"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input image without the batch: (3, H, W)."""
        side = self.config["vision_cfg"]["image_size"]
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


def get_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """`module.get_parameter(name)`; exists so that the type is a Parameter, not `Tensor | Module`."""
    return module.get_parameter(name)


def register_models(directory: Path | str | None = None) -> list[str]:
    """Make the architectures of `directory` (default: configs/models of the checkout) known to open_clip.

    Returns their names. Registering twice is harmless. Raises UserError when an explicit directory has no model files.
    """
    folder = Path(directory) if directory is not None else MODELS_DIR
    files = sorted(folder.glob("*.json"))
    if not files and directory is not None:
        raise UserError(f"no model configuration (*.json) in {folder}; give a directory with open_clip model files")
    for file in files:
        if open_clip.get_model_config(file.stem) != json.loads(file.read_text()):
            open_clip.add_model_config(file)
    return [file.stem for file in files]


def model_config(student: "Student | str") -> dict[str, Any]:
    """open_clip's `model_cfg` of a student (with its overrides) or of an architecture name. UserError if unknown."""
    if isinstance(student, Student):
        return json.loads(json.dumps(student.config))
    if student.startswith(LOCAL_DIR):
        directory = _checked_local_dir(student)
        return json.loads((directory / CONFIG_FILE).read_text())["model_cfg"]
    register_models()
    config = open_clip.get_model_config(student)
    if config is None:
        raise UserError(
            f"unknown model {student!r}; use a name from open_clip.list_models(), one of {register_models()}, "
            f"or {LOCAL_DIR}PATH"
        )
    return config


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
        _check_pretrained(model, pretrained)
    overrides: dict[str, Any] = {} if embed_dim is None else {"embed_dim": embed_dim}
    with torch.random.fork_rng(devices=[]):  # the CPU generator alone: the weights must not depend on the machine
        torch.manual_seed(seed)
        clip = _create_quietly(
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


def preprocess_for(student: StudentFields) -> tuple[Transform, Tokenizer]:
    """(deterministic transform: PIL image -> [3, H, W] float32, tokenizer: list of n texts -> [n, T] int64)."""
    return _transform(_preprocess_cfg(student), "none"), tokenizer_for(student)


def tokenizer_for(student: StudentFields) -> Tokenizer:
    """The architecture's tokenizer: list of n texts -> [n, T] int64."""
    model_config(student.model)  # registers our names and refuses unknown ones: open_clip would fall back to a default
    return _tokenizer(student.model, student.context_length)


def _tokenizer(model: str, context_length: int | None = None) -> Tokenizer:
    try:
        return open_clip.get_tokenizer(model, context_length=context_length)
    except Exception as error:  # transformers is missing, or its files are not here and cannot be fetched
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the tokenizer of {model!r} cannot be loaded ({reason}): install transformers, or put its files beside the "
            f"weights and use {LOCAL_DIR}PATH"
        ) from None


def train_transform(student: StudentFields, augment: Augment) -> Transform:
    """PIL image -> [3, H, W] float32. "none": as in evaluation. "random_resized_crop": 90 to 100 % of the area, drawn
    from torch's generator. There are no flips: they would contradict captions, and digits have a handedness."""
    return _transform(_preprocess_cfg(student), augment)


def _transform(cfg: PreprocessCfg, augment: Augment) -> Transform:
    if augment not in ("none", "random_resized_crop"):
        raise UserError(f"augment is {augment!r}; use 'none' or 'random_resized_crop'")
    return image_transform_v2(cfg, is_train=augment != "none")


def _preprocess_cfg(student: StudentFields) -> PreprocessCfg:
    """Mean, standard deviation and size as open_clip would attach them to the model."""
    cfg = PreprocessCfg(size=student.image_size or model_config(student.model)["vision_cfg"]["image_size"])
    stored: dict[str, Any] = {}
    if student.model.startswith(LOCAL_DIR):
        stored = json.loads((_checked_local_dir(student.model) / CONFIG_FILE).read_text()).get("preprocess_cfg", {})
    elif student.pretrained is not None:
        stored = open_clip.get_pretrained_cfg(student.model, student.pretrained) or {}
    return PreprocessCfg(**merge_preprocess_dict(cfg, {k: v for k, v in stored.items() if k != "size"}))


@dataclass(frozen=True)
class LoadedClip:
    """A frozen CLIP in eval mode with what is needed to feed it."""

    model: nn.Module
    preprocess_eval: Transform  # PIL image -> [3, H, W] float32, deterministic
    tokenizer: Tokenizer  # list of n texts -> [n, T] int64
    embed_dim: int
    name: str
    pretrained: str
    device: torch.device
    dtype: torch.dtype  # of the images the model takes

    @torch.no_grad()
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, D] fp32 on the model's device, L2-normalised (after the projection)."""
        features = self.model.encode_image(image.to(self.device, self.dtype))  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, D] fp32 on the model's device, L2-normalised."""
        return F.normalize(self.model.encode_text(text.to(self.device)).float(), dim=-1)  # type: ignore[operator]


def load_clip(
    model: str, pretrained: str | None = None, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> LoadedClip:
    """Load a CLIP with weights: architecture + tag, architecture + file (.pt, .safetensors), or `local-dir:PATH`.

    precision: "fp32", "bf16" or "fp16". Pickled code is never run (weights_only). Raises UserError for a missing file,
    directory or tag, for weights of another architecture, and for a model without weights.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision is {precision!r}; use fp32, bf16 or fp16")
    config = model_config(model)
    if model.startswith(LOCAL_DIR):
        if pretrained is not None:
            raise UserError(f"{model} brings its own weights; leave out pretrained={pretrained!r}")
    elif pretrained is None:
        raise UserError(f"model {model!r} needs weights; give a pretrained tag or file, or use {LOCAL_DIR}PATH")
    else:
        _check_pretrained(model, pretrained)
    clip = _create(model, pretrained, precision=precision, device=device, pretrained_text=False)
    clip.eval().requires_grad_(False)
    name = Path(model.removeprefix(LOCAL_DIR)).resolve().name if model.startswith(LOCAL_DIR) else model
    return LoadedClip(
        model=clip,
        preprocess_eval=image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False),
        tokenizer=_tokenizer(model),
        embed_dim=int(config["embed_dim"]),
        name=name,
        pretrained=pretrained or model,
        device=torch.device(device),
        dtype=open_clip.get_input_dtype(precision) or torch.float32,
    )


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
    cfg = _preprocess_cfg(student)
    preprocess = {"mean": list(cfg.mean), "std": list(cfg.std)}
    preprocess |= {"interpolation": cfg.interpolation, "resize_mode": cfg.resize_mode}
    return {"model_cfg": model_config(student), "preprocess_cfg": preprocess}


def _checked_local_dir(model: str) -> Path:
    directory = Path(model.removeprefix(LOCAL_DIR))
    if not directory.is_dir():
        raise UserError(f"{model}: {directory} is no directory; give one written by tools/export.py or open_clip")
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{model}: {CONFIG_FILE} is missing; give a directory written by tools/export.py or open_clip")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())["model_cfg"]
        complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(config)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise UserError(
            f"{directory / CONFIG_FILE} is no open_clip configuration (incomplete 'model_cfg'); export again"
        )
    # open_clip only warns and goes on with random weights when there are none.
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in directory.iterdir()):
        raise UserError(f"{directory} holds no weights; {WEIGHTS_FILE} was expected: export again")
    return directory


def _check_pretrained(model: str, pretrained: str) -> None:
    path = Path(pretrained)
    if path.is_file():
        return
    if path.is_dir():
        raise UserError(f"pretrained={pretrained!r} is a directory; load it as model {LOCAL_DIR}{pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        raise UserError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model!r}; "
            f"its tags are {', '.join(tags) if tags else '(none)'}"
        )


def _create_quietly(model: str, pretrained: str | None, **options: Any) -> Any:
    """`_create` without the warning that the weights are random, which is what a student without `pretrained` wants."""

    def unwanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root = logging.getLogger()  # open_clip logs there
    root.addFilter(unwanted)
    try:
        return _create(model, pretrained, **options)
    finally:
        root.removeFilter(unwanted)


def _create(model: str, pretrained: str | None, **options: Any) -> Any:
    """open_clip.create_model with its several exceptions for unfitting weights turned into one UserError."""
    try:
        return open_clip.create_model(model, pretrained, **options)
    except Exception as error:  # a file that is no checkpoint makes the loaders raise nearly anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot build {model!r} with weights {pretrained!r}: {reason}; check that the file is complete and "
            f"of this architecture and embedding width"
        ) from error
