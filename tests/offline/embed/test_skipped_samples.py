"""tools/embed.py on shards whose samples cannot be embedded, and training on what it left out."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from offline_data import embed_args, rewrite, run, save_model, write_shards
from pair_data import stream

from megacid.data.index import load_index
from megacid.data.teacher_table import TeacherTable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("embed") / "model", 0)


@pytest.fixture
def stage(model: Path, tmp_path: Path) -> Path:
    """Three tars of 12 samples, of which one (000010004) is damaged, and a model."""
    write_shards(tmp_path / "shards")
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def no_picture(name: str, data: bytes) -> tuple[str, bytes]:
    return name, b"no picture" if name.endswith(".png") else data


@pytest.mark.parametrize("shards", [1, 3], ids=["first shard", "all shards"])
def test_the_estimate_says_what_could_not_be_decoded_instead_of_nan(stage: Path, shards: int) -> None:
    for shard in range(shards):
        rewrite(stage / "shards" / f"{shard:05d}.tar", no_picture)
    output = run("embed", *embed_args(stage), "--max-lost", 1, expect=0 if shards == 1 else 2)
    assert (
        "fp32: no estimate of the time, 5 of the first 5 samples of 00000.tar cannot be decoded, such as 000000000: "
        "not a readable JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF image" in output
    )
    assert "nan" not in output
    assert "13 skipped" in output if shards == 1 else "none of the 36 samples" in output


def test_the_estimate_names_a_part_that_could_not_be_decoded(stage: Path) -> None:
    rewrite(stage / "shards" / "00000.tar", lambda name, data: (name, b"x" if name == "000000003.png" else data))
    output = run("embed", *embed_args(stage), "--max-lost", 0.1)
    assert " h on 1 rank (" in output and "nan" not in output
    assert "  1 of the first 5 samples of 00000.tar cannot be decoded, such as 000000003: not a readable" in output


def test_shards_for_classification_are_refused_before_the_model_is_loaded(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacid.models.clip.load_clip", lambda *_, **__: pytest.fail("loaded"))
    for tar in (stage / "shards").glob("*.tar"):
        rewrite(tar, lambda name, data: (name.replace(".txt", ".cls"), b"1"))
    output = run("embed", *embed_args(stage), expect=2)
    assert "36 samples with an image and a class (.cls) but none with a caption (.txt)" in output


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_caption_with_a_byte_order_mark_is_embedded_as_without(stage: Path, encoding: str) -> None:
    def encoded(name: str, data: bytes) -> tuple[str, bytes]:
        return name, f"crème {name[:9]}\n".encode(encoding) if name.endswith(".txt") else data

    rewrite(stage / "shards" / "00000.tar", encoded)
    run("embed", *embed_args(stage))
    captions = pq.read_table(stage / "emb" / "metadata" / "metadata_00000.parquet")["caption"].to_pylist()
    assert captions == [f"crème 00000{row:04d}" for row in range(12)]


def no_tokens(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)


def test_training_leaves_out_what_embed_skipped_without_a_charge(stage: Path) -> None:
    """A third of the images cannot be decoded, as in a public report."""
    latin1 = ("000020001.txt", "crème".encode("latin1"))  # a caption that embed refuses
    rewrite(stage / "shards" / "00000.tar", lambda n, data: no_picture(n, data) if n < "000000010" else (n, data))
    rewrite(stage / "shards" / "00002.tar", lambda name, data: latin1 if name == latin1[0] else (name, data))
    run("embed", *embed_args(stage), "--max-lost", 0.4)
    index = load_index(stage / "shards")
    batches = stream(
        index, teacher=TeacherTable(stage / "emb", index), tokenize=no_tokens, error_budget=0.0,
        global_batch=1, micro_batch=1, total_steps=24,
    )  # fmt: skip
    seen = list(batches)
    assert not any(batch.failure or batch.replaced for batch in seen)
    skipped = {*range(10), 16, 25}
    assert sorted(s for batch in seen for s in batch.sample_id.tolist()) == sorted({*range(36)} - skipped)
    assert batches.statistics()["without_teacher"] == len(skipped)
