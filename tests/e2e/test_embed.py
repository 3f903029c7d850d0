"""tools/embed.py: open_clip models of several kinds, and the layout that other readers expect."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from offline_data import balance_args, cluster_args, embed_args, results, run, save_model, write_shards
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from megacid.data.index import load_index
from megacid.data.side_tables import LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.models.clip import load_clip
from megacid.offline.embed.input import Pairs, as_is
from megacid.offline.embed.partitions import partition_files
from megacid.offline.rows import EmbeddingRows

BLOCKS = {"width": 32, "heads": 2, "layers": 1}
VISION = {"width": 32, "head_width": 16, "layers": 1, "image_size": 24, "patch_size": 8}
MODELS = {
    # Another width of texts, its own context length, as SigLIP: no mask, a biased projection, a logit bias.
    "siglip": {
        "embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": VISION,
        "text_cfg": {**BLOCKS, "width": 40, "context_length": 20, "vocab_size": 49408, "no_causal_mask": True,
                     "proj_bias": True, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 48,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**BLOCKS, "context_length": 76, "vocab_size": 49408, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**BLOCKS, "context_length": 76, "vocab_size": 49408, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "resnet": {
        "embed_dim": 48, "vision_cfg": {"width": 8, "layers": [1, 1, 1, 1], "image_size": 64},
        "text_cfg": {**BLOCKS, "context_length": 77, "vocab_size": 49408},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a model, and its embeddings."""
    folder = tmp_path_factory.mktemp("embed")
    write_shards(folder / "shards")
    save_model(folder / "model", 0)
    run("embed", *embed_args(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "weights"), [("siglip", "local-dir"), ("coca", "file"), ("resnet", "file")], ids=lambda value: value
)
def test_embeddings_equal_those_of_open_clip(kind: str, weights: str, stage: Path) -> None:
    name, folder, preprocess = (
        f"embed-{kind}",
        stage / kind,
        {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    )
    folder.mkdir()
    (folder / f"{name}.json").write_text(json.dumps(MODELS[kind]))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    state = open_clip.create_model(name).state_dict()
    if weights == "file":
        torch.save({"epoch": 1, "name": name, "state_dict": state}, folder / "epoch_1.pt")
        which = [name, "--pretrained", folder / "epoch_1.pt"]
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "open_clip_model.safetensors")
        config = {"model_cfg": MODELS[kind], "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        which = [f"local-dir:{folder}"]
    out = folder / "emb"
    args = ["--shards", stage / "shards", "--out", out, "--workers", 0, "--precision", "fp32", "--model"]
    run("embed", *args, *which)
    model, _, transform = open_clip.create_model_and_transforms(which[0], which[-1] if weights == "file" else None)
    tokenize, key = open_clip.get_tokenizer(which[0]), "000020007"
    with tarfile.open(stage / "shards" / "00002.tar") as tar:
        picture = Image.open(io.BytesIO(tar.extractfile(f"{key}.png").read())).convert("RGB")  # type: ignore[union-attr]
    model.eval()
    with torch.no_grad():
        expected = {
            "img": model.encode_image(transform(picture)[None]),  # type: ignore[operator]
            "text": model.encode_text(tokenize([f"picture {key}"])),  # type: ignore[operator]
        }
    for modality, features in expected.items():
        embedding = torch.from_numpy(np.load(out / f"{modality}_emb" / f"{modality}_emb_00002.npy")[7]).float()
        torch.testing.assert_close(embedding, torch.nn.functional.normalize(features[0], dim=0), atol=1e-3, rtol=0)


def spoil(tar: Path, which: Callable[[str], bool]) -> None:
    """Replace pictures by something that is none."""
    with tarfile.open(tar) as file:
        members = [(member, file.extractfile(member).read()) for member in file.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as file:
        for member, data in members:
            data = b"no picture" if which(member.name) else data
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def test_a_tar_without_any_valid_image_has_no_files_in_any_stage(stage: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    (tmp_path / "model").symlink_to(stage / "model")
    spoil(tmp_path / "shards" / "00001.tar", lambda name: name.endswith(".png"))
    output = run("embed", *embed_args(tmp_path), "--max-lost", 1)
    assert "24 samples embedded, 12 skipped" in output and "skipped in 1 shards, most in 00001: 12" in output
    meta = json.loads((tmp_path / "emb" / "meta.json").read_text())
    assert meta["failures_by_shard"] == {"00001": 12} and meta["empty"] == ["00001"]
    # embedding-reader takes the i-th metadata file for the i-th array that has rows.
    for folder in ("img_emb", "text_emb", "metadata"):
        names = sorted(path.stem.rpartition("_")[2] for path in (tmp_path / "emb" / folder).iterdir())
        assert names == ["00000", "00002"]
    failures = pq.read_table(tmp_path / "emb" / "failures").to_pylist()
    assert [row["key"] for row in failures] == [f"00001{row:04d}" for row in range(12)]
    assert {row["shard"] for row in failures} == {"00001"} and "not a readable" in failures[0]["reason"]
    assert "0 of 3 shards to do" in run("embed", *embed_args(tmp_path))
    run("cluster", *cluster_args(tmp_path))
    run("balance", *balance_args(tmp_path, "balance", "--threshold", 0.003))
    index, rows = load_index(tmp_path / "shards"), EmbeddingRows(tmp_path / "emb")
    assert rows.num_rows == 24 and rows.keys(1) == [] and rows.starts.tolist() == [0, 12, 12, 24]
    assert (TeacherTable(tmp_path / "emb", index).join(1).row_of == -1).all()
    assert (LabelTable(tmp_path / "clusters", index).join(1) == -1).all()
    assert not np.load(tmp_path / "balance" / "keep" / "00001.npy").any()


def test_a_damaged_failures_file_is_written_again(stage: Path, tmp_path: Path) -> None:
    for name in ("shards", "model"):
        (tmp_path / name).symlink_to(stage / name)
    run("embed", *embed_args(tmp_path))
    before = results(tmp_path / "emb")
    for spoilt in (Path.unlink, lambda path: path.write_bytes(b"cut")):
        spoilt(tmp_path / "emb" / "failures" / "failures_00001.parquet")
        assert "1 of 3 shards to do" in run("embed", *embed_args(tmp_path))
        after = results(tmp_path / "emb")
        assert {name for name in before if before[name] != after[name]} <= {"meta.json"}


def test_metadata_has_uid_and_url_of_the_sample_json(stage: Path) -> None:
    table = pq.read_table(stage / "emb" / "metadata" / "metadata_00001.parquet")
    assert table.column_names == ["image_path", "caption", "shard", "key", "uid", "url"]
    last = table.slice(table.num_rows - 1).to_pylist()[0]
    assert last == {
        "image_path": "000010011", "caption": "picture 000010011", "shard": "00001", "key": "000010011",
        "uid": "2bd4fbaac58fb6e77cfc7cce2c591396", "url": None,
    }  # fmt: skip


def test_a_full_disk_is_an_error_before_embedding(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shards", "model"):
        (tmp_path / name).symlink_to(stage / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    output = run("embed", *embed_args(tmp_path), expect=2)
    assert (
        f"error: {tmp_path / 'emb'} needs 0.00 GB, the disk has 0.00 GB free: free space or take another --out"
        in output
    )
    assert not list(tmp_path.rglob("*.npy"))


def test_a_large_batch_of_a_worker_needs_few_open_files(stage: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row in range(400):
            for ending, data in (("png", buffer.getvalue()), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{row:03d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index, clip = load_index(tmp_path), load_clip(f"local-dir:{stage / 'model'}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Fewer than one file for each image of a batch, above what the tests before have left open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, limits[1]))
    try:
        loader = DataLoader(
            Pairs(index, clip.preprocess_eval, clip.tokenizer),
            batch_sampler=[list(range(200)), list(range(200, 400))],
            num_workers=1,
            collate_fn=as_is,
            timeout=30,
        )
        assert [batch.image.shape[0] for batch in loader] == [200, 200]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_file_names_sort_as_numbers() -> None:
    for partitions in (1, 100_000, 100_001, 232_320):
        numbers = [0, min(99_999, partitions - 1), partitions - 1]
        names = [str(partition_files(Path("x"), number, partitions).image) for number in numbers]
        assert names == sorted(names) and len({len(name) for name in names}) == 1
    assert partition_files(Path("x"), 7, 100_001).text == Path("x/text_emb/text_emb_000007.npy")
