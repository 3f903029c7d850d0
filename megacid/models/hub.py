"""Names of model directories: `local-dir:PATH`, and `hf-hub:ORG/NAME` in the cache of huggingface_hub."""

from __future__ import annotations

import functools
from pathlib import Path

from huggingface_hub import snapshot_download

from megacid.errors import UserError, one_line

LOCAL_DIR, HF_HUB = "local-dir:", "hf-hub:"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_DATA = (
    "open_clip_config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


def has_own_weights(model: str) -> bool:
    """Whether a model's name is that of a directory, which holds weights, and not of an architecture."""
    return model.startswith((LOCAL_DIR, HF_HUB))


def model_directory(model: str) -> Path | None:
    """The directory of `local-dir:PATH` or `hf-hub:ORG/NAME`; None for an architecture.

    Raises:
        UserError: a model of the hub is neither reachable nor in the cache.
    """
    if model.startswith(LOCAL_DIR):
        return Path(model.removeprefix(LOCAL_DIR))
    return _snapshot(model.removeprefix(HF_HUB)) if model.startswith(HF_HUB) else None


def display_name(model: str) -> str:
    """The name of a model in results: an architecture, ORG/NAME, or the last part of a directory."""
    return (
        Path(model.removeprefix(LOCAL_DIR)).resolve().name
        if model.startswith(LOCAL_DIR)
        else model.removeprefix(HF_HUB)
    )


@functools.lru_cache
def _snapshot(repository: str) -> Path:
    """Fetch a model's data files, and of its weights one file. Without a network the files of the cache are used."""
    try:
        directory = Path(snapshot_download(repository, allow_patterns=list(_DATA)))
        for name in _WEIGHTS:  # one after the other: a repository may hold the same weights in several formats
            if (directory / name).is_file():
                break
            # The same revision, which is the directory's name.
            directory = Path(snapshot_download(repository, revision=directory.name, allow_patterns=[name]))
    except Exception as error:  # of the hub, its HTTP client, or the disk
        raise UserError(
            f"{HF_HUB}{repository} can neither be fetched nor is it in the cache ({one_line(error, 160)}): check the "
            f"name and the network, or download the files on another machine and pass {LOCAL_DIR}PATH"
        ) from None
    return directory
