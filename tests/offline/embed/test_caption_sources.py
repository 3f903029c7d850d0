"""tools/embed.py and the tools after it on captions that are not in .txt members, and on shards named by patterns."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from offline_data import balance_args, cluster_args, embed_args, rewrite, run, save_model, write_shards
from offline_tool import Tool

from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.data.index import ShardReader, load_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.distributed.parallel import Parallel
from megacid.errors import UserError
from megacid.training.open_data import open_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("captions") / "model", 0)


@pytest.fixture
def stage(model: Path, tmp_path: Path) -> Path:
    """Three tars of 12 samples; the captions are a field of the json, and every .txt says something else."""
    write_shards(tmp_path / "shards")

    def with_alt(name: str, data: bytes) -> tuple[str, bytes]:
        if not name.endswith(".json"):
            return name, data
        return name, json.dumps({**json.loads(data), "alt": f"alt of {name[:9]}"}).encode()

    for tar in (tmp_path / "shards").glob("*.tar"):
        rewrite(tar, with_alt)
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def test_json_captions_go_through_every_tool(stage: Path) -> None:
    source = ["--caption", "json:alt"]
    assert "36 samples used, 0 not used" in run("index_shards", stage / "shards", *source)
    output = run("embed", *embed_args(stage), *source)
    assert re.search(r"35 samples embedded, 1 skipped \(1 x not a readable .* image\); at most 5% may be", output)
    assert "the index of the shards: 36 samples used, 0 not used" in output
    captions = pq.read_table(stage / "emb" / "metadata" / "metadata_00001.parquet")["caption"].to_pylist()
    assert captions[0] == "alt of 000010000" and not (stage / "shards" / "index").exists()
    meta = json.loads((stage / "emb" / "meta.json").read_text())
    assert meta["caption"] == "json:alt" and list(meta["failures_by_reason"].values()) == [1]
    run("cluster", *cluster_args(stage))
    copy = stage / "kept"
    run("balance", *balance_args(stage, "balance", "--threshold", 0.003, "--reshard", copy))
    assert "alt of 0000" in (stage / "balance" / "gallery.html").read_text()
    for folder in (stage / "shards", copy):
        index = load_index(folder, caption="json:alt")
        assert (TeacherTable(stage / "emb", index).join(0).row_of >= 0).all()
        assert (LabelTable(stage / "clusters", index).join(0) >= 0).all()
        assert ShardReader(index).caption(0, 0) == "alt of 000000000"
    assert KeepTable(stage / "balance", load_index(stage / "shards", caption="json:alt")).counts.sum() > 0
    with pytest.raises(UserError, match="captions in 'json:alt', this run reads them from 'txt'"):
        TeacherTable(stage / "emb", load_index(copy))


@pytest.mark.parametrize(("first", "second"), [("txt", "json:alt"), ("json:alt", "txt"), ("json:alt", "json:uid")])
def test_one_output_is_not_continued_with_other_captions(stage: Path, first: str, second: str) -> None:
    run("embed", *embed_args(stage), "--caption", first)
    before = (stage / "emb" / "meta.json").read_bytes()
    output = run("embed", *embed_args(stage), "--caption", second, expect=2)
    shown = [None if source == "txt" else source for source in (first, second)]
    assert f"was made with caption {shown[0]!r}, this run has {shown[1]!r}" in output
    assert (stage / "emb" / "meta.json").read_bytes() == before


def test_an_output_of_an_earlier_version_is_continued(stage: Path) -> None:
    run("embed", *embed_args(stage))
    settings = json.loads((stage / "emb" / "settings.json").read_text())
    assert "caption" not in settings  # earlier versions recorded none
    assert "0 of 3 shards to do" in run("embed", *embed_args(stage), "--caption", ".txt")


def spoil(stage: Path, count: int) -> None:
    """Make the first images of the first tar unreadable."""
    path = stage / "shards" / "00000.tar"
    data = path.read_bytes()
    for _ in range(count):
        data = data.replace(b"\x89PNG", b"nope", 1)
    path.write_bytes(data)


def test_embedding_ends_with_an_error_when_many_samples_are_skipped(stage: Path) -> None:
    spoil(stage, 11)
    output = run("embed", *embed_args(stage), expect=2)
    assert (
        "12 of 36 samples of" in output and "could not be embedded, expected at most 5%: 12 x not a readable" in output
    )
    assert output.rstrip().splitlines()[-1].startswith("error: ") and "--max-lost 1" in output
    assert not (stage / "emb" / "meta.json").exists()
    output = run("embed", *embed_args(stage), "--max-lost", 0.4)  # the embeddings that are there are not made again
    assert (
        "0 of 3 shards to do" in output and "24 samples embedded, 12 skipped" in output and "at most 40% may" in output
    )
    run("embed", *embed_args(stage))  # a finished stage was accepted
    assert json.loads((stage / "emb" / "meta.json").read_text())["num_samples"] == 24


def test_every_rank_ends_with_that_error(stage: Path) -> None:
    spoil(stage, 11)
    tool = Tool("embed", stage, "emb", stage / "log")
    assert tool.fates(2) == [2, 2]
    assert "12 of 36 samples of" in tool.output[0] and "expected at most 5%: 12 x not a readable" in tool.output[0]
    assert tool.output[0].count("error: ") == 1 and not (tool.out / "meta.json").exists()
    assert tool.fates(2, more=["--max-lost", "0.5"]) == [0, 0]


@pytest.mark.parametrize("share", ["1.5", "-1", "nan", "x"])
def test_a_share_that_is_none_is_one_line(stage: Path, share: str) -> None:
    for tool in ("index_shards", "embed"):
        where = embed_args(stage) if tool == "embed" else [stage / "shards"]
        assert "--max-lost is" in run(tool, *where, f"--max-lost={share}", expect=2)


def test_embed_and_balance_take_patterns_and_remember_where_the_shards_are(
    stage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run("embed", *embed_args(stage))
    args = embed_args(stage, "emb2")
    monkeypatch.chdir(stage)
    run("embed", *args[2:], "--shards", "shards/{00000..00002}.tar")
    source = json.loads((stage / "emb2" / "meta.json").read_text())["source"]["shards"]
    assert os.path.isabs(source) and source.endswith("shards/{00000..00002}.tar")
    for kind in ("img_emb", "text_emb"):
        for number in range(3):
            a, b = (stage / out / kind / f"{kind}_{number:05d}.npy" for out in ("emb", "emb2"))
            assert a.read_bytes() == b.read_bytes()
    run("cluster", *cluster_args(stage, emb="emb2"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    emb = ["--embeddings", stage / "emb2", "--clusters", stage / "clusters"]
    run("balance", *emb, "--out", stage / "b", "--threshold", 0.003)
    assert KeepTable(stage / "b", load_index(stage / "shards")).counts.sum() > 0
    # Another spelling of the same shards is the same content.
    run("embed", *args[2:], "--shards", *sorted((stage / "shards").glob("*.tar")))


def load(folder: Path, loss: str = "contrastive", **data: object) -> RunFile:
    block = {
        "run": {"name": "x", "total_steps": 2},
        "student": {"model": "digits-student"},
        "data": data,
        "loss": {loss: 1.0},
    }
    tree = {"train_batch_size": 8, "gradient_clipping": 1.0, "megacid": block,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(tree))
    return load_run(folder / "run.json", world=1)


def test_a_list_of_shards_in_a_run_file_is_joined(tmp_path: Path) -> None:
    joined = load(tmp_path, shards=["a/{0..3}.tar", "b"]).megacid.data.shards
    assert joined == load(tmp_path, shards="a/{0..3}.tar::b").megacid.data.shards == "a/{0..3}.tar::b"
    for wrong in ([], [1], ["a", None], {"a": 1}):
        with pytest.raises(UserError, match=r'"megacid.data.shards" is .*, expected text'):
            load(tmp_path, shards=wrong)


def test_a_run_reads_its_captions_and_says_at_the_start_what_is_left_out(
    stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_rank = Parallel(0, 1, 0, torch.device("cpu"), None)
    tar = stage / "shards" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"alt of 000000003"', b'"nan             "'))
    run("embed", *embed_args(stage), "--caption", "json:alt")
    shards, caption = [str(stage / "shards" / "{00000,00002}.tar"), str(stage / "shards" / "00001.tar")], "json:alt"
    captions: list[str] = []
    caplog.set_level("INFO")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacid.models.clip.tokenizer_for", lambda _: lambda texts: captions.extend(texts))
        data = open_data(load(stage, "instance", shards=shards, caption=caption, teacher=str(stage / "emb")), one_rank)
        list(data.stream(0))
    assert len(captions) == 16 and all(text.startswith("alt of 0000") for text in captions)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    for part in ("samples 35", "kept 34", "without_teacher 1", "left_out_by_index {'blank caption': 1}"):
        assert part in line
    with pytest.raises(UserError, match="captions in 'json:alt', this run reads them from 'txt'"):
        open_data(load(stage, "instance", shards=shards, teacher=str(stage / "emb")), one_rank)
