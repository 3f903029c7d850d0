"""embed -> cluster -> balance on a few real tars with a tiny open_clip model, restarted and spoiled on the way."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from offline_data import ROOT, cluster_args, embed_args, run, save_model, write_shards
from pair_data import teacher_rows
from PIL import Image

from megacid.data.index import load_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.distributed.parallel import Parallel
from megacid.models.clip import load_clip
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.stage import balance
from megacid.offline.cluster.stage import cluster
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.embed import stage as embed_stage
from megacid.storage.metadata import read_meta


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with shards, model, embeddings, clusters and balance, made by the tools."""
    folder = tmp_path_factory.mktemp("offline")
    write_shards(folder / "shards")
    save_model(folder / "model", 0)
    run("embed", *embed_args(folder))
    run("cluster", *cluster_args(folder))
    yield folder


def snapshot(folder: Path, pattern: str) -> dict[str, tuple[str, int]]:
    """Content hash and inode of files: a file that was written again has another inode."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_ino)
        for p in sorted(folder.glob(pattern))
    }


def test_embeddings_join_by_key_and_name_what_is_missing(stage: Path) -> None:
    meta = read_meta(stage / "emb", expect="embed")
    assert meta["num_samples"] == 35 and meta["dim"] == 32
    assert meta["failures"] == {"count": 1, "named": ["00001/000010004"]}
    assert meta["partitions"] == {"00000": 0, "00001": 1, "00002": 2}
    keys = pq.read_table(stage / "emb" / "metadata" / "metadata_00001.parquet")
    assert keys.column_names == ["image_path", "caption", "shard", "key", "uid", "url"]
    assert keys["image_path"].to_pylist() == [f"00001{row:04d}" for row in range(12) if row != 4]
    index = load_index(stage / "shards")
    table = TeacherTable(stage / "emb", index)
    assert (table.join(1).row_of >= 0).tolist() == [row != 4 for row in range(12)]
    # The last row of the second tar, embedded here by hand.
    image, text = teacher_rows(table, 1, np.array([11]))
    clip = load_clip(f"local-dir:{stage / 'model'}")
    with tarfile.open(stage / "shards" / "00001.tar") as tar:
        member = tar.extractfile("000010011.png")
        assert member is not None
        picture = Image.open(io.BytesIO(member.read())).convert("RGB")
    wanted_image = clip.encode_image(clip.preprocess_eval(picture)[None])
    wanted_text = clip.encode_text(clip.tokenizer(["picture 000010011"]))
    assert image.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(image).float(), wanted_image, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.from_numpy(text).float(), wanted_text, atol=1e-3, rtol=0)


def test_embed_repairs_only_damaged_partitions(stage: Path) -> None:
    before = snapshot(stage / "emb", "*_emb/*.npy")
    metadata = snapshot(stage / "emb", "metadata/*")
    torn = stage / "emb" / "img_emb" / "img_emb_00001.npy"
    torn.write_bytes(torn.read_bytes()[:-100])
    (stage / "emb" / "metadata" / "metadata_00002.parquet").unlink()
    (stage / "emb" / "meta.json").unlink()
    output = run("embed", *embed_args(stage))
    assert "2 of 3 shards to do" in output and "skipped: 00001/000010004" in output
    after = snapshot(stage / "emb", "*_emb/*.npy")
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    assert after["img_emb/img_emb_00000.npy"] == before["img_emb/img_emb_00000.npy"]
    assert after["img_emb/img_emb_00001.npy"] != before["img_emb/img_emb_00001.npy"]
    assert snapshot(stage / "emb", "metadata/*").keys() == metadata.keys()
    assert not list(stage.glob("emb/**/.tmp*"))


def test_embed_refuses_another_model_in_the_same_folder(stage: Path) -> None:
    save_model(stage / "other", 1)
    output = run("embed", *embed_args(stage, model="other"), expect=2)
    assert "error:" in output and str(stage / "model") in output and str(stage / "other") in output
    # Other weights at the same path are noticed too.
    weights = stage / "model" / "open_clip_model.safetensors"
    mine = weights.read_bytes()
    weights.write_bytes((stage / "other" / "open_clip_model.safetensors").read_bytes())
    try:
        assert "was made with weights" in run("embed", *embed_args(stage), expect=2)
    finally:
        weights.write_bytes(mine)


def all_stages(stage: Path) -> None:
    """Runs the three stages on this rank."""
    parallel = Parallel(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), dist.group.WORLD)
    index, model = load_index(stage / "shards"), f"local-dir:{stage / 'model'}"
    settings = {
        "model": model,
        "pretrained": None,
        "precision": "fp32",
        "weights": "w",
        "dim": 32,
        "shards_digest": index.digest,
    }
    embed_stage.embed(index, load_clip(model), stage / "emb2", parallel, settings=settings, batch_size=5, workers=0)
    cluster(
        stage / "emb2", stage / "clusters2", KMeansSettings(k=4, iterations=4, init="k-means++"), parallel, top_labels=2
    )
    balance(stage / "emb2", stage / "clusters2", stage / "balance2", BalanceSettings(threshold=0.02), parallel)


def test_two_ranks_write_the_same_files(stage: Path) -> None:
    run_ranks(all_stages, 2, stage)
    for stem in ("00000", "00001", "00002"):
        one, two = (pq.read_table(stage / name / "labels" / f"{stem}.parquet") for name in ("clusters", "clusters2"))
        assert one.equals(two)
    np.testing.assert_array_equal(
        np.load(stage / "clusters" / "centroids.npy"), np.load(stage / "clusters2" / "centroids.npy")
    )
    run(
        "balance",
        "--embeddings",
        stage / "emb",
        "--clusters",
        stage / "clusters",
        "--out",
        stage / "balance1",
        "--threshold",
        "0.02",
    )
    for path in (stage / "balance1" / "keep").iterdir():
        np.testing.assert_array_equal(np.load(path), np.load(stage / "balance2" / "keep" / path.name))


@pytest.mark.launch
def test_under_a_launcher(stage: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "tools" / "cluster.py"),
    ]
    arguments = map(str, [*cluster_args(stage, out="clusters3"), "--local-rank", 0])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_array_equal(
        np.load(stage / "clusters" / "centroids.npy"), np.load(stage / "clusters3" / "centroids.npy")
    )


def test_cluster_files(stage: Path) -> None:
    meta = read_meta(stage / "clusters", expect="cluster")
    assert (meta["k"], meta["dim"], meta["metric"], len(meta["objective"])) == (4, 32, "cosine", 4)
    centroids, sizes = np.load(stage / "clusters" / "centroids.npy"), np.load(stage / "clusters" / "sizes.npy")
    assert centroids.dtype == np.float32 and sizes.dtype == np.int64 and sizes.sum() == 35
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    index = load_index(stage / "shards")
    labels, teacher = LabelTable(stage / "clusters", index), TeacherTable(stage / "emb", index)
    assert labels.join(1)[4].tolist() == [-1, -1]
    rows = np.array([0, 3, 11])
    cosine = teacher_rows(teacher, 1, rows)[0].astype(np.float32) @ centroids.T
    # Compare cosines, not labels: the order of nearly equal ones depends on how the machine rounds.
    nearest = -np.sort(-cosine, axis=1)[:, :2]
    np.testing.assert_allclose(np.take_along_axis(cosine, labels.join(1)[rows], 1), nearest, rtol=0, atol=1e-6)
    stored = pq.read_table(stage / "clusters" / "labels" / "00001.parquet")
    assert [str(field.type) for field in stored.schema] == ["string", "int32", "float", "int32"]
    score = dict(zip(stored["key"].to_pylist(), stored["score"].to_pylist()))
    length = np.linalg.norm(teacher_rows(teacher, 1, rows[2:])[0].astype(np.float64))
    assert float(score["000010011"]) == pytest.approx(float(cosine[2].max() / length), abs=2e-7)


def test_finished_clusters_are_kept_and_other_arguments_refused(stage: Path) -> None:
    before = snapshot(stage / "clusters", "**/*.*")
    assert "is complete" in run("cluster", *cluster_args(stage))
    assert snapshot(stage / "clusters", "**/*.*") == before
    assert "with k 4, this run has 5" in run("cluster", *cluster_args(stage, k=5), expect=2)
    assert "k is 36 but there are only 35 rows" in run("cluster", *cluster_args(stage, out="many", k=36), expect=2)


def test_balance_finds_the_planted_copies(stage: Path) -> None:
    out = stage / "balance"
    output = run(
        "balance", "--embeddings", stage / "emb", "--clusters", stage / "clusters", "--out", out, "--threshold", 0.003
    )
    report = json.loads((out / "report.json").read_text())
    planted = report["planted_copies"]
    # One member of the damaged picture's group is left, so 11 of the 12 groups have a copy.
    assert planted["groups"] == 11 and planted["removal_recall"] == 1 and planted["removal_precision"] == 1
    assert report["kept"] == 24 and report["without_embedding"] == 1 and "24 of 35 samples kept" in output
    index = load_index(stage / "shards")
    keep = KeepTable(out, index)
    assert keep.counts.sum() == 24 and 4 not in keep.kept(1) and 5 in keep.kept(1)
    assert read_meta(out, expect="balance")["kept"] == 24
    subset = np.load(out / "subset.npy")
    kept_keys = [index.table(shard).keys[row] for shard in range(3) for row in keep.kept(shard)]
    uids = sorted(hashlib.md5(key.encode()).hexdigest() for key in kept_keys)
    assert [f"{high:016x}{low:016x}" for high, low in subset.tolist()] == uids
    page = (out / "gallery.html").read_text()
    kept_and_removed = page.count('class="kept"'), page.count('class="removed"')
    # All copies are exact, so all groups are perceptual; half of the 40 places are theirs.
    assert kept_and_removed == (11, 11) and "11 groups in which every removed image" in page
    assert "0 groups with a removed image" in page and "http" not in page
    assert page.count("data:image/jpeg;base64,") == 22
    representative = np.concatenate([np.load(out / "representative" / f"{shard:05d}.npy") for shard in range(3)])
    # Every third sample is a copy of the one before; whichever has the smaller row stays. Row 16 could not be decoded.
    expected = [row - 1 if row % 3 == 2 else row for row in range(36)]
    expected[16], expected[17] = -1, 17
    assert representative.tolist() == expected


def test_figures_of_the_stages(stage: Path, tmp_path: Path) -> None:
    """Needs the folders that the test before this one made."""
    output = run(
        "figures", "--balance", stage / "balance", "--out", tmp_path / "figures", "--groups", 3, "--members", 3
    )
    names = ["fig2a_perceptual", "fig2b_semantic", "fig2c_process", "fig2d_clusters"]
    for name in names:
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            # One column or both of a paper, at 300 dots per inch.
            assert picture.size[0] == (2100 if name == "fig2c_process" else 1020)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    page = (tmp_path / "figures" / "index.html").read_text()
    assert all(f"{name}.png" in page and f"{name}.pdf" in page and name in output for name in names)
    assert "11 of 11 groups" in page and "24 of 35 samples kept" in page and "http" not in page
    again = tmp_path / "again"
    run("figures", "--balance", stage / "balance", "--out", again, "--groups", 3, "--members", 3)
    assert snapshot(again, "*").keys() == snapshot(tmp_path / "figures", "*").keys()
    for name, (digest, _) in snapshot(again, "*").items():
        assert digest == snapshot(tmp_path / "figures", "*")[name][0], name
    run("cluster", *cluster_args(stage, out="clusters5", k=5))
    output = run("figures", "--balance", stage / "balance", "--clusters", stage / "clusters5", "--out", again, expect=2)
    assert "other clusters than" in output and "--clusters" in output


@pytest.mark.parametrize("keep", ["farthest", "random", "caption"])
def test_every_rule_reaches_the_target(stage: Path, keep: str) -> None:
    out = stage / f"balance-{keep}"
    run(
        "balance",
        "--embeddings",
        stage / "emb",
        "--clusters",
        stage / "clusters",
        "--out",
        out,
        "--target-keep",
        0.6,
        "--keep",
        keep,
    )
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == 21 and report["threshold_curve"]


def test_stages_of_different_shards_are_not_mixed(stage: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "00002.tar").unlink()
    output = run(
        "balance",
        "--embeddings",
        stage / "emb",
        "--clusters",
        stage / "clusters",
        "--out",
        tmp_path / "b",
        "--threshold",
        0.1,
        "--shards",
        tmp_path / "shards",
        expect=2,
    )
    assert str(tmp_path / "shards") in output and "other shards" in output
    output = run("cluster", "--embeddings", stage / "clusters", "--out", tmp_path / "c", "--k", 3, expect=2)
    assert "expected one made by 'embed'" in output
