"""Writes a student as a Hugging Face CLIPModel, without transformers: configuration, weights, tokenizer, preprocessor.

config.json, model.safetensors         CLIPModel.from_pretrained(DIR)
vocab.json, merges.txt, tokenizer_config.json, preprocessor_config.json    CLIPProcessor.from_pretrained(DIR)

CLIPModel knows one architecture: OpenAI's, with a ViT and a causal text transformer. Other students are refused.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from megacid.errors import UserError
from megacid.models.clip import preprocess_cfg
from megacid.models.student import Student, open_clip_config, open_clip_tensors
from megacid.storage.atomic import write_atomic, write_json_atomic

CLIP_MODEL_FILE = "model.safetensors"
PROCESSOR_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json")
_START, _END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of the first and last token of a text

# Fields of open_clip that CLIPModel has, too, or that change no result outside of training. All others must have
# open_clip's default.
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
_VISION = {
    "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout", "output_tokens",
    "final_ln_after_pool",
}  # fmt: skip
_TEXT = {"context_length", "layers", "width", "heads", "mlp_ratio", "output_tokens", "final_ln_after_pool", "pad_id"}

# open_clip's names -> CLIPModel's, without "weight" and "bias".
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_MODULES = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_PARAMETERS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def check_clip_model(student: Student) -> None:
    """Raise UserError unless CLIPModel and CLIPProcessor compute what the student computes."""
    config = open_clip_config(student)
    preprocess = config["preprocess_cfg"]
    found = [*_other_values(config["model_cfg"]), *_other_preprocessing(preprocess_cfg(student), preprocess)]
    if found:
        raise UserError(
            f"{student.model} has {', '.join(found)}, which CLIPModel of transformers cannot express: export for "
            "open_clip alone, without --transformers"
        )


def _other_values(model_cfg: dict[str, Any]) -> list[str]:
    found = [f"{key} {value!r}" for key, value in model_cfg.items() if key not in _TOP and value not in (None, False)]
    for section, kind, known in (("vision_cfg", CLIPVisionCfg, _VISION), ("text_cfg", CLIPTextCfg, _TEXT)):
        defaults = {field.name: field.default for field in fields(kind)} | {"block_type": None}
        for key, value in model_cfg[section].items():
            if key not in known and value != defaults.get(key) and (key, value) != ("block_type", "default"):
                found.append(f"{section}.{key} {value!r}")
    for key in ("layers", "image_size", "patch_size"):
        value = model_cfg["vision_cfg"].get(key)
        if isinstance(value, list | tuple):
            found.append(f"vision_cfg.{key} {value}")
    return found


def _other_preprocessing(cfg: PreprocessCfg, written: dict[str, Any]) -> list[str]:
    found = []
    if written["resize_mode"] not in ("shortest", "squash"):
        found.append(f"resize_mode {written['resize_mode']!r}")
    if written["interpolation"] not in _RESAMPLE:
        found.append(f"interpolation {written['interpolation']!r}")
    if cfg.mode != "RGB":
        found.append(f"mode {cfg.mode!r}")
    return found


_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_clip_model(student: Student, out: Path) -> list[Path]:
    """Write the files of CLIPModel and CLIPProcessor for a student that `check_clip_model` accepts; returns them."""
    write_json_atomic(out / "config.json", clip_model_config(student))
    tensors = clip_model_tensors(open_clip_tensors(student))
    write_atomic(out / CLIP_MODEL_FILE, safetensors_bytes(tensors, metadata={"format": "pt"}))
    names = ["config.json", CLIP_MODEL_FILE]
    for name, content in _processor_files(student).items():
        if isinstance(content, str):
            write_atomic(out / name, content.encode())
        else:
            write_json_atomic(out / name, content)
        names.append(name)
    return [out / name for name in names]


def clip_model_config(student: Student) -> dict[str, Any]:
    """Content of CLIPModel's config.json."""
    model_cfg = student.model_config
    vision, text = CLIPVisionCfg(**model_cfg["vision_cfg"]), CLIPTextCfg(**model_cfg["text_cfg"])
    assert isinstance(vision.layers, int)
    common = {
        "projection_dim": student.embed_dim,
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }
    end = text.vocab_size - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "torch_dtype": "float32",
        "projection_dim": student.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **common,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            # open_clip pools at the largest token. Its first position is that of the end token.
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            **common,
        },
    }


def clip_model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors of a two-tower ViT under CLIPModel's names and in its shapes.

    open_clip stores projections as [width, D] and queries, keys and values in one tensor; CLIPModel has linear layers.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")  # of a model with custom_text
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        module, _, kind = name.rpartition(".")
        if name in _PARAMETERS:
            result[_PARAMETERS[name]] = tensor
        elif name in _PROJECTIONS:
            result[_PROJECTIONS[name]] = tensor.t().contiguous()
        elif block is not None:
            tower, layer, part, kind = block.groups()
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
            if part == "attn.in_proj":
                for letter, piece in zip("qkv", tensor.chunk(3)):
                    result[f"{prefix}.self_attn.{letter}_proj.{kind}"] = piece.contiguous()
            else:
                result[f"{prefix}.{_BLOCK[part]}.{kind}"] = tensor
        else:
            result[f"{_MODULES[module]}.{kind}"] = tensor
    return result


def _processor_files(student: Student) -> dict[str, Any]:
    """File name -> content (text, or JSON-able) of open_clip's tokenizer and preprocessing for CLIPProcessor."""
    tokenizer = open_clip.SimpleTokenizer()
    renamed = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: _END}
    vocabulary = {renamed.get(token, name): token for name, token in tokenizer.encoder.items()}
    preprocess = open_clip_config(student)["preprocess_cfg"]
    size = student.image_shape[-1]
    square = {"height": size, "width": size}
    shortest = preprocess["resize_mode"] == "shortest"
    return {
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]) + "\n",
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": _START,
            "eos_token": _END,
            "pad_token": _END,
            "unk_token": _END,
            "do_lower_case": True,
            "model_max_length": student.text_length,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size} if shortest else square,
            "resample": _RESAMPLE[preprocess["interpolation"]],
            "do_center_crop": shortest,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": preprocess["mean"],
            "image_std": preprocess["std"],
        },
    }
