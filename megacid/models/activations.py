"""Finds pretrained weights that were trained with another activation than their architecture's: GELU or QuickGELU.

Such weights load without an error, since an activation has no weights, and give wrong embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from megacid.errors import UserError
from megacid.models.local_dir import CONFIG_FILE, read_json

_SUFFIX = "-quickgelu"
_WEIGHTS_OF_CONFIG = ("open_clip_model", "open_clip_pytorch_model")


def check_activation(model: str, pretrained: str, *, quick_gelu: bool) -> None:
    """Raise UserError if weights are known to need the other activation.

    Args:
        model: architecture of open_clip.
        pretrained: tag, or weights file.
        quick_gelu: whether the architecture computes QuickGELU.
    """
    other = model.removesuffix(_SUFFIX) if quick_gelu else model + _SUFFIX
    known = other != model and other in open_clip.list_models()
    if (path := Path(pretrained)).is_file():
        trained = _of_file(path)
    else:
        # Without the other architecture the tag's flag is not reliable: roberta-ViT-B-32 has none.
        tags = [open_clip.get_pretrained_cfg(name, pretrained) for name in (model, other)] if known else []
        trained = next((bool(tag.get("quick_gelu", False)) for tag in tags if tag), None)
    if trained is None or trained == quick_gelu:
        return
    names = {False: "GELU", True: "QuickGELU"}
    remedy = f'use the model "{other}"' if known else "use the architecture that they were trained with"
    raise UserError(
        f'the weights "{pretrained}" were trained with {names[trained]}, but the model "{model}" computes '
        f"{names[quick_gelu]}, which gives wrong embeddings: {remedy}"
    )


def _of_file(path: Path) -> bool | None:
    """Whether a weights file was trained with QuickGELU, by the configuration next to it or its published name."""
    configs = [path.with_suffix(".json")]
    if path.stem in _WEIGHTS_OF_CONFIG:
        configs.append(path.parent / CONFIG_FILE)
    for config in filter(Path.is_file, configs):
        try:
            content = read_json(config)
        except UserError:
            continue  # another program's file
        content = content.get("model_cfg", content) if isinstance(content, dict) else {}
        if isinstance(content, dict) and {"vision_cfg", "text_cfg"} <= content.keys():
            return bool(content.get("quick_gelu", False))
    for name, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(name, tag)
        if _is_copy(path, published):
            return bool(published.get("quick_gelu") or (open_clip.get_model_config(name) or {}).get("quick_gelu"))
    return None


def _is_copy(path: Path, tag: dict[str, Any]) -> bool:
    """Whether a file has the name of a published one, or is in the cache of its repository."""
    url, repository = tag.get("url") or "", "/".join((tag.get("hf_hub") or "").split("/")[:2])
    return (bool(url) and path.name == url.rsplit("/", 1)[-1]) or (
        bool(repository) and f"models--{repository.replace('/', '--')}" in path.absolute().parts
    )
