"""Checks of a `local-dir:` model directory: it runs no code and reads nothing outside of itself, local or remote.

open_clip passes the keyword arguments in open_clip_config.json on to its towers, to timm and to transformers, which
load other models, files and code by name. Every key and kind of value must therefore be on a list. transformers reads
further JSON files of the directory by itself: these must not name code or files elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip

from megacid.errors import UserError

CONFIG_FILE = "open_clip_config.json"
_CONFIG_BYTES = 1 << 24
_WEIGHTS = (".safetensors", ".bin", ".pth")
_CODE = (".py", ".pkl", ".pickle", ".pyc", ".pyd", ".pyx", ".so", ".dll", ".dylib")
_MAX_NUMBER = 2**24  # above the largest vocabulary


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MAX_NUMBER


def _flag(value: Any) -> bool:
    return type(value) is bool


def _word(value: Any) -> bool:
    """A name without ':' and '/', which lead to directories and model hubs."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{0,64}", value) is not None


def _numbers(value: Any) -> bool:
    return _number(value) or (isinstance(value, list) and 1 <= len(value) <= 4 and all(map(_number, value)))


def _options(**kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        return isinstance(value, dict) and all(key in kinds and kinds[key](inner) for key, inner in value.items())

    return accepts


def _table(**kinds: str) -> dict[str, Callable[[Any], bool]]:
    check = {"number": _number, "numbers": _numbers, "flag": _flag, "word": _word}
    return {name: check[kind] for kind, names in kinds.items() for name in names.split()}


_TOWER = {
    **_table(
        number="width layers mlp_ratio ls_init_value",
        flag="final_ln_after_pool output_tokens qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn "
        "scale_fc",
        word="pool_type block_type",
    ),
    "act_kwargs": _options(approximate=_word),
    "norm_kwargs": _options(eps=_number, elementwise_affine=_flag, bias=_flag),
}
_VISION = _TOWER | _table(
    number="head_width patch_size patch_dropout attn_pooler_queries attn_pooler_heads timm_drop timm_drop_path",
    numbers="layers image_size",
    flag="attentional_pool no_ln_pre timm_model_pretrained timm_proj_bias",
    word="pos_embed_type timm_model_name timm_pool timm_proj",
)
_TEXT = {
    **_TOWER,
    **_table(
        number="context_length vocab_size heads pad_id eos_id",
        flag="embed_cls no_causal_mask proj_bias hf_model_pretrained",
        word="proj_type hf_proj_type hf_pooler_type",
    ),
    "hf_tokenizer_name": lambda value: isinstance(value, str),  # open_clip takes the directory in its place
    "hf_model_name": lambda value: value == "",
    "tokenizer_mode": lambda value: value in ("", "clips"),
    "tokenizer_kwargs": _options(
        clean=lambda value: value in ("canonicalize", "lower", "whitespace"), strip_sep_token=_flag, language=_word
    ),
}
_MODEL = {
    **_table(number="embed_dim init_logit_scale init_logit_bias", flag="quick_gelu custom_text nonscalar_logit_scale"),
    "vision_cfg": lambda value: isinstance(value, dict),
    "text_cfg": lambda value: isinstance(value, dict),
    "multimodal_cfg": lambda value: isinstance(value, dict),
}
_PREPROCESS = _table(
    number="fill_color", numbers="size mean std", word="mode interpolation resize_mode"
)  # open_clip ignores other keys
_SECTIONS = {
    "vision_cfg": _VISION,
    "text_cfg": _TEXT,
    "multimodal_cfg": _TEXT | _table(number="dim_head n_queries attn_pooler_heads"),
}
# Of the JSON files that transformers reads to load a tokenizer.
_TOKENIZER_FILES = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_CLASSES = re.compile(
    "(AlbertTokenizer|BertTokenizer|CLIPTokenizer|DistilBertTokenizer|GemmaTokenizer|M2M100Tokenizer|MPNetTokenizer|"
    "NllbTokenizer|RobertaTokenizer|Siglip2?Tokenizer|T5Tokenizer|MT5Tokenizer|XLMRobertaTokenizer)(Fast)?|"
    "PreTrainedTokenizerFast|TokenizersBackend"
)
_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
_UNREAD = ("special_tokens_map_file", "name_or_path", "_name_or_path")  # stale paths of who wrote the tokenizer


def read_local_config(directory: Path) -> dict[str, Any]:
    """The content of open_clip_config.json, after a check of the whole directory.

    Raises:
        UserError: a file is missing, or the directory could run code or read something outside of itself.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        fault = f"{CONFIG_FILE} is missing" if directory.is_dir() else f"{directory} is not a directory"
        raise UserError(f"local-dir:{directory}: {fault}: pass a directory written by tools/export.py or open_clip")
    weights = _check_files(directory)
    config = read_json(file)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{file} is not an open_clip configuration (incomplete 'model_cfg'): export again")
    if not weights:  # open_clip would only warn and continue with random ones
        raise UserError(f"{directory} holds no weights, expected open_clip_model.safetensors: export again")
    _check_keys(file, "model_cfg", model, _MODEL)
    _refuse_text_tower_by_name(directory, model)
    for section in _SECTIONS.keys() & model.keys():
        _check_keys(file, section, model[section], _SECTIONS[section])
    preprocess = config.setdefault("preprocess_cfg", {})
    if not isinstance(preprocess, dict):
        raise UserError(f"{file}: preprocess_cfg is {str(preprocess)[:100]!r}, expected a block: correct it")
    _check_keys(file, "preprocess_cfg", {k: v for k, v in preprocess.items() if k in _PREPROCESS}, _PREPROCESS)
    if model["text_cfg"].get("hf_tokenizer_name"):
        for name in _TOKENIZER_FILES:
            if (directory / name).exists():
                _check_tokenizer_file(directory / name)
    return dict(config)


def check_archive(path: Path) -> None:
    """Raise UserError for a .pt file that holds code, or whose tensors expand beyond the file's size when read."""
    if path.suffix == ".npz" or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
            is_torchscript = any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # loading it reports the damage
    if is_torchscript:
        raise UserError(
            f'{path} is a TorchScript archive, which holds code: use the tag "openai" for OpenAI\'s weights, or save '
            "the state dict as .safetensors"
        )
    if expanded > path.stat().st_size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes that expand to {expanded:,}: weights of torch.save are not "
            "compressed; save them again with torch.save or as .safetensors"
        )


def read_json(file: Path) -> Any:
    """The content of a JSON file of bounded size. Raises UserError."""
    try:
        with open(file, "rb") as handle:
            data = handle.read(_CONFIG_BYTES + 1)
        if len(data) > _CONFIG_BYTES:
            raise ValueError(f"it has more than {_CONFIG_BYTES} bytes")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({str(error)[:100]}): export again") from None


def _check_files(directory: Path) -> list[Path]:
    """Data files only, and no link that leaves the directory. Returns the files of weights."""
    home = directory.resolve()
    # A snapshot in the cache of huggingface_hub has links to ../../blobs.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    weights = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path.suffix.lower() in _CODE:
            raise UserError(f"{path} is code, expected a model directory with data files alone: remove it")
        if entry.is_symlink() and not any(path.resolve().is_relative_to(parent) for parent in homes):
            raise UserError(f"{path} is a link that leaves the model directory: copy the file into it")
        if path.suffix in _WEIGHTS and path.is_file():
            check_archive(path)
            weights.append(path)
    return weights


def _check_keys(file: Path, section: str, values: dict[str, Any], kinds: dict[str, Callable[[Any], bool]]) -> None:
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{file}: {section} has the key {key!r}, which a model directory must not set: remove it")
        if kinds[key](value) or (value is None and key not in (*_SECTIONS, "embed_dim")):
            continue
        raise UserError(
            f"{file}: {section}.{key} is {str(value)[:100]!r}, expected a plain value without paths, names of a model "
            "hub or options that run code: correct it"
        )


def _refuse_text_tower_by_name(directory: Path, model: dict[str, Any]) -> None:
    name = model["text_cfg"].get("hf_model_name")
    if not name:
        return
    towers = ("vision_cfg", "text_cfg", "embed_dim")
    configs = ((known, open_clip.get_model_config(known)) for known in open_clip.list_models())
    same = [known for known, config in configs if all(config[key] == model[key] for key in towers)]
    if same:
        remedy = f'use the model "{same[0]}" and the file of weights in this directory as pretrained'
    else:
        remedy = (
            "pass an architecture of open_clip and a weights file; a run of megacid is evaluated with eval.py --run"
        )
    raise UserError(
        f"{directory / CONFIG_FILE}: text_cfg.hf_model_name is {str(name)[:100]!r}, which transformers would load from "
        f"elsewhere: {remedy}"
    )


def _check_tokenizer_file(file: Path) -> None:
    """No code, no tokenizer class that reads more than its vocabulary, no file elsewhere."""
    left = [read_json(file)]
    while left:
        node = left.pop()
        left += node if isinstance(node, list) else node.values() if isinstance(node, dict) else ()
        for key, value in node.items() if isinstance(node, dict) else ():
            if key in _RUNS_CODE and value:
                fault = "which lets transformers run code"
            elif key == "tokenizer_class" and value is not None and not _is_known_class(value):
                fault = "a class that is not among the supported tokenizers"
            elif key.endswith("_file") and key not in _UNREAD and not _is_inside(file.parent, value):
                fault = "a file outside of the directory"
            elif key == "sp_model_kwargs" and not _options_are_numbers(value):
                fault = "expected numbers and flags"
            else:
                continue
            raise UserError(f"{file}: {key} is {str(value)[:100]!r}, {fault}: remove it")


def _is_known_class(value: Any) -> bool:
    return isinstance(value, str) and _TOKENIZER_CLASSES.fullmatch(value) is not None


def _is_inside(directory: Path, value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == Path(value).name and (directory / value).exists())


def _options_are_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_number(v) or _flag(v) for v in value.values()))
