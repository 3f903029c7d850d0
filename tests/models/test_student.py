import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform_v2
from PIL import Image

from megacid.errors import UserError
from megacid.models.clip import (
    PixelNormalization,
    StudentSpec,
    load_clip,
    model_config,
    preprocess_cfg,
    preprocess_for,
    register_models,
    train_transform,
)
from megacid.models.student import build_student, clamp_logit_scale
from megacid.models.towers import check_towers

ROOT = Path(__file__).resolve().parents[2]


def weights(student):
    return dict(student.clip.state_dict())


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(build_student("digits-student", embed_dim=96, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = weights(build_student("digits-student", embed_dim=96, seed=3))
    other = weights(build_student("digits-student", embed_dim=96, seed=4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_overrides_reach_the_towers_and_the_reported_configuration():
    student = build_student("digits-student", embed_dim=96, image_size=48, context_length=12, seed=0)
    transform, tokenizer = preprocess_for(student)
    image = PixelNormalization(student, "cpu")(transform(Image.new("L", (50, 70), 128)))
    text = tokenizer(["a photo of the digit seven", "two"])
    out = student(torch.stack([image, image]), text)
    assert image.shape == (3, 48, 48) and text.shape == (2, 12) and text.dtype == torch.int64
    assert out.image.shape == out.text.shape == (2, 96)
    config = student.model_config
    assert (config["embed_dim"], config["vision_cfg"]["image_size"]) == (96, 48)
    assert config["text_cfg"]["context_length"] == 12
    assert model_config("digits-student")["embed_dim"] == 64  # the registered architecture is untouched


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_equals_open_clip_and_all_parameters_get_a_gradient(checkpointing):
    student = build_student("digits-student", embed_dim=64, seed=0, grad_checkpointing=checkpointing).train()
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = preprocess_for(student)[1](["zero", "one", "two"])
    out = student(image, text)
    torch.testing.assert_close(out.image, student.clip.encode_image(image, normalize=True))
    torch.testing.assert_close(out.text, student.clip.encode_text(text, normalize=True))
    assert out.logit_scale.shape == () and math.isclose(out.logit_scale.item(), 1 / 0.07, rel_tol=1e-5)
    (out.logit_scale * (out.image @ out.text.T)).square().sum().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_outputs_have_unit_norm_in_fp32_when_the_towers_run_in_bf16():
    student = build_student("digits-student", embed_dim=64, seed=0).to(torch.bfloat16)
    text = preprocess_for(student)[1](["zero", "one"])
    out = student(torch.randn(2, 3, 32, 32).bfloat16(), text)
    assert out.image.dtype == out.text.dtype == out.logit_scale.dtype == torch.float32
    torch.testing.assert_close(torch.cat([out.image, out.text]).norm(dim=1), torch.ones(4))


def test_logit_scale_is_bounded_by_100_and_can_come_back():
    student = build_student("digits-student", embed_dim=64, seed=0)
    scale = student.clip.get_parameter("logit_scale")
    image, text = torch.randn(1, 3, 32, 32), preprocess_for(student)[1](["zero"])
    for value, sign, expected in ((6.0, -1, 0.0), (6.0, 1, math.exp(6.0)), (2.0, -1, -math.exp(2.0))):
        scale.grad = None
        scale.data.fill_(value)
        out = student(image, text)
        assert out.logit_scale.item() == pytest.approx(min(math.exp(value), 100.0))
        (sign * out.logit_scale).backward()  # sign -1: descent wants a larger scale
        assert scale.grad.item() == pytest.approx(expected)
    scale.data.fill_(6.0)
    clamp_logit_scale(student)
    assert scale.item() == pytest.approx(math.log(100))


def test_crops_are_drawn_from_the_torch_generator_and_none_means_the_evaluation_transform():
    student = StudentSpec("digits-student")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = train_transform(student, "random_resized_crop")

    def drawn(seed):
        torch.manual_seed(seed)
        return crop(image)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    pixels = train_transform(student, "none")(image)
    assert torch.equal(pixels, preprocess_for(student)[0](image))
    floats = image_transform_v2(preprocess_cfg(student), is_train=False)(image)
    assert torch.equal(PixelNormalization(student, "cpu")(pixels[None])[0], floats)
    with pytest.raises(UserError, match="flip"):
        train_transform(student, "flip")


def test_student_does_not_import_deepspeed():
    code = "import sys, megacid.models.student; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_registering_models_twice_keeps_one_and_an_empty_directory_is_refused(tmp_path):
    shipped = ["digits-student", "digits-teacher", "icons-student", "icons-teacher"]
    assert register_models() == register_models() == shipped
    with pytest.raises(UserError, match=str(tmp_path)):
        register_models(tmp_path)
    (tmp_path / "tiny-test.json").write_text(json.dumps(model_config("digits-student") | {"embed_dim": 32}))
    assert register_models(tmp_path) == ["tiny-test"]
    assert build_student("tiny-test", embed_dim=None, seed=0).embed_dim == 32


@pytest.mark.parametrize(
    ("model", "pretrained", "named"),
    [
        ("no-such-model", None, "no-such-model"),
        ("coca_ViT-B-32", None, "caption decoder"),
        ("digits-student", "no-such-tag", "no-such-tag"),
    ],
)
def test_build_student_names_what_it_cannot_use(model, pretrained, named):
    with pytest.raises(UserError, match=named):
        build_student(model, embed_dim=64, pretrained=pretrained, seed=0)


def test_load_clip_refuses_what_would_give_random_or_foreign_weights(tmp_path):
    with pytest.raises(UserError, match="needs weights"):
        load_clip("digits-student")
    with pytest.raises(UserError, match="nowhere"):
        load_clip(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_clip(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config("digits-student")}))
    with pytest.raises(UserError, match="holds no weights"):
        load_clip(f"local-dir:{tmp_path}")
    with pytest.raises(UserError, match=r"missing\.pt"):
        load_clip("digits-student", str(tmp_path / "missing.pt"))
    wide = build_student("digits-student", embed_dim=96, seed=0)
    torch.save({"state_dict": wide.clip.state_dict()}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="embedding width"):
        load_clip("digits-student", str(tmp_path / "wide.pt"))
    torch.save({"state_dict": wide.clip.state_dict(), "epoch": np.float64(1)}, tmp_path / "pickled.pt")
    with pytest.raises(UserError, match=r"pickled\.pt"):
        load_clip("digits-student", str(tmp_path / "pickled.pt"))


def test_patch_dropout_leaves_patches_out_in_training_alone_and_is_no_part_of_the_architecture():
    options = {"embed_dim": 64, "seed": 0}
    plain, dropped = (
        build_student("digits-student", **options),
        build_student("digits-student", patch_dropout=0.75, **options),
    )
    tokens: list[int] = []
    dropped.clip.visual.transformer.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    image = torch.rand(2, 3, 32, 32)
    text = preprocess_for(plain)[1](["zero", "one"])
    first, second = dropped.train()(image, text).image, dropped(image, text).image
    assert not torch.equal(first, second)
    assert torch.equal(dropped.eval()(image, text).image, plain.eval()(image, text).image)
    assert tokens == [1 + 4, 1 + 4, 1 + 16]  # of 16 patches, and the class token
    assert (
        dropped.model_config == plain.model_config
        and dropped.clip.state_dict().keys() == plain.clip.state_dict().keys()
    )


def test_patch_dropout_without_effect_is_refused():
    for model, freeze, said in (
        ("RN50", [], 'the image tower of "RN50" does not support'),
        ("convnext_base", [], 'the image tower of "convnext_base" does not support'),
        ("digits-student", ["image"], "a frozen image tower does not use"),
    ):
        with pytest.raises(UserError, match=f'"student.patch_dropout" is 0.5, which {said}: remove it'):
            check_towers(StudentSpec(model, patch_dropout=0.5), freeze=freeze)
    check_towers(StudentSpec("digits-student", patch_dropout=0.5), freeze=["visual.conv1.*"])
