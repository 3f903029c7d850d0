"""CLIPModel of transformers must compute from an export what the student computes."""

from __future__ import annotations

import copy
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megacid.errors import UserError
from megacid.evaluate.export import export_student
from megacid.evaluate.model_card import model_card
from megacid.evaluate.tasks import is_of_average, weights_name
from megacid.evaluate.transformers_export import check_clip_model
from megacid.models.clip import load_clip, preprocess_cfg, tokenizer_for
from megacid.models.student import Student, build_student
from megacid.storage.atomic import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ["a photo of a cat", "", "it's 2024, they're HERE!", "many words " * 30, "日本語 テスト", "naïve  café 🎉"]
BLOCK = {"loss": {"contrastive": 0.0, "instance": 1.0, "cluster": 0.5}, "run": {"total_steps": 20}}


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def student(request: pytest.FixtureRequest) -> Student:
    if request.param == "gelu":
        return build_student("digits-student", embed_dim=96, seed=5).eval()
    # The text tower's parameters have the prefix "text." and both MLPs have ratios that give rounded widths.
    path = Path(request.getfixturevalue("tmp_path_factory").mktemp("models")) / "clip-of-its-own.json"
    config = open_clip.get_model_config("digits-student")
    config |= {"quick_gelu": True, "custom_text": True}
    config["vision_cfg"]["mlp_ratio"] = config["text_cfg"]["mlp_ratio"] = 4.36
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return build_student("clip-of-its-own", embed_dim=None, seed=6).eval()


@pytest.fixture(scope="module")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out")
    metrics = {"acc1": 0.25, "acc5": None, "held_out_acc1": 0.5, "k": 20, "temperature": 0.07, "train_samples": 9}
    result = {"dataset": "wds/cifar10", "metrics": metrics, "task": "zeroshot_classification"}
    (run / "eval" / "step-00000020").mkdir(parents=True)
    write_json_atomic(run / "eval" / "step-00000020" / "cifar10.json", result)
    write_json_atomic(run / "eval" / "step-00000020" / "nameless.json", {"metrics": {"acc1": 0.5}})
    write_json_atomic(run / "eval" / "step-00000020" / "empty.json", {"dataset": "wds/cars", "metrics": None})
    average = {"dataset": "wds/svhn", "metrics": {"acc1": 0.5}, "pretrained": "small-step-20-ema"}
    write_json_atomic(run / "eval" / "step-00000020" / "svhn.json", average)
    card = model_card(student, "small-clip", run, 20, BLOCK, ema=False)
    averaged = model_card(student, "small-clip", run, 20, BLOCK, ema=True)
    assert "cifar10" in card and "cifar10" not in averaged
    assert "svhn" in averaged and "svhn" not in card
    assert "moving average" in averaged and "moving average" not in card
    export_student(student, out, name="small-clip", source={"step": 20}, card=card)
    return out


def test_weights_whose_own_name_ends_in_ema_are_no_average_of_a_run() -> None:
    names = [weights_name(Path("runs/my-ema"), 20, ema=ema) for ema in (False, True)]
    results = [{"pretrained": name} for name in (*names, "/data/my-ema", None)]
    assert [is_of_average(result) for result in results] == [False, True, False, False]


@pytest.fixture(scope="module")
def inputs(student: Student) -> tuple[Tensor, Tensor]:
    images = torch.randn(3, *student.image_shape, generator=torch.Generator().manual_seed(0))
    return images, tokenizer_for(student)(CAPTIONS)


def logits_of(student: Student, images: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        out = student(images, text)
        return out.logit_scale * out.image @ out.text.T


class Reference:
    """The published forward of CLIPModel, from config.json and model.safetensors alone."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.tensors = load_file(directory / "model.safetensors")
        self.read: set[str] = set()

    def get(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"), 1e-5)

    def encoder(self, x: Tensor, tower: str, causal: bool) -> Tensor:
        config = self.config[f"{tower}_config"]
        heads, act = config["num_attention_heads"], config["hidden_act"]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"{tower}_model.encoder.layers.{layer}"
            y = self.norm(x, f"{prefix}.layer_norm1")
            q, k, v = (
                self.linear(y, f"{prefix}.self_attn.{letter}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                for letter in "qkv"
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if causal:
                scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
            x = x + self.linear(y, f"{prefix}.self_attn.out_proj")
            y = self.linear(self.norm(x, f"{prefix}.layer_norm2"), f"{prefix}.mlp.fc1")
            y = y * torch.sigmoid(1.702 * y) if act == "quick_gelu" else F.gelu(y)
            x = x + self.linear(y, f"{prefix}.mlp.fc2")
        return x

    def __call__(self, images: Tensor, text: Tensor) -> Tensor:
        patch = self.config["vision_config"]["patch_size"]
        x = F.conv2d(images, self.get("vision_model.embeddings.patch_embedding.weight"), stride=patch)
        x = x.flatten(2).transpose(1, 2)
        first = self.get("vision_model.embeddings.class_embedding").expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.get("vision_model.embeddings.position_embedding.weight")
        x = self.encoder(self.norm(x, "vision_model.pre_layrnorm"), "vision", causal=False)
        image = F.linear(self.norm(x[:, 0], "vision_model.post_layernorm"), self.get("visual_projection.weight"))
        y = self.get("text_model.embeddings.token_embedding.weight")[text]
        y = y + self.get("text_model.embeddings.position_embedding.weight")[: text.shape[1]]
        y = self.norm(self.encoder(y, "text", causal=True), "text_model.final_layer_norm")
        end = (text == self.config["text_config"]["eos_token_id"]).int().argmax(-1)
        words = F.linear(y[torch.arange(len(y)), end], self.get("text_projection.weight"))
        return self.get("logit_scale").exp() * F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T


def test_the_published_forward_gives_the_logits_of_the_student(student, exported, inputs):
    reference = Reference(exported)
    assert torch.allclose(reference(*inputs), logits_of(student, *inputs), atol=2e-6)
    assert reference.read == reference.tensors.keys()  # no tensor is left over
    assert len(logits_of(student, *inputs).unique()) > len(CAPTIONS)  # constant logits would prove nothing


def test_the_directory_still_loads_in_open_clip(student, exported, inputs):
    clip = load_clip(f"local-dir:{exported}")
    image, text = clip.encode_image(inputs[0]), clip.encode_text(inputs[1])
    assert torch.allclose(clip.model.logit_scale.exp() * image @ text.T, logits_of(student, *inputs), atol=2e-6)


def test_the_model_card_is_read_by_the_hub_and_lists_the_evaluations_of_the_exported_step(exported):
    card = ModelCard.load(exported / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("wds/cifar10", "acc1", 0.25)
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "20 of 20 steps" in card.text and "instance 1, cluster 0.5." in card.text
    assert 'CLIPModel.from_pretrained("small-clip")' in card.text


def test_an_export_without_transformers_removes_the_files_of_an_earlier_one_and_none_of_others(student, tmp_path):
    foreign = [tmp_path / name for name in ("model.safetensors", "README.md")]
    for file in foreign:
        file.write_text("of others")
    plain = {file.name for file in export_student(student, tmp_path, name="small-clip", source={"step": 1})}
    assert [file.read_text() for file in foreign] == ["of others"] * 2
    export_student(student, tmp_path, name="small-clip", source={"step": 2}, card="card")
    assert (tmp_path / "vocab.json").exists() and foreign[1].read_text() == "card"
    export_student(student, tmp_path, name="small-clip", source={"step": 3})
    assert {file.name for file in tmp_path.iterdir()} == plain


@pytest.mark.parametrize(
    "model",
    ["RN50", "ViT-B-16-SigLIP", "convnext_tiny", "roberta-ViT-B-32", "ViT-H-14-CLIPA", "EVA02-B-16", "MobileCLIP-S1"],
)
def test_another_architecture_is_refused_and_the_setting_that_differs_is_named(model):
    other = SimpleNamespace(model=model, pretrained=None, image_size=None, context_length=None)
    other.model_config = open_clip.get_model_config(model)
    with pytest.raises(UserError, match=rf"{model} has .*vision_cfg|text_cfg.* cannot express"):
        check_clip_model(other)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "image_size", [32, 48]),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "ls_init_value", 1e-5),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "vocab_size", 32000),
        ("text_cfg", "proj_bias", True),
        (None, "init_logit_bias", -10),
    ],
)
def test_a_setting_that_clip_model_does_not_have_is_refused(student, section, key, value):
    other = copy.copy(student)
    other._model_config = student.model_config
    (other._model_config[section] if section else other._model_config)[key] = value
    with pytest.raises(UserError, match=key):
        check_clip_model(other)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"])
def test_the_architectures_of_openai_are_accepted(model):
    fields = {"model": model, "pretrained": None, "image_size": None, "context_length": None}
    check_clip_model(SimpleNamespace(**fields, model_config=open_clip.get_model_config(model)))


def test_the_tool_refuses_before_it_writes(tmp_path, monkeypatch):
    main = runpy.run_path(str(ROOT / "tools" / "export.py"))
    other = build_student("digits-student", embed_dim=64, seed=0)
    other._model_config["vision_cfg"]["no_ln_pre"] = True
    tool = main["export"].__globals__
    monkeypatch.setitem(tool, "student_from_run", lambda run, step, ema: (other, 1))
    monkeypatch.setitem(tool, "read_run_block", lambda run: BLOCK)
    with pytest.raises(UserError, match=r"no_ln_pre True, which CLIPModel .* without --transformers"):
        main["main"](["--run", str(tmp_path), "--out", str(tmp_path / "out"), "--transformers"])
    assert not (tmp_path / "out").exists()


# In a process of its own: open_clip imports transformers wherever it is installed, which takes seconds.
_WITH_TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
directory, inputs = sys.argv[1:]
given = torch.load(inputs)
model, report = CLIPModel.from_pretrained(directory, output_loading_info=True)
assert not any(report.values()), report
processor = CLIPProcessor.from_pretrained(directory)
words = processor.tokenizer(given["captions"], padding="max_length", truncation=True, return_tensors="pt")
picture = Image.fromarray(given["picture"].numpy())
pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    logits = model.eval()(input_ids=given["text"], pixel_values=given["images"]).logits_per_image
    masked = model(**words, pixel_values=given["images"]).logits_per_image
torch.save({"logits": logits, "masked": masked, "tokens": words["input_ids"], "pixels": pixels}, inputs)
"""


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    packages = ["transformers>=4.40", "tokenizers", "regex", "typer"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(install, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_transformers_itself_gives_the_logits_tokens_and_pixels_of_the_student(
    student, exported, inputs, transformers_folder, tmp_path
):
    transform = image_transform_v2(preprocess_cfg(student), is_train=False)
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 20, 30, generator=generator)
    picture = (F.interpolate(picture, (200, 300), mode="bicubic").clamp(0, 1)[0] * 255).byte().permute(1, 2, 0)
    images, text = inputs
    file = tmp_path / "inputs.pt"
    torch.save({"captions": CAPTIONS, "picture": picture, "images": images, "text": text}, file)
    environment = os.environ | {"PYTHONPATH": str(transformers_folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITH_TRANSFORMERS, str(exported), str(file)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    got, expected = torch.load(file), logits_of(student, images, text)
    assert torch.allclose(got["logits"], expected, atol=2e-6)
    assert torch.allclose(got["masked"], expected, atol=2e-6)
    for ours, theirs in zip(text, got["tokens"]):  # up to the end; they fill the rest with the end token, we with 0
        length = int(ours.argmax()) + 1
        assert torch.equal(ours[:length], theirs[:length])
    pixels = transform(Image.fromarray(picture.numpy()))
    # One step of 8 bits: transformers resizes with torchvision, open_clip with Pillow.
    assert (got["pixels"][0] - pixels).abs().max() <= 1.01 / 255 / 0.26
