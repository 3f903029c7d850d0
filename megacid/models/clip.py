"""CLIP models of open_clip: architectures, preprocessing, tokenizers, and loading for inference.

Shapes: B batch, D embedding, T context length, H x W pixels.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn
from torchvision.transforms import Compose, Normalize, PILToTensor, RandomResizedCrop, ToTensor

from megacid.errors import UserError, one_line
from megacid.models.activations import check_activation
from megacid.models.hub import HF_HUB, LOCAL_DIR, display_name, has_own_weights, model_directory
from megacid.models.local_dir import check_archive, read_local_config
from megacid.models.pixels import TensorResize

MODELS_DIR = Path(__file__).resolve().parent / "configs"
WEIGHTS_FILE = "open_clip_model.safetensors"
Augment = Literal["none", "random_resized_crop"]
Decoder = Literal["pillow", "simplejpeg", "simplejpeg_scaled"]
Transform = Callable[[Any], torch.Tensor]  # PIL image -> uint8 [3, H, W]
Tokenizer = Callable[[list[str]], torch.Tensor]  # list of n texts -> [n, T] int64


class StudentFields(Protocol):
    """The fields that decide preprocessing: of a `Student`, a `StudentSpec` or the student block of a run file."""

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
    projection: bool = False
    patch_dropout: float | None = None
    sigmoid: bool = False  # of the "loss" block: whether its form is sigmoid


# ---- architectures ---------------------------------------------------------------------------------------------------


def register_models(directory: Path | str | None = None) -> list[str]:
    """Register the architectures of `directory` (default: the package's own) with open_clip and return their names."""
    folder = Path(directory) if directory is not None else MODELS_DIR
    files = sorted(folder.glob("*.json"))
    if not files and directory is not None:
        raise UserError(f"{folder} holds no *.json, expected open_clip model configurations: pass another directory")
    for file in files:
        if open_clip.get_model_config(file.stem) != json.loads(file.read_text()):
            open_clip.add_model_config(file)
    return [file.stem for file in files]


def model_config(model: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of an architecture or a model directory. Raises UserError if it is unknown."""
    if (directory := model_directory(model)) is not None:
        return read_local_config(directory)["model_cfg"]
    own = register_models()
    config = None if ":" in model else open_clip.get_model_config(model)
    if config is None:
        raise UserError(
            f"model {model!r} is unknown, expected one from open_clip.list_models(), one of {own}, {LOCAL_DIR}PATH, or "
            f"{HF_HUB}ORG/NAME"
        )
    return config


def _open_clip_name(model: str) -> str:
    """The name by which open_clip finds a model that `model_config` has checked: it must not fetch any by itself."""
    directory = model_directory(model)
    return model if directory is None else f"{LOCAL_DIR}{directory}"


# ---- preprocessing ---------------------------------------------------------------------------------------------------


def preprocess_for(student: StudentFields) -> tuple[Transform, Tokenizer]:
    """The deterministic image transform of evaluation, which `PixelNormalization` follows, and the tokenizer."""
    return train_transform(student, "none"), tokenizer_for(student)


def tokenizer_for(student: StudentFields) -> Tokenizer:
    """The architecture's tokenizer. Raises UserError if the model is unknown or its tokenizer cannot be loaded."""
    return _tokenizer(student.model, student.context_length)


def _tokenizer(model: str, context_length: int | None = None) -> Tokenizer:
    # Registers our names and rejects unknown ones, for which open_clip would use a default tokenizer.
    text_cfg = model_config(model)["text_cfg"]
    options = {}
    if has_own_weights(model) and text_cfg.get("hf_tokenizer_name"):
        options = {"trust_remote_code": False, "local_files_only": True}  # the first asks at the terminal by default
    try:
        if model_directory(model) is None:
            return _named_tokenizer(model, context_length)
        return open_clip.get_tokenizer(_open_clip_name(model), context_length=context_length, **options)
    except Exception as error:  # transformers is missing, or its files are neither cached nor reachable
        raise UserError(
            f"the tokenizer of {model!r} cannot be loaded ({one_line(error)}): install transformers, or put its files "
            f"next to the weights and use {LOCAL_DIR}PATH"
        ) from None


@functools.cache
def _named_tokenizer(model: str, context_length: int | None) -> Tokenizer:
    """Reads the vocabulary, a quarter of a second, once per process. A directory's files may change."""
    return open_clip.get_tokenizer(model, context_length=context_length)


def train_transform(student: StudentFields, augment: Augment, decoder: Decoder = "pillow") -> Transform:
    """Image transform of training, image -> uint8 [3, H, W]; `PixelNormalization` follows on the device.

    "none" resizes as in evaluation; "random_resized_crop" draws crops of 90 to 100 % of the area (torch's generator).
    There is no flip: it would contradict captions, and digits are not symmetric.

    Args:
        decoder: "pillow" resizes PIL images with Pillow; the others PIL or undecoded images with torch.

    Raises:
        UserError: an unknown augment, or an open_clip whose transform does not end with the conversion to floats.
    """
    if augment not in ("none", "random_resized_crop"):
        raise UserError(f"augment is {augment!r}, expected 'none' or 'random_resized_crop'")
    resizing, _ = _divided(image_transform_v2(preprocess_cfg(student), is_train=augment != "none"))
    if decoder != "pillow":
        return TensorResize(resizing, scaled=decoder == "simplejpeg_scaled")
    return Compose([*resizing, PILToTensor()])


def crops_digest(student: StudentFields) -> str:
    """Digest of example crops: models with the same digest cut the same random crops out of an image.

    It differs if open_clip's limits of area and aspect ratio, or torch's random numbers, do.
    """
    steps = image_transform_v2(preprocess_cfg(student), is_train=True).transforms
    (crop,) = (step for step in steps if isinstance(step, RandomResizedCrop))
    size_alone, boxes = torch.empty(3, 480, 640, device="meta"), []
    with torch.random.fork_rng(devices=[]):
        for seed in range(32):
            torch.random.default_generator.manual_seed(seed)
            boxes.append(crop.get_params(size_alone, crop.scale, crop.ratio))
    return hashlib.sha256(repr(boxes).encode()).hexdigest()[:16]


def _divided(transform: Any) -> tuple[list[Transform], Normalize]:
    """The steps of open_clip's transform before the conversion to floats, and the normalisation after it."""
    steps = list(getattr(transform, "transforms", [transform]))
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], Normalize):
        names = ", ".join(type(step).__name__ for step in steps)
        raise UserError(
            f"the image transform of open_clip {open_clip.__version__} is {names}, expected its last steps to be "
            "ToTensor and Normalize, which get uint8 images: install another version of open_clip_torch"
        )
    return steps[:-2], steps[-1]


class PixelNormalization:
    """uint8 [B, 3, H, W] -> fp32 (x / 255 - mean) / std on `device`, the bits of open_clip's own transform.

    Args:
        channels_last: whether the images have this memory format. A convolution continues with that of its input.
    """

    def __init__(self, student: StudentFields, device: torch.device | str, *, channels_last: bool = False) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        _, normalize = _divided(image_transform_v2(preprocess_cfg(student), is_train=False))
        mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (normalize.mean, normalize.std))
        if not {len(mean), len(std)} <= {1, 3} or not std.all():
            raise UserError(
                f"preprocess_cfg of {student.model} has mean {normalize.mean} and std {normalize.std}, expected three "
                "numbers each and no std of 0: correct them"
            )
        self.mean, self.std = mean.to(device), std.to(device)
        # A tensor, because CUDA multiplies by the reciprocal of a Python number, which rounds differently.
        self.white = torch.tensor(255.0, device=device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """The normalised images, in one memory format whatever the strides of `pixels` are."""
        pixels = pixels.to(self.mean.device, non_blocking=True)
        images = pixels.to(torch.float32, memory_format=self.memory_format)
        return images.div_(self.white).sub_(self.mean).div_(self.std)


def preprocess_cfg(student: StudentFields) -> PreprocessCfg:
    """Mean, standard deviation and size, as open_clip attaches them to the model."""
    cfg = PreprocessCfg(size=student.image_size or model_config(student.model)["vision_cfg"]["image_size"])
    stored: dict[str, Any] = {}
    if (directory := model_directory(student.model)) is not None:
        stored = read_local_config(directory).get("preprocess_cfg", {})
    elif student.pretrained is not None:
        stored = open_clip.get_pretrained_cfg(student.model, student.pretrained) or {}
    return PreprocessCfg(**merge_preprocess_dict(cfg, {k: v for k, v in stored.items() if k != "size"}))


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedClip:
    """A frozen CLIP in eval mode with its transform and tokenizer."""

    model: nn.Module
    preprocess_eval: Transform  # deterministic
    normalize: PixelNormalization
    tokenizer: Tokenizer
    embed_dim: int
    name: str
    pretrained: str
    device: torch.device
    dtype: torch.dtype  # of the model's input images

    @torch.no_grad()
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, D] fp32 on the model's device, L2-normalised (after the projection).

        image: uint8 as `preprocess_eval` gives it, or normalised floats.
        """
        if image.dtype == torch.uint8:
            image = self.normalize(image)
        features = self.model.encode_image(image.to(self.device, self.dtype))  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, D] fp32 on the model's device, L2-normalised."""
        return F.normalize(self.model.encode_text(text.to(self.device)).float(), dim=-1)  # type: ignore[operator]


def load_clip(
    model: str, pretrained: str | None = None, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> LoadedClip:
    """Load a CLIP with its weights. Pickled code never runs (weights_only).

    Args:
        model: open_clip architecture; `local-dir:PATH` or `hf-hub:ORG/NAME`, which have their own weights.
        pretrained: tag or weights file (.pt, .safetensors) of an architecture.
        precision: "fp32", "bf16" or "fp16".

    Raises:
        UserError: a missing file, directory or tag, weights of another architecture or activation, or no weights.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision is {precision!r}, expected 'fp32', 'bf16' or 'fp16'")
    config = model_config(model)
    check_weights(model, pretrained)
    if pretrained is None and not has_own_weights(model):
        raise UserError(f"model {model!r} needs weights: pass a pretrained tag or file, or use {LOCAL_DIR}PATH")
    clip = create_model(model, pretrained, precision=precision, device=device, pretrained_text=False)
    clip.eval().requires_grad_(False)
    spec = StudentSpec(model, pretrained=pretrained)
    transform, tokenizer = preprocess_for(spec)
    return LoadedClip(
        model=clip,
        preprocess_eval=transform,
        normalize=PixelNormalization(spec, device),
        tokenizer=tokenizer,
        embed_dim=int(config["embed_dim"]),
        name=display_name(model),
        pretrained=pretrained or model,
        device=torch.device(device),
        dtype=open_clip.get_input_dtype(precision) or torch.float32,
    )


def check_weights(model: str, pretrained: str | None) -> None:
    """Raise UserError unless the model is known and `pretrained` is None, or a file or tag with its activation."""
    quick_gelu = bool(model_config(model).get("quick_gelu", False))
    if pretrained is None:
        return
    if has_own_weights(model):
        raise UserError(f"pretrained is {pretrained!r}, but {model} has its own weights: leave pretrained out")
    path = Path(pretrained)
    if path.is_dir():
        raise UserError(f"pretrained is {pretrained!r}, a directory: load it as model {LOCAL_DIR}{pretrained}")
    if path.is_file():
        check_archive(path)
    tags = open_clip.list_pretrained_tags_by_model(model)
    check_activation(model, pretrained, quick_gelu=quick_gelu)
    if not path.is_file() and pretrained not in tags:
        raise UserError(
            f"pretrained is {pretrained!r}, expected a file or a tag of {model!r}: its tags are "
            f"{', '.join(tags) if tags else '(none)'}"
        )


def create_model(model: str, pretrained: str | None, **options: Any) -> Any:
    """open_clip.create_model, without its warning about random weights where those are intended.

    Raises:
        UserError: in place of open_clip's various exceptions for weights that do not fit.
    """
    wants_random = not options.get("load_weights", pretrained is not None or has_own_weights(model))

    def keep(record: logging.LogRecord) -> bool:
        return not (wants_random and record.getMessage().startswith("No pretrained weights loaded"))

    root = logging.getLogger()  # open_clip logs there
    root.addFilter(keep)
    try:
        return open_clip.create_model(_open_clip_name(model), pretrained, **options)
    except Exception as error:  # loading a file that is no checkpoint can raise nearly any exception
        if wants_random:
            raise UserError(f"cannot build {model!r} ({one_line(error)}): correct its configuration") from error
        raise UserError(
            f"cannot build {model!r} with weights {pretrained!r}: {one_line(error)}; check that the file is complete "
            "and of this architecture and embedding width"
        ) from error
    finally:
        root.removeFilter(keep)
