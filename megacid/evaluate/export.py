"""Exports a run's student to files that stock open_clip loads.

open_clip_config.json, open_clip_model.safetensors    create_model_and_transforms("local-dir:DIR")
NAME.json, NAME.pt    add_model_config("DIR/NAME.json"), create_model_and_transforms(NAME, pretrained="DIR/NAME.pt")
on request            the files that transformers loads, see transformers_export.py, and README.md, the model card
meta.json             source of the weights; written last
"""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import save as safetensors_bytes

from megacid.checkpoint.state import load_student_tensors
from megacid.checkpoint.store import newest_valid, step_name, verify
from megacid.errors import UserError, one_line
from megacid.evaluate.transformers_export import CLIP_MODEL_FILE, PROCESSOR_FILES, check_clip_model, write_clip_model
from megacid.models.clip import WEIGHTS_FILE, tokenizer_for
from megacid.models.local_dir import CONFIG_FILE
from megacid.models.student import Student, build_student, clamp_logit_scale, open_clip_config, open_clip_tensors
from megacid.storage.atomic import SETTINGS_BYTES, read_bounded, read_json, write_atomic, write_json_atomic
from megacid.storage.metadata import write_meta


def student_from_run(run: Path | str, step: int | None = None, *, ema: bool = False) -> tuple[Student, int]:
    """Load the student of a run on the CPU in fp32, and its step.

    Args:
        step: None is the newest valid checkpoint.
        ema: the moving average of its weights, see student.ema_decay.

    Raises:
        UserError: not a run directory, or the checkpoint is missing, damaged, of another config.json, or has no EMA.
    """
    run = Path(run)
    settings = read_run_block(run)
    block = settings["student"]
    directory = checkpoint_of(run, step)
    student = build_student(
        block["model"],
        embed_dim=block["embed_dim"],
        image_size=block.get("image_size"),
        context_length=block.get("context_length"),
        projection=block.get("projection", False),
        sigmoid=settings.get("loss", {}).get("form") == "sigmoid",
        seed=0,
    )
    # The weights come from the checkpoint, but the tag decides mean and standard deviation.
    student.spec = replace(student.spec, pretrained=block.get("pretrained"))
    tensors = load_student_tensors(directory, ema=ema)
    try:
        student.clip.load_state_dict(tensors, strict=True)
    except (RuntimeError, ValueError, KeyError) as error:
        message = f"{directory} does not fit {run / 'config.json'} ({one_line(error)}): use files of the same run"
        raise UserError(message) from error
    return student, int(directory.name.removeprefix("step-"))


def read_run_block(run: Path) -> dict[str, Any]:
    """The "megacid" block of a run's resolved configuration. Raises UserError if `run` is not a run directory."""
    try:
        block: dict[str, Any] = json.loads(read_bounded(run / "config.json", SETTINGS_BYTES))["resolved"]["megacid"]
        block["student"]["model"], block["student"]["embed_dim"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{run} is not a run directory (config.json: {error!r}): pass one that train.py wrote"
        raise UserError(message) from error
    return block


def checkpoint_of(run: Path, step: int | None) -> Path:
    """The newest valid checkpoint of a run directory, or that of `step`. Raises UserError if there is none."""
    if step is None:
        newest, problems = newest_valid(run)
        if newest is None:
            reason = f", {problems[0]}" if problems else ""
            raise UserError(f"{run} has no valid checkpoint (step-*){reason}: train until one is saved")
        return newest
    directory = run / step_name(step)
    try:
        verify(directory)
    except ValueError as error:
        raise UserError(f"checkpoint of step {step} is not valid ({error}): choose another or 'latest'") from error
    return directory


def export_student(
    student: Student, out: Path | str, *, name: str, source: dict[str, Any], card: str | None = None
) -> list[Path]:
    """Write the student to a directory and return the files. Clamps its logit_scale to ln(100) in place.

    Args:
        name: model name in open_clip.
        source: origin of the weights, for meta.json.
        card: model card; with it, the files of transformers are written, too.

    Raises:
        UserError: `out` is a file, open_clip would read `name` as another model, or transformers has no such model.
    """
    out = Path(out)
    _check_name(name, student)
    if card is not None:
        check_clip_model(student)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a directory: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _remove_transformers_files(out)
    (out / "meta.json").unlink(missing_ok=True)  # marks the directory as incomplete until all files are written
    clamp_logit_scale(student)
    tensors = open_clip_tensors(student)
    config = open_clip_config(student)

    write_atomic(out / WEIGHTS_FILE, safetensors_bytes(tensors, metadata={"format": "pt"}))
    pickled = io.BytesIO()
    # Tensors, an int and a str: other types, such as a NumPy scalar, do not load with weights_only=True.
    torch.save({"epoch": 0, "name": name, "state_dict": tensors}, pickled)
    write_atomic(out / f"{name}.pt", pickled.getvalue())
    write_json_atomic(out / f"{name}.json", config["model_cfg"])
    if "hf_tokenizer_name" in config["model_cfg"]["text_cfg"]:
        cast(open_clip.tokenizer.HFTokenizer, tokenizer_for(student)).save_pretrained(str(out))
    write_json_atomic(out / CONFIG_FILE, config)
    files = [out / file for file in (CONFIG_FILE, WEIGHTS_FILE, f"{name}.pt", f"{name}.json")]
    if card is not None:
        files += write_clip_model(student, out)
        write_atomic(out / "README.md", card.encode())
        files.append(out / "README.md")
    parameters = sum(parameter.numel() for parameter in student.clip.parameters())
    facts = {"name": name, "embed_dim": student.embed_dim, "parameters": parameters, "transformers": card is not None}
    write_meta(out, "export", source, **facts)
    return [*files, out / "meta.json"]


def _remove_transformers_files(out: Path) -> None:
    """Remove what an earlier export wrote for transformers, which this one may not write; no file of others."""
    meta = read_json(out / "meta.json")
    if isinstance(meta, dict) and meta.get("made_by") == "export" and meta.get("transformers"):
        for file in ("config.json", CLIP_MODEL_FILE, *PROCESSOR_FILES, "README.md"):
            (out / file).unlink(missing_ok=True)


def _check_name(name: str, student: Student) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"export name is {name!r}, expected letters, digits, '.', '_', '-': choose another --name")
    known = open_clip.get_model_config(name)
    if known is not None and known != student.model_config:
        raise UserError(
            f"export name {name!r} is another architecture of open_clip (embed_dim {known['embed_dim']}, this student "
            f"{student.embed_dim}): choose another --name"
        )
    if "siglip" in name.lower() and "hf_tokenizer_name" not in student.model_config["text_cfg"]:
        raise UserError(f"export name {name!r} makes open_clip use SigLIP's tokenizer: choose another --name")
