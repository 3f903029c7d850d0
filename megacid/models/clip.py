"""CLIP models through open_clip: architectures, transforms, tokenizers, loading with weights."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from megacid.errors import UserError

MODELS_DIR = Path(__file__).resolve().parent / "configs"
LOCAL_DIR = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
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


def model_config(model: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of an architecture name or `local-dir:PATH`. UserError if unknown."""
    if model.startswith(LOCAL_DIR):
        directory = _checked_local_dir(model)
        return json.loads((directory / CONFIG_FILE).read_text())["model_cfg"]
    register_models()
    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(
            f"unknown model {model!r}; use a name from open_clip.list_models(), one of {register_models()}, "
            f"or {LOCAL_DIR}PATH"
        )
    return config


def preprocess_for(student: StudentFields) -> tuple[Transform, Tokenizer]:
    """(deterministic transform: PIL image -> [3, H, W] float32, tokenizer: list of n texts -> [n, T] int64)."""
    return _transform(preprocess_cfg(student), "none"), tokenizer_for(student)


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
    return _transform(preprocess_cfg(student), augment)


def _transform(cfg: PreprocessCfg, augment: Augment) -> Transform:
    if augment not in ("none", "random_resized_crop"):
        raise UserError(f"augment is {augment!r}; use 'none' or 'random_resized_crop'")
    return image_transform_v2(cfg, is_train=augment != "none")


def preprocess_cfg(student: StudentFields) -> PreprocessCfg:
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
        check_pretrained(model, pretrained)
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


def check_pretrained(model: str, pretrained: str) -> None:
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


def create_quietly(model: str, pretrained: str | None, **options: Any) -> Any:
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
