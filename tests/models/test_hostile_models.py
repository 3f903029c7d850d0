"""E1: a model directory runs no code, and reads nothing outside of itself, through any door that takes `local-dir:`."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hostile_data import build

from megacid.errors import UserError
from megacid.models.clip import StudentSpec, load_clip, model_config, preprocess_for, tokenizer_for, train_transform
from megacid.models.local_dir import check_archive, read_local_config
from megacid.models.student import build_student

WEIGHTS = "open_clip_model.safetensors"


def model_dir(folder: Path, change: Callable[[dict[str, Any]], object] = lambda config: None) -> Path:
    """A directory with the configuration of digits-student, changed, and weights that nobody should come to read."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"model_cfg": model_config("digits-student"), "preprocess_cfg": {"mean": [0.5] * 3}}
    change(config)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"")
    return folder


def with_tokenizer(folder: Path, **tokenizer_config: Any) -> Path:
    model_dir(folder, lambda config: config["model_cfg"]["text_cfg"].update(hf_tokenizer_name="org/name"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **tokenizer_config}))
    return folder


DOORS: dict[str, Callable[[str], object]] = {
    "embed and eval": load_clip,
    "student.model": lambda model: build_student(model, embed_dim=None, seed=0),
    "the tokenizer": lambda model: tokenizer_for(StudentSpec(model)),
    "the transform": lambda model: train_transform(StudentSpec(model), "none"),
    "preprocessing": lambda model: preprocess_for(StudentSpec(model)),
    "the architecture": model_config,
}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip must not be reached."""

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError(f"open_clip was called: {args} {options}")

    for name in ("create_model", "get_tokenizer"):
        monkeypatch.setattr(open_clip, name, fail)


def refused(folder: Path, *names: str) -> None:
    for door, enter in DOORS.items():
        with pytest.raises(UserError) as caught:
            enter(f"local-dir:{folder}")
        message = str(caught.value)
        assert "\n" not in message and all(name in message for name in (str(folder), *names)), (door, message)


def text(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["model_cfg"]["text_cfg"].update(values)


def vision(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["model_cfg"]["vision_cfg"].update(values)


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "remote code": ("tokenizer_kwargs", text(hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True})),
    "remote code without a tokenizer": ("tokenizer_kwargs", text(tokenizer_kwargs={"trust_remote_code": True})),
    "a subfolder": ("tokenizer_kwargs", text(hf_tokenizer_name="x", tokenizer_kwargs={"subfolder": "../x"})),
    "a revision of code": ("tokenizer_kwargs", text(tokenizer_kwargs={"code_revision": "main"})),
    "a vocabulary elsewhere": ("tokenizer_kwargs", text(tokenizer_kwargs={"bpe_path": "/etc/passwd"})),
    "a slow regular expression": ("tokenizer_kwargs", text(tokenizer_kwargs={"additional_special_tokens": ["(a+)+"]})),
    "a mask that downloads": ("tokenizer_kwargs", text(tokenizer_kwargs={"reduction_mask": "syntax"})),
    "no options": ("tokenizer_kwargs", text(tokenizer_kwargs=["trust_remote_code"])),
    "an unknown cleaning": ("tokenizer_kwargs", text(tokenizer_kwargs={"clean": "__import__"})),
    "a text tower by name": ("hf_model_name", text(hf_model_name="org/evil")),
    "a text tower by path": ("hf_model_name", text(hf_model_name="/somewhere")),
    "an unknown key of the text": ("hf_config", text(hf_config={"auto_map": {}})),
    "an image tower by name": ("timm_model_name", vision(timm_model_name="hf-hub:org/evil")),
    "an image tower by path": ("timm_model_name", vision(timm_model_name="local-dir:/somewhere")),
    "an image tower with a slash": ("timm_model_name", vision(timm_model_name="org/evil")),
    "an unknown key of the image": ("pretrained_cfg", vision(pretrained_cfg={"url": "http://x"})),
    "options of a layer": ("norm_kwargs", vision(norm_kwargs={"device": "cuda"})),
    "options of an activation": ("act_kwargs", text(act_kwargs={"out": 1})),
    "a size beyond memory": ("width", vision(width=10**12)),
    "an infinite size": ("layers", text(layers=float("inf"))),
    "a text for a number": ("layers", text(layers="12")),
    "an unknown key": ("output_dict", lambda config: config["model_cfg"].update(output_dict=True)),
    "a remote decoder": ("multimodal_cfg.hf_model_name", lambda config: config["model_cfg"].update(
        multimodal_cfg={"hf_model_name": "org/evil"})),
    "no block": ("vision_cfg", lambda config: config["model_cfg"].update(vision_cfg="x")),
    "no preprocessing": ("preprocess_cfg", lambda config: config.update(preprocess_cfg="x")),
    "preprocessing by text": ("mean", lambda config: config.update(preprocess_cfg={"mean": "x"})),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_configuration_cannot_run_code_or_lead_elsewhere(tmp_path: Path, closed: None, case: str) -> None:
    key, change = HOSTILE[case]
    refused(model_dir(tmp_path / "model", change), "open_clip_config.json", key)


@pytest.mark.parametrize("name", ["tokenization.py", "evil.PY", "evil.so", "vocab.pkl", "__init__.pyc"])
def test_a_model_directory_with_code_is_refused(tmp_path: Path, closed: None, name: str) -> None:
    folder = model_dir(tmp_path / "model")
    (folder / name).write_text("raise SystemExit")
    refused(folder, name, "is code")


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoTokenizer": ["tokenization.Evil", None]}},
        {"auto_map": {"AutoTokenizer": "org/evil--tokenization.Evil"}},
        {"nested": [{"auto_map": {"AutoConfig": "x.Y"}}]},
        {"trust_remote_code": True},
        {"tokenizer_class": "TransfoXLTokenizer"},
        {"tokenizer_class": ["T5Tokenizer"]},
        {"vocab_file": "/etc/passwd"},
        {"vocab_file": "../other/spiece.model"},
        {"tokenizer_file": "missing.json"},
        {"sp_model_kwargs": {"model_file": "/etc/passwd"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_cannot_name_code_or_files_elsewhere(
    tmp_path: Path, closed: None, file: str, config: dict[str, Any]
) -> None:
    folder = with_tokenizer(tmp_path / "model")
    (folder / file).write_text(json.dumps(config))
    refused(folder, file, "remove it")


def test_links_that_leave_a_model_directory_are_refused(tmp_path: Path, closed: None) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    for name in (WEIGHTS, "tokenizer.json", "open_clip_config.json"):
        folder = model_dir(tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
        refused(folder, name, "link")


def test_links_inside_a_directory_and_of_the_hub_cache_are_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.parent.mkdir()
    model_dir(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    folder = model_dir(tmp_path / "model")
    (folder / "model.safetensors").symlink_to(WEIGHTS)
    (tmp_path / "link").symlink_to(folder)
    for directory in (snapshot, folder, tmp_path / "link"):
        assert read_local_config(directory)["model_cfg"] == model_config("digits-student")


def test_the_tokenizer_of_a_directory_is_loaded_from_it_alone_and_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(source: Any, **options: Any) -> AutoTokenizer:
            calls.append((source, options))
            return AutoTokenizer()

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=AutoTokenizer))
    stale = {"special_tokens_map_file": "/home/someone/map.json", "name_or_path": "org/name", "auto_map": None}
    folder = with_tokenizer(tmp_path / "model", **stale, sp_model_kwargs={}, tokenizer_file=None)
    tokenizer_for(StudentSpec(f"local-dir:{folder}"))
    ((source, options),) = calls
    assert source == folder and options["trust_remote_code"] is False and options["local_files_only"] is True


def test_every_architecture_of_open_clip_can_be_a_directory(tmp_path: Path) -> None:
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        folder = model_dir(tmp_path / "model", lambda config, cfg=cfg: config.update(model_cfg=cfg))
        if cfg["text_cfg"].get("hf_model_name"):  # by name, from the network
            with pytest.raises(UserError, match="hf_model_name"):
                read_local_config(folder)
        else:
            assert read_local_config(folder)["model_cfg"] == cfg, name


def test_a_model_of_the_hub_is_refused_in_one_line(closed: None) -> None:
    for enter in DOORS.values():
        with pytest.raises(UserError, match=r"hf-hub:org/evil.*local-dir"):
            enter("hf-hub:org/evil")


def test_a_configuration_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path, closed: None) -> None:
    folder = model_dir(tmp_path / "model")
    with open(folder / "open_clip_config.json", "r+b") as file:
        file.truncate(40 << 30)
    refused(folder, "open_clip_config.json", "more than")


@pytest.mark.parametrize("place", ["pretrained", "model.bin", "model.pth"])
def test_weights_that_expand_when_read_are_refused(tmp_path: Path, place: str) -> None:
    torch.save({"x": torch.zeros(10_000)}, tmp_path / "good.pt")
    check_archive(tmp_path / "good.pt")
    folder = model_dir(tmp_path / "model")
    bomb = folder / ("bomb.pt" if place == "pretrained" else place)
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for entry in good.infolist():
            bad.writestr(entry.filename, good.read(entry))
    model, weights = ("digits-student", str(bomb)) if place == "pretrained" else (f"local-dir:{folder}", None)
    with pytest.raises(UserError, match="expand"):
        load_clip(model, weights)
    with pytest.raises(UserError, match="expand"):
        build(model, weights)
