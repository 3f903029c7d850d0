"""Both towers give the width embed_dim, or the student is refused before its weights and the data are opened."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import open_clip
import open_clip.hf_model as hf_model
import pytest
import torch
from PIL import Image

from megacid.errors import UserError
from megacid.evaluate.export import export_student
from megacid.models import towers
from megacid.models.clip import StudentSpec, load_clip, model_config, preprocess_for, register_models
from megacid.models.student import build_student
from megacid.models.towers import check_towers

WIDTH = 1280


def refused(spec: StudentSpec, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        check_towers(spec, **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def architectures() -> list[str]:
    """All two-tower architectures that need no files of transformers."""
    register_models()
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    return [
        name
        for name, config in configs.items()
        if "multimodal_cfg" not in config and "hf_model_name" not in config["text_cfg"]
    ]


def one_of_each_kind() -> list[str]:
    """One architecture for each way in which open_clip builds the last layers of the towers, a small one first."""
    kinds: dict[tuple[object, ...], str] = {}
    for name in sorted(architectures(), key=lambda name: model_config(name)["text_cfg"].get("layers", 12)):
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        source = "timm" if "timm_model_name" in vision else type(vision.get("layers")).__name__
        last = (vision.get("timm_pool"), vision.get("timm_proj"), text.get("proj_type"), config.get("custom_text"))
        kinds.setdefault((source, *last), name)
    return list(kinds.values())


def check_architecture(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another width than its own is honoured, or refused with the remedy, which helps."""
    config = model_config(model)
    tokens = torch.zeros(1, config["text_cfg"].get("context_length", 77), dtype=torch.int64)
    monkeypatch.setattr(towers, "tokenizer_for", lambda spec: lambda texts: tokens)  # SigLIP's needs transformers
    if "none" not in (config["vision_cfg"].get("timm_proj"), config["text_cfg"].get("proj_type")):
        check_towers(StudentSpec(model, WIDTH))
        refused(StudentSpec(model, WIDTH, projection=True), model, "have a projection to embed_dim: remove it")
        return
    own = config["embed_dim"]
    said = f'"{model}" gives images of width {own} at student.embed_dim {WIDTH}, expected {WIDTH}'
    refused(StudentSpec(model, WIDTH), said, f'set "student.projection": true, or use a teacher of width {own}')
    check_towers(StudentSpec(model, WIDTH, projection=True))


@pytest.mark.parametrize("model", one_of_each_kind())
def test_each_kind_of_tower_gives_embed_dim_or_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_architecture(model, monkeypatch)


@pytest.mark.slow
def test_every_architecture_gives_embed_dim_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = architectures()
    assert len(names) > 120 and sum("SigLIP" in name for name in names) >= 26
    for name in names:
        check_architecture(name, monkeypatch)
        check_towers(StudentSpec(name))  # its own width


def test_text_towers_of_transformers_are_taken_by_their_output_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers itself is not needed: open_clip asks it for a configuration and a body."""
    config = types.SimpleNamespace(
        model_type="roberta", hidden_size=24, vocab_size=99, max_position_embeddings=514, is_encoder_decoder=False
    )
    body = types.SimpleNamespace(from_config=lambda config, add_pooling_layer: torch.nn.Linear(24, 24))
    for name, value in (("transformers", True), ("AutoModel", body)):
        monkeypatch.setattr(hf_model, name, value, raising=False)
    source = types.SimpleNamespace(from_pretrained=lambda name: config)
    monkeypatch.setattr(hf_model, "AutoConfig", source, raising=False)
    monkeypatch.setattr(towers, "tokenizer_for", lambda spec: lambda texts: torch.zeros(1, 77, dtype=torch.int64))
    check_towers(StudentSpec("roberta-ViT-B-32", 640))
    refused(StudentSpec("nllb-clip-base-siglip", 640), '"nllb-clip-base-siglip" gives images of width 768')
    check_towers(StudentSpec("nllb-clip-base-siglip", 640, projection=True))


# ---- a projection, from the run to open_clip -------------------------------------------------------------------------


@pytest.fixture
def siglip(tmp_path: Path) -> str:
    """A small architecture of SigLIP's kind: its towers end without a projection."""
    config = {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 8,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "proj_type": "none",
            "pool_type": "last",
        },
    }
    (tmp_path / "tiny-sigmoid.json").write_text(json.dumps(config))
    register_models(tmp_path)
    return "tiny-sigmoid"


def test_an_export_with_a_projection_loads_in_open_clip_with_equal_features(siglip: str, tmp_path: Path) -> None:
    refused(StudentSpec(siglip, 48), "gives images of width 64 at student.embed_dim 48")
    check_towers(StudentSpec(siglip, 48, projection=True))
    student = build_student(siglip, embed_dim=48, projection=True, seed=3).eval()
    out = tmp_path / "export"
    export_student(student, out, name="tiny-48", source={})
    image, text = torch.rand(2, 3, 160, 160), open_clip.get_tokenizer(siglip)(["one", "two"])
    ours = student(image, text)
    assert ours.image.shape == ours.text.shape == (2, 48)
    stock = open_clip.create_model(f"local-dir:{out}").eval()
    torch.testing.assert_close(ours.image, stock.encode_image(image, normalize=True))
    torch.testing.assert_close(ours.text, stock.encode_text(text, normalize=True))
    open_clip.add_model_config(out / "tiny-48.json")
    named = open_clip.create_model("tiny-48", pretrained=str(out / "tiny-48.pt")).eval()
    torch.testing.assert_close(ours.image, named.encode_image(image, normalize=True))
    torch.testing.assert_close(load_clip(f"local-dir:{out}").encode_image(image), ours.image)
    # The export's weights start the next student, which has the same projections.
    again = build_student(siglip, embed_dim=48, projection=True, pretrained=str(out / "tiny-48.pt"), seed=4).eval()
    torch.testing.assert_close(again(image, text).text, ours.text)


# ---- inputs that the towers do not take ------------------------------------------------------------------------------


def test_an_image_size_that_the_tower_does_not_take_is_named() -> None:
    for model, size in (("digits-student", 4), ("convnext_base", 20)):
        refused(StudentSpec(model, image_size=size), f'"{model}" cannot take images of {size} x {size} pixels')
    check_towers(StudentSpec("digits-student", image_size=36))  # the rest of the last patch is cut off, as in open_clip


def test_images_that_are_not_square_are_taken_as_the_architecture_has_them(tmp_path: Path) -> None:
    config = model_config("digits-student")
    config["vision_cfg"]["image_size"] = [32, 48]
    (tmp_path / "wide-images.json").write_text(json.dumps(config))
    register_models(tmp_path)
    check_towers(StudentSpec("wide-images"))
    student = build_student("wide-images", embed_dim=None, seed=0)
    image = preprocess_for(student)[0](Image.new("RGB", (70, 50)))
    assert tuple(image.shape) == student.image_shape == (3, 32, 48)


def test_a_tokenizer_with_more_tokens_than_the_text_tower_knows_is_named(tmp_path: Path) -> None:
    config = model_config("digits-student")
    config["text_cfg"]["vocab_size"] = 1000
    (tmp_path / "few-words.json").write_text(json.dumps(config))
    register_models(tmp_path)
    refused(StudentSpec("few-words"), "gives the token 49407, but its text tower has a vocabulary of 1000")


def test_a_tokenizer_of_another_context_length_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "tokenizer_for", lambda spec: lambda texts: torch.zeros(1, 77, dtype=torch.int64))
    refused(StudentSpec("digits-student"), 'gives 77 tokens, but its text tower takes 16: correct "student.context')


def test_grad_checkpointing_that_the_image_tower_ignores_is_refused() -> None:
    refused(StudentSpec("RN50"), "grad_checkpointing", '"RN50" does not support', grad_checkpointing=True)
    check_towers(StudentSpec("digits-student"), grad_checkpointing=True)


def test_the_check_leaves_the_global_random_generator_alone() -> None:
    before = torch.get_rng_state()
    check_towers(StudentSpec("digits-student", 96))
    assert torch.equal(before, torch.get_rng_state())
