"""Where weights come from: tags and files of the right activation, and models of the hub in huggingface_hub's cache."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants as hub_constants
import open_clip
import pytest
import torch
from offline_data import run as run_tool_inside
from offline_data import save_model, write_shards

from megacid.errors import UserError
from megacid.models import hub
from megacid.models.clip import StudentSpec, check_weights, load_clip, preprocess_for
from megacid.models.student import build_student

REVISION = "0123456789abcdef0123456789abcdef01234567"

# ---- activations -----------------------------------------------------------------------------------------------------


def test_each_published_tag_loads_or_names_the_architecture_with_its_activation() -> None:
    refused = 0
    for model, tag in open_clip.list_pretrained():
        try:
            check_weights(model, tag)
        except UserError as error:
            other = f"{model}-quickgelu"
            assert f'use the model "{other}"' in str(error) and "\n" not in str(error)
            check_weights(other, tag)
            refused += 1
    assert refused >= 27
    check_weights("roberta-ViT-B-32", "laion2b_s12b_b32k")  # its tag lacks the flag, and there is no other architecture


def test_weights_of_plain_gelu_are_refused_for_a_quickgelu_architecture() -> None:
    with pytest.raises(UserError, match=r'trained with GELU.*computes QuickGELU.*use the model "ViT-B-32"'):
        check_weights("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def _published_name(folder: Path) -> Path:
    return folder / "vit_b_32-quickgelu-laion400m_e32-46683a32.pt"


def _published_repository(folder: Path) -> Path:
    return folder / "models--timm--vit_base_patch32_clip_224.openai" / "snapshots" / "0" / "open_clip_model.safetensors"


def _own_export(folder: Path) -> Path:
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    (folder / "mine.json").write_text(json.dumps(config))
    return folder / "mine.pt"


def _directory_of_a_model(folder: Path) -> Path:
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32-quickgelu")}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder / "open_clip_model.safetensors"


@pytest.mark.parametrize("make", [_published_name, _published_repository, _own_export, _directory_of_a_model])
def test_a_file_that_is_known_to_be_quickgelu_is_refused_before_it_is_read(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    file = make(tmp_path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    for enter in (load_clip, lambda model, weights: build_student(model, embed_dim=None, pretrained=weights, seed=0)):
        with pytest.raises(UserError, match=r'trained with QuickGELU.*"ViT-B-32" computes GELU.*ViT-B-32-quickgelu'):
            enter("ViT-B-32", str(file))
    check_weights("ViT-B-32-quickgelu", str(file))


def test_a_file_of_unknown_origin_and_unrelated_files_next_to_it_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "epoch_3.pt").write_bytes(b"")
    for content in ("{", "[1]", '{"loss": 1}', json.dumps(open_clip.get_model_config("ViT-B-32"))):
        (tmp_path / "epoch_3.json").write_text(content)
        check_weights("ViT-B-32", str(tmp_path / "epoch_3.pt"))


def test_embed_ends_at_a_wrong_activation_before_it_reads_a_shard_also_without_warnings(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_shards(shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = run_tool_inside(
            "embed", "--shards", shards, "--out", tmp_path / "out", "--model", "ViT-B-32", "--pretrained", "openai",
            expect=2,
        )  # fmt: skip
    assert said.count("error: ") == 1 and 'use the model "ViT-B-32-quickgelu"' in said
    assert not (shards / "index").exists() and not (tmp_path / "out" / "meta.json").exists()


def test_torchscript_archives_as_openai_publishes_them_are_refused_with_the_tag(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mine.pt", "w") as archive:
        for name in ("mine/data.pkl", "mine/code/__torch__.py", "mine/constants.pkl", "mine/version"):
            archive.writestr(name, b"x")
    with pytest.raises(UserError, match=r'mine\.pt is a TorchScript archive.*use the tag "openai"'):
        load_clip("ViT-B-32-quickgelu", str(tmp_path / "mine.pt"))


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub; the hub itself must not be reached."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    hub._snapshot.cache_clear()
    return folder


def add_to_cache(cache: Path, source: Path) -> Path:
    """Lay the files of a model directory out as huggingface_hub does: links from a snapshot to blobs."""
    repository = cache / "models--org--clip"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / REVISION
    for folder in (blobs, snapshot, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    for file in source.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


def test_a_model_in_the_cache_gives_the_features_of_its_directory_without_a_network(
    tmp_path: Path, cache: Path
) -> None:
    model = save_model(tmp_path / "model", seed=1)
    add_to_cache(cache, model)
    ours, theirs = load_clip("hf-hub:org/clip"), load_clip(f"local-dir:{model}")
    image, text = torch.rand(2, 3, 32, 32), theirs.tokenizer(["one", "two"])
    assert torch.equal(ours.encode_image(image), theirs.encode_image(image))
    assert torch.equal(ours.tokenizer(["one", "two"]), text)
    assert (ours.name, ours.embed_dim) == ("org/clip", 32)
    student = build_student("hf-hub:org/clip", embed_dim=32, seed=0)
    torch.testing.assert_close(student.clip.eval().encode_text(text), theirs.model.encode_text(text))
    assert preprocess_for(StudentSpec("hf-hub:org/clip"))[1](["one"]).shape == (1, 16)


def test_tools_take_a_model_of_the_hub_and_name_its_results(tmp_path: Path, cache: Path) -> None:
    add_to_cache(cache, save_model(tmp_path / "model", seed=1))
    write_shards(tmp_path / "shards")
    run_tool_inside("embed", "--shards", tmp_path / "shards", "--out", tmp_path / "out", "--model", "hf-hub:org/clip")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["model"] == "hf-hub:org/clip" and len(meta["weights"]) == 64  # a digest of the files


@pytest.mark.parametrize("name", ["org/other", "bad name", "", "org/clip/extra", "../up"])
def test_a_name_that_cannot_be_fetched_is_one_line_with_the_remedy(cache: Path, name: str) -> None:
    for enter in (load_clip, lambda model: build_student(model, embed_dim=None, seed=0)):
        with pytest.raises(UserError, match=r"neither be fetched.*local-dir:PATH") as caught:
            enter(f"hf-hub:{name}")
        assert "\n" not in str(caught.value) and f"hf-hub:{name}" in str(caught.value)


def test_only_data_files_are_fetched_and_one_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    snapshot = tmp_path / "snapshots" / REVISION
    snapshot.mkdir(parents=True)

    def download(repository: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        assert repository == "org/clip" and revision in (None, REVISION)
        fetched.extend(allow_patterns)
        for name in {"open_clip_config.json", "open_clip_pytorch_model.bin"} & set(allow_patterns):
            (snapshot / name).write_bytes(b"{}")
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub._snapshot.cache_clear()
    assert hub.model_directory("hf-hub:org/clip") == snapshot
    assert len(fetched) == len(set(fetched)) and fetched[-1] == "open_clip_pytorch_model.bin"
    assert not any(set(name) & set("*?[") or name.endswith((".py", ".pkl", ".pt", ".so")) for name in fetched)


def test_a_repository_with_code_in_the_cache_is_refused_like_a_directory(tmp_path: Path, cache: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    (model / "tokenization.py").write_text("raise SystemExit")
    add_to_cache(cache, model)
    with pytest.raises(UserError, match=r"tokenization\.py is code"):
        load_clip("hf-hub:org/clip")


def test_a_model_directory_takes_no_other_weights(tmp_path: Path, cache: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    add_to_cache(cache, model)
    for name in (f"local-dir:{model}", "hf-hub:org/clip"):
        for enter in (load_clip, lambda model, tag: build_student(model, embed_dim=None, pretrained=tag, seed=0)):
            with pytest.raises(UserError, match="has its own weights: leave pretrained out"):
                enter(name, "openai")


def test_an_export_with_a_text_tower_of_transformers_names_the_architecture_that_loads_it(tmp_path: Path) -> None:
    config = open_clip.get_model_config("xlm-roberta-base-ViT-B-32")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    for width, remedy in ((config["embed_dim"], 'use the model "xlm-roberta-base-ViT-B-32"'), (96, "eval.py --run")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config | {"embed_dim": width}}))
        with pytest.raises(UserError, match=f"hf_model_name is 'xlm-roberta-base'.*{remedy}"):
            load_clip(f"local-dir:{tmp_path}")
