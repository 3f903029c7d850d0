"""Initial weights at another width or image size: all tensors are loaded but the projections, and the log says it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from offline_data import save_model
from torch import Tensor

from megacid.errors import UserError
from megacid.models import pretrained as pretrained_module
from megacid.models import towers
from megacid.models.clip import StudentSpec, register_models
from megacid.models.student import Student, build_student, clip_on_meta, projections, student_config
from megacid.models.towers import check_towers

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg"}
# kind -> (vision_cfg, text_cfg, other keys; the tensors that depend on embed_dim)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "vit": (VIT, TEXT, {}, ["text_projection", "visual.proj"]),
    "custom-text": (
        VIT,
        TEXT | {"proj_bias": True, "pool_type": "last"},
        {"custom_text": True},
        ["text.text_projection.bias", "text.text_projection.weight", "visual.proj"],
    ),
    "resnet": (
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        TEXT,
        {},
        ["text_projection", "visual.attnpool.c_proj.bias", "visual.attnpool.c_proj.weight"],
    ),
    "timm": (
        TIMM | {"timm_proj": "mlp"},
        TEXT,
        {},
        ["text_projection"]
        + [f"visual.head.mlp.{name}" for name in ("fc1.bias", "fc1.weight", "fc2.weight")],
    ),
    "no-projection": (
        TIMM | {"timm_pool": "token", "timm_proj": "none"},
        TEXT | {"width": 64, "proj_type": "none"},
        {"custom_text": True},
        ["text.text_projection", "visual.head.proj.weight"],
    ),
}  # fmt: skip


def architecture(folder: Path, kind: str, width: int = 64) -> str:
    vision, text, other, _ = KINDS[kind]
    folder.mkdir(exist_ok=True)
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text, **other}
    (folder / f"tiny-{kind}.json").write_text(json.dumps(config))
    register_models(folder)
    return f"tiny-{kind}"


def state(student: Student) -> dict[str, Tensor]:
    return student.clip.state_dict()


def save(student: Student, file: Path) -> dict[str, Tensor]:
    torch.save({"state_dict": state(student)}, file)
    return state(student)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_loaded_but_the_projections_which_are_those_of_the_seed(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megacid")
    model, projection = architecture(tmp_path / "models", kind), kind == "no-projection"
    file = tmp_path / "weights.pt"
    want = save(build_student(model, embed_dim=64, seed=1), file)
    before = torch.get_rng_state()
    got = state(build_student(model, embed_dim=48, pretrained=str(file), projection=projection, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    drawn = state(build_student(model, embed_dim=48, projection=projection, seed=2))
    assert got.keys() == drawn.keys()
    dependent = KINDS[kind][3]
    for name, value in got.items():
        assert torch.equal(value, drawn[name] if name in dependent else want[name]), name
    said = [record.getMessage() for record in caplog.records if record.name == pretrained_module.__name__]
    assert [sorted(line.split(": ")[-1].split(", ")) for line in said] == [sorted(dependent)]
    assert "drawn from run.seed for embed_dim 48, and not loaded" in said[0]


def test_a_tag_a_file_and_a_directory_give_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_model(tmp_path / "model", seed=1)
    file = str(directory / "open_clip_model.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "digits-student", {"mine": {"url": "https://x/mine.pt"}})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: {"https://x/mine.pt": file}[tag["url"]])
    wide = {"embed_dim": 48, "seed": 2}
    by_file, by_tag, by_name = (
        state(build_student("digits-student", pretrained=file, **wide)),
        state(build_student("digits-student", pretrained="mine", **wide)),
        state(build_student(f"local-dir:{directory}", **wide)),
    )
    assert all(
        torch.equal(by_file[name], by_tag[name]) and torch.equal(by_file[name], by_name[name]) for name in by_file
    )
    caplog.set_level(logging.INFO, "megacid")
    caplog.clear()
    same = state(build_student(f"local-dir:{directory}", embed_dim=32, seed=2))
    assert same["visual.proj"].shape == (96, 32) and not torch.equal(
        same["visual.proj"][:, :8], by_file["visual.proj"][:, :8]
    )
    assert caplog.records == []  # everything was loaded


def test_what_else_does_not_fit_is_an_error(tmp_path: Path) -> None:
    model, file = architecture(tmp_path / "models", "vit"), tmp_path / "weights.pt"
    weights = save(build_student(model, embed_dim=48, seed=1), file)
    with pytest.raises(UserError, match=r"size mismatch for .*check that the file is complete"):
        build_student(model, embed_dim=None, pretrained=str(file), seed=2)  # no width asked for, and another one found
    for change, said in (
        ({"visual.proj": None}, "visual.proj"),
        ({"ln_final.bias": None}, "ln_final.bias"),
        ({"visual.ln_post.weight": torch.zeros(31)}, "size mismatch for visual.ln_post.weight"),
        ({"unknown": torch.zeros(3)}, "unknown"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        torch.save({"state_dict": changed}, file)
        with pytest.raises(UserError, match=said) as caught:
            build_student(model, embed_dim=80, pretrained=str(file), seed=2)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_position_embeddings_at_another_image_size_are_those_of_open_clip(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megacid")
    model, file, size = architecture(tmp_path / "models", kind), tmp_path / "weights.pt", {"vit": 48, "timm": 192}[kind]
    save(build_student(model, embed_dim=64, seed=1), file)
    stock = open_clip.create_model(model, pretrained=str(file), force_image_size=size).state_dict()
    level = logging.getLogger().level
    got = state(build_student(model, embed_dim=48, image_size=size, pretrained=str(file), seed=2))
    assert logging.getLogger().level == level
    for name in got.keys() - set(KINDS[kind][3]) - {"logit_scale"}:
        assert torch.equal(got[name], stock[name]), name
    lines = [record.getMessage() for record in caplog.records if "Resizing" in record.getMessage()]
    assert len(lines) == 1 and {"vit": "(4, 4) to (6, 6)", "timm": "(1, 145, 64)"}[kind] in lines[0], lines


def test_a_tag_of_another_width_or_without_projection_is_accepted_without_a_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_towers(StudentSpec("ViT-B-32-quickgelu", 1280, pretrained="openai"))
    with pytest.raises(UserError, match=r'gives images of width 768 at student.embed_dim 1280.*"student.projection"'):
        check_towers(StudentSpec("ViT-B-16-SigLIP", 1280, pretrained="webli"))
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    monkeypatch.setattr(towers, "tokenizer_for", lambda spec: lambda texts: tokens)  # SigLIP's needs transformers
    without = StudentSpec("ViT-B-16-SigLIP", 768, pretrained="webli")
    with_it = replace(without, projection=True)
    check_towers(with_it)
    plain, projected = (clip_on_meta(spec, student_config(spec)).state_dict() for spec in (without, with_it))
    assert {name: t.shape for name, t in plain.items()}.items() <= {
        name: t.shape for name, t in projected.items()
    }.items()
    added = projected.keys() - plain.keys()
    assert added == {"visual.head.proj.weight"} <= projections(with_it, student_config(with_it))
