"""Image features before the projection: projected they are the model's own, whose weights stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from megacid.errors import UserError
from megacid.models.clip import LoadedClip, StudentSpec, register_models
from megacid.models.student import Student, create_clip, loaded_student, student_config
from megacid.models.unprojected import before_projection

VISION = {
    "linear": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "mlp": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "mlp"},
    "none": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none"},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}


def load(name: str) -> LoadedClip:
    register_models()
    spec = StudentSpec(name)
    config = student_config(spec)
    return loaded_student(Student(create_clip(spec, config, seed=1), spec, config), "memory")


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    for name, vision in VISION.items():
        config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"unprojected-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path(folder))


@pytest.mark.parametrize("name", ["digits-student", "unprojected-linear", "unprojected-mlp"])
def test_projected_features_are_the_models_own(name: str) -> None:
    clip = load(name)
    size = clip.model.visual.image_size
    image = torch.randn(3, 3, *(size if isinstance(size, tuple) else (size, size)))
    before, own = {k: v.clone() for k, v in clip.model.state_dict().items()}, clip.encode_image(image)
    unprojected = before_projection(clip)
    feature = unprojected.encode_image(image)
    assert feature.shape == (3, unprojected.embed_dim) and unprojected.embed_dim != clip.embed_dim
    torch.testing.assert_close(feature.norm(dim=1), torch.ones(3))
    visual = clip.model.visual
    with torch.no_grad():
        raw = unprojected.model.visual(image)  # not normalised, as an MLP has to get it
        projected = raw @ visual.proj if hasattr(visual, "proj") else visual.head(raw)
    torch.testing.assert_close(F.normalize(projected, dim=-1), own)
    assert torch.equal(clip.encode_image(image), own)  # the model itself still projects
    after = clip.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("name", "kind"), [("unprojected-none", "TimmModel"), ("unprojected-resnet", "ModifiedResNet")]
)
def test_a_tower_without_such_a_projection_is_refused(name: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"the image tower of {name} is a {kind}, expected a vision transformer"):
        before_projection(load(name))
