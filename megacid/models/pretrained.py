"""Loads initial weights into a student: all of them, but the projections where these have another width.

The file may be a tag's, a local one or that of a model directory. open_clip reads it and converts foreign formats.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from megacid.errors import UserError, one_line
from megacid.models.clip import StudentSpec
from megacid.models.hub import has_own_weights, model_directory

log = logging.getLogger(__name__)


def has_weights(spec: StudentSpec) -> bool:
    """Whether the student starts from weights, and not from random values alone."""
    return spec.pretrained is not None or has_own_weights(spec.model)


def load_weights(clip: Any, spec: StudentSpec, projections: Callable[[], set[str]]) -> None:
    """Load the weights of `spec` into an open_clip model, and say in the log what is not as in the file.

    A projection of another width keeps the values of `clip`, and so does one that `spec` adds to towers without any.
    Without a logit bias in the file, a student of the sigmoid form keeps its own logit scale and bias. Position
    embeddings are resized by open_clip. Everything else must fit.

    Args:
        clip: the student's, on the CPU; a tower of timm has the image size that its architecture has.
        projections: names of the tensors whose shape depends on embed_dim; called when something does not fit.

    Raises:
        UserError: the file is damaged, or does not fit.
    """
    own: dict[str, Tensor] = clip.state_dict()
    kept: list[str] = []
    logits = {name: own[name] for name in ("logit_scale", "logit_bias") if spec.sigmoid}

    def keep_own(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        if logits and not state["logit_bias"].any():  # the file has none, and open_clip fills in 0
            state |= logits
            log.info("initial weights: without a logit bias, so logit_scale and logit_bias start at SigLIP's values")
        misfits = [name for name in own if name in state and state[name].shape != own[name].shape]
        if spec.projection:
            misfits += [name for name in own if name not in state]
        if spec.embed_dim is not None and misfits:
            replaceable = projections()
            kept.extend(name for name in misfits if name in replaceable)
            state |= {name: own[name] for name in kept}

    handle = clip.register_load_state_dict_pre_hook(keep_own)
    try:
        with _resized() as resized:
            open_clip.load_checkpoint(clip, _file(spec))
    except Exception as error:  # a file that is no checkpoint can raise nearly any exception
        reason = f"{one_line(error)}; check that the file is complete and of this architecture and embedding width"
        # open_clip.factory.load_checkpoint reads model.logit_bias.ndim where the file has a bias.
        if isinstance(error, AttributeError) and error.name == "ndim" and clip.logit_bias is None:
            reason = (
                'they have a logit bias, which the model lacks: set "loss.form" to "sigmoid", or "student.model" to '
                "the local-dir: of an export, whose configuration has the bias"
            )
        raise UserError(f"cannot build {spec.model!r} with weights {spec.pretrained!r}: {reason}") from error
    finally:
        handle.remove()
    resized += _resize_timm(clip.visual, spec.image_size)
    for line in resized:
        log.info("initial weights: %s", line)
    if kept:
        log.info(
            "initial weights: drawn from run.seed for embed_dim %d, and not loaded: %s", spec.embed_dim, ", ".join(kept)
        )


def _file(spec: StudentSpec) -> str:
    if (directory := model_directory(spec.model)) is not None:
        return str(_find_checkpoint_in_dir(directory))
    assert spec.pretrained is not None
    tag = open_clip.get_pretrained_cfg(spec.model, spec.pretrained)
    return str(open_clip.download_pretrained(tag)) if tag else spec.pretrained


@contextlib.contextmanager
def _resized() -> Iterator[list[str]]:
    """Collect what open_clip says about position embeddings that it resizes, on the level INFO of the root logger."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Resizing"):
            lines.append(record.getMessage())
        return record.levelno >= level

    root = logging.getLogger()
    level = root.level
    root.addFilter(collect)
    root.setLevel(min(level, logging.INFO))
    try:
        yield lines
    finally:
        root.setLevel(level)
        root.removeFilter(collect)


def _resize_timm(visual: Any, image_size: int | None) -> list[str]:
    """Give a tower of timm its image size, which open_clip does after loading. Returns what was resized."""
    if image_size is None or not isinstance(visual, TimmModel):
        return []
    before = {name: tensor.shape for name, tensor in visual.state_dict().items()}
    visual.set_input_size(image_size)
    after = {name: tensor.shape for name, tensor in visual.state_dict().items()}
    return [
        f"Resizing visual.{name} from {tuple(before[name])} to {tuple(after[name])}"
        for name in before
        if before[name] != after[name]
    ]
