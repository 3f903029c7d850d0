"""From a run to files that stock open_clip loads.

DIR/open_clip_config.json + open_clip_model.safetensors     create_model_and_transforms("local-dir:DIR")
DIR/NAME.pt + NAME.json                                     add_model_config("DIR/NAME.json"), then (NAME, pretrained="DIR/NAME.pt")
DIR/meta.json                                               where it came from; written last
"""

import io
import json
import re
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import save as safetensors_bytes

from megacid.checkpoint.state import load_student_tensors
from megacid.checkpoint.store import newest_valid, step_name, verify
from megacid.errors import UserError
from megacid.models.clip import CONFIG_FILE, WEIGHTS_FILE, tokenizer_for
from megacid.models.student import Student, build_student, clamp_logit_scale, open_clip_config, open_clip_tensors
from megacid.storage.atomic import write_atomic, write_json_atomic
from megacid.storage.metadata import write_meta


def student_from_run(run: Path | str, step: int | None = None) -> tuple[Student, int]:
    """(the student of `run` on the CPU in fp32, its step): the newest valid checkpoint, or that of `step`.

    Raises UserError when the directory is no run, the checkpoint is missing or damaged, or it does not fit config.json.
    """
    run = Path(run)
    try:
        block = json.loads((run / "config.json").read_text())["resolved"]["megacid"]["student"]
        block["model"], block["embed_dim"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{run} is no run directory (config.json: {error!r}); give the directory train.py wrote"
        ) from error
    directory = checkpoint_of(run, step)
    student = build_student(
        block["model"],
        embed_dim=block["embed_dim"],
        image_size=block.get("image_size"),
        context_length=block.get("context_length"),
        seed=0,
    )
    # The weights come from the checkpoint; the tag still decides mean and standard deviation.
    student.spec = student.spec.with_pretrained(block.get("pretrained"))
    try:
        student.clip.load_state_dict(load_student_tensors(directory), strict=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory} does not fit {run / 'config.json'}: {reason}; they must be of the same run"
        ) from error
    return student, int(directory.name.removeprefix("step-"))


def checkpoint_of(run: Path, step: int | None) -> Path:
    """The newest valid checkpoint of a run directory, or that of `step`; UserError when there is none."""
    if step is None:
        newest, problems = newest_valid(run)
        if newest is None:
            reason = f"; {problems[0]}" if problems else ""
            raise UserError(f"{run} has no valid checkpoint (step-*){reason}; train until one is saved")
        return newest
    directory = run / step_name(step)
    try:
        verify(directory)
    except ValueError as error:
        raise UserError(f"checkpoint of step {step} cannot be used: {error}; choose another or 'latest'") from error
    return directory


def export_student(student: Student, out: Path | str, *, name: str, source: dict[str, Any]) -> list[Path]:
    """Write the student into directory `out`; returns the files. `source` tells meta.json where the weights are from.

    logit_scale is bounded to ln(100) in place, as in training. Raises UserError for a name that open_clip would read as
    another model.
    """
    out = Path(out)
    _check_name(name, student)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory to export into")
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)  # until the last file is there, the directory is incomplete
    clamp_logit_scale(student)
    tensors = open_clip_tensors(student)
    config = open_clip_config(student)

    write_atomic(out / WEIGHTS_FILE, safetensors_bytes(tensors, metadata={"format": "pt"}))
    pickled = io.BytesIO()
    # Tensors, one int and one str: anything else (a numpy scalar, say) would not load with weights_only=True.
    torch.save({"epoch": 0, "name": name, "state_dict": tensors}, pickled)
    write_atomic(out / f"{name}.pt", pickled.getvalue())
    write_json_atomic(out / f"{name}.json", config["model_cfg"])
    if "hf_tokenizer_name" in config["model_cfg"]["text_cfg"]:
        cast(open_clip.tokenizer.HFTokenizer, tokenizer_for(student)).save_pretrained(str(out))
    write_json_atomic(out / CONFIG_FILE, config)
    parameters = sum(parameter.numel() for parameter in student.clip.parameters())
    write_meta(out, "export", source, name=name, embed_dim=student.embed_dim, parameters=parameters)
    return [out / file for file in (CONFIG_FILE, WEIGHTS_FILE, f"{name}.pt", f"{name}.json", "meta.json")]


def _check_name(name: str, student: Student) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"export name {name!r} becomes a file and model name; use only letters, digits, '.', '_', '-'")
    known = open_clip.get_model_config(name)
    if known is not None and known != student.model_config:
        raise UserError(
            f"export name {name!r} is an architecture of open_clip that differs from this student (embed_dim "
            f"{known['embed_dim']} against {student.embed_dim}, or else); choose another --name"
        )
    if "siglip" in name.lower() and "hf_tokenizer_name" not in student.model_config["text_cfg"]:
        raise UserError(f"export name {name!r}: open_clip takes SigLIP's tokenizer for it; choose another --name")
