"""tools/figures.py weights and patches: layers, histograms, components and pictures that reach the figures."""

from __future__ import annotations

import gc
import io
import json
import sys
import tarfile
import weakref
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from benchmark_data import write_benchmark
from offline_data import run, save_model
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("matplotlib")

import figures
from figure_kinds import patches, towers, weights
from figure_kinds.labels import source
from megacid.errors import UserError
from megacid.models.clip import LoadedClip, StudentSpec, load_clip, register_models
from megacid.models.student import (
    Student,
    build_student,
    create_clip,
    loaded_student,
    open_clip_tensors,
    student_config,
)
from megacid.offline.figure_style import figure_style

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
VISION = {
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "pooler": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "attentional_pool": True},
    "average": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8, "pool_type": "avg"},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "timm-resnet": {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    for name, vision in VISION.items():
        config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"figures-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path(folder))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("export") / "student", seed=5)


@pytest.fixture(scope="module")
def clip(export: Path) -> LoadedClip:
    return load_clip(f"local-dir:{export}")


def build(name: str) -> LoadedClip:
    register_models()
    spec = StudentSpec(f"figures-{name}")
    config = student_config(spec)
    return loaded_student(Student(create_clip(spec, config, seed=1), spec, config), "memory")


def pixels(clip: LoadedClip, count: int = 2) -> torch.Tensor:
    """Random pictures of the size of the tower, uint8."""
    size = clip.model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_a_run_an_export_or_an_architecture_with_weights(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student("digits-student", embed_dim=None, seed=6)
    monkeypatch.setattr(towers, "student_from_run", lambda path: (student, 7))
    (tmp_path / "my_run").mkdir()
    save_file(open_clip_tensors(student), tmp_path / "a.safetensors")
    texts = (f"local-dir:{export}", f"ours={tmp_path / 'my_run'}", f"digits-student,{tmp_path / 'a.safetensors'}")
    loaded: list[weakref.ref[LoadedClip]] = []

    def measure(clip: LoadedClip) -> tuple[str, torch.Tensor]:
        gc.collect()
        assert all(other() is None for other in loaded), "one model is in memory at a time"
        loaded.append(weakref.ref(clip))
        return clip.pretrained, towers.last_linear(towers.blocks_of(clip)[0], clip).weight.detach().clone()

    found = towers.of_models([source(text) for text in texts], "cpu", measure)
    assert list(found) == ["student", "ours", "digits-student"]
    assert found["ours"][0] == "my_run-step-7"
    assert torch.equal(found["ours"][1], found["digits-student"][1])
    with pytest.raises(UserError, match="two of the sources are called 'student'"):
        towers.of_models([source(texts[0]), source(texts[0])], "cpu", measure)


@pytest.mark.parametrize("kind", ["weights", "curves", "results"])
def test_a_missing_matplotlib_is_named_before_any_input_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        figures.main([kind, "missing", "--out", "none"])


@pytest.mark.parametrize(("name", "kind"), [("resnet", "ModifiedResNet"), ("timm-resnet", "ResNet")])
def test_a_tower_without_patch_tokens_is_refused(name: str, kind: str) -> None:
    clip = build(name)
    for use in (weights.layer_weights, lambda clip: towers.patch_features(clip, pixels(clip))):
        with pytest.raises(UserError, match=f"the image tower of figures-{name} is a {kind}, expected a vision transf"):
            use(clip)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_middle_and_the_last_block(clip: LoadedClip) -> None:
    tensors, layers = clip.model.state_dict(), weights.layer_weights(clip)
    assert [(layer.block, layer.blocks) for layer in layers] == [(2, 3), (3, 3)]
    for layer in layers:
        expected = tensors[f"visual.transformer.resblocks.{layer.block - 1}.mlp.c_proj.weight"]
        assert layer.values.tolist() == expected.double().ravel().tolist()
    assert [layer.block for layer in weights.layer_weights(build("average"))] == [2, 4], "the earlier one of two"
    timm = build("timm")
    last = timm.model.visual.trunk.blocks[-1].mlp.fc2.weight
    assert weights.layer_weights(timm)[1].values.tolist() == last.double().ravel().tolist()


def test_histograms_have_all_of_the_weights_and_the_legend_their_deviation(clip: LoadedClip) -> None:
    both = {"a": weights.layer_weights(clip), "b": weights.layer_weights(build("average"))}
    outlier = both["b"][1].values.copy()
    outlier[0] = 1e5 * outlier.std()
    both["b"] = (both["b"][0], both["b"][1]._replace(values=outlier))
    with figure_style():
        panels = weights.weights_figure(both).axes
    for place, panel in enumerate(panels):
        steps = [patch.get_data() for patch in panel.patches if not patch.get_fill()]
        assert len(steps) == 2
        for step, layers in zip(steps, both.values()):
            values = layers[place].values
            mass = step.values * np.diff(step.edges)
            assert mass.sum() == pytest.approx(1.0)
            assert (mass * (step.edges[1:] + step.edges[:-1]) / 2).sum() == pytest.approx(
                values.mean(), abs=np.diff(step.edges).max()
            )
            assert step.edges[0] <= values.min() and step.edges[-1] >= values.max() and len(step.edges) <= 20_001
        deviations = [f"σ = {layers[place].values.std():.4f}" for layers in both.values()]
        assert [text.get_text() for text in panel.texts] == deviations
    assert [panel.get_title() for panel in panels] == ["middle block (2 of 3, 2 of 4)", "last block (3 of 3, 4 of 4)"]


def test_weights_that_are_equal_or_not_finite_are_an_error() -> None:
    for value in (0.0, float("nan")):
        student = build_student("digits-student", embed_dim=32, seed=5)
        with torch.no_grad():
            student.clip.visual.transformer.resblocks[2].mlp.c_proj.weight.fill_(value)
        with pytest.raises(UserError, match="in block 3 are all equal or not finite"):
            weights.layer_weights(loaded_student(student, "memory"))


# ---- patches ---------------------------------------------------------------------------------------------------------


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal((60, 12)) * np.geomspace(8, 1, 12) + 3).astype(np.float32)
    scores = patches.principal_components(rows)
    left, values, axes = np.linalg.svd(rows.astype(np.float64) - rows.astype(np.float64).mean(0), full_matrices=False)
    for number in range(3):
        sign = np.sign(axes[number][np.abs(axes[number]).argmax()])
        np.testing.assert_allclose(scores[:, number], sign * left[:, number] * values[number], atol=1e-9)
    order = random.permutation(60)
    np.testing.assert_allclose(patches.principal_components(rows[order]), scores[order], atol=1e-9)
    np.testing.assert_allclose(patches.principal_components(-rows), -scores, atol=1e-9)
    with pytest.raises(UserError, match="3 patches of width 12, expected at least 4"):
        patches.principal_components(rows[:3])


def test_colours_are_fitted_over_the_patches_of_all_pictures() -> None:
    random = np.random.default_rng(1)
    features = random.standard_normal((2, 3, 4, 8)) * 0.1
    features[1, ..., 2] += 50  # what tells the pictures apart is the first component
    colours = patches.component_colours(features)
    assert colours.shape == (2, 3, 4, 3) and colours.min() == 0 and colours.max() == 1
    assert colours[0, ..., 0].max() < 0.1 and colours[1, ..., 0].min() > 0.9
    constant = patches.component_colours(np.ones((1, 3, 4, 8)))
    assert np.isfinite(constant).all()


def test_patch_features_stand_at_the_place_of_their_patch(clip: LoadedClip) -> None:
    image, tower = pixels(clip), clip.model.visual
    seen: list[torch.Tensor] = []
    hook = tower.transformer.register_forward_hook(lambda module, args, out: seen.append(out))
    features = towers.patch_features(clip, image)
    clip.encode_image(image)
    hook.remove()
    height, width = tower.grid_size
    assert features.shape[1:3] == (height, width) and height * width > 1
    with torch.no_grad():
        expected = tower.ln_post(seen[-1])[:, 1:].reshape(features.shape)  # without the class token, row by row
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(("name", "grid", "width"), [("timm", 10, 64), ("pooler", 4, 64), ("average", 4, 64)])
def test_other_vision_transformers_have_patch_features_too(name: str, grid: int, width: int) -> None:
    clip = build(name)
    one, two = (towers.patch_features(clip, pixels(clip)[:count]) for count in (1, 2))
    assert two.shape == (2, grid, grid, width)
    torch.testing.assert_close(two[:1], one)


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_pictures_come_from_files_and_tars_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded((1, 0, 0)))
    members = {"x.txt": b"a text", "x.PNG": encoded((2, 0, 0)), "y.cls": b"0", "y.png": encoded((3, 0, 0))}
    paths = [write_tar(tmp_path / "b.tar", members), tmp_path / "a.png"]

    def reds(count: int) -> list[int]:
        return [np.asarray(picture)[0, 0, 0] for picture in patches.read_pictures(paths, count)]

    assert reds(6) == [2, 3, 1] and reds(2) == [2, 3] and reds(1) == [2]


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    whole = write_tar(tmp_path / "whole.tar", {"x.png": encoded((1, 2, 3), (300, 300))}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    write_tar(tmp_path / "texts.tar", {"x.txt": b"a text"})
    write_tar(tmp_path / "broken.tar", {"x.png": b"no picture"})
    for name in ("bad.png", "cut.tar", "broken.tar", "missing.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read \(.*pass another picture or tar"):
            patches.read_pictures([tmp_path / name], 6)
    with pytest.raises(UserError, match=r"texts\.tar has no picture"):
        patches.read_pictures([tmp_path / "texts.tar"], 6)


def test_the_figure_shows_the_pictures_and_colours_without_blurring(clip: LoadedClip) -> None:
    pictures = [Image.new("RGB", (64, 48), (40 * n, 90, 250 - 60 * n)) for n in range(3)]
    small, colours = patches.model_view(clip, pictures)
    with figure_style():
        figure = patches.patches_figure(small, {"one": colours, "two": colours[..., ::-1]})
    images = [axes.images[0] for axes in figure.axes]
    assert len(images) == 9 and {image.get_interpolation() for image in images} == {"nearest"}
    assert len({tuple(image.get_extent()) for image in images}) == 1, "a grid of patches covers its picture"
    shown = [np.asarray(image.get_array()) for image in images]
    for column in range(3):
        np.testing.assert_array_equal(shown[column], small[column])
        np.testing.assert_allclose(shown[3 + column], colours[column])
        np.testing.assert_allclose(shown[6 + column], colours[column][..., ::-1])
    assert [figure.axes[3 * row].get_ylabel() for row in range(3)] == ["picture", "one", "two"]


def test_the_commands_draw_two_exports(export: Path, clip: LoadedClip, tmp_path: Path) -> None:
    benchmark = write_benchmark(tmp_path / "colours")
    words = (
        f"new=local-dir:{export}",
        f"old=local-dir:{save_model(tmp_path / 'old', seed=6)}",
        "--out",
        tmp_path / "out",
    )
    run("figures", "weights", *words)
    run("figures", "patches", *words, "--images", benchmark / "test" / "0.tar", "--count", 3, "--device", "cpu")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{stem}.{end}" for stem in ("fig4_weights", "fig5_patches") for end in ("png", "svg", "pdf")}
    with Image.open(tmp_path / "out" / "fig5_patches.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert "is not a run directory" in run("figures", "weights", tmp_path, "--out", tmp_path / "none", expect=2)
    assert "needs weights" in run("figures", "weights", "ViT-B-32", "--out", tmp_path / "none", expect=2)
    assert not (tmp_path / "none").exists()
