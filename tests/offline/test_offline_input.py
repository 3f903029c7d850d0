"""Damaged inputs and outputs of the offline tools: one line with file and row, exit code 2, no partial file is used.

F27 of the fault list; what a kill does is in test_offline_kills.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faultplan import Fault, FaultPlan, kill
from offline_data import (
    balance_args,
    cluster_args,
    embed_args,
    results,
    run,
    save_model,
    write_embeddings,
    write_shards,
)
from offline_tool import KILLED, Tool

from megacid.errors import UserError
from megacid.models.clip import load_clip
from megacid.offline.embed import stage as embed_stage
from megacid.offline.embed.input import Pairs
from megacid.offline.rows import EmbeddingRows
from megacid.storage.stage_directory import PartialResults

IMAGES, TEXTS, KEYS = "img_emb/img_emb_00001.npy", "text_emb/text_emb_00001.npy", "metadata/metadata_00001.parquet"
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, finished."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder / "shards")
    save_model(folder / "model", 0)
    run("embed", *embed_args(folder))
    run("cluster", *cluster_args(folder))
    run("balance", *balance_args(folder, "balance", "--threshold", 0.003))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The finished stages in a place of their own, with the inputs of the first."""
    for name in ("shards", "model"):
        (tmp_path / name).symlink_to(whole / name)
    for name in ("emb", "clusters", "balance"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def changed(**fields: object) -> Spoil:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))  # type: ignore[func-returns-value]


def array(change: Callable[[np.ndarray], np.ndarray | None]) -> Spoil:
    """Change an array of a file, in place or for what is returned."""

    def spoil(path: Path) -> None:
        values = np.load(path)
        new = change(values)
        np.save(path, values if new is None else new, allow_pickle=True)

    return spoil


def row(value: float | None, factor: float = 1.0) -> Spoil:
    def change(values: np.ndarray) -> None:
        values[3] = values[3] * factor if value is None else value

    return array(change)


BAD_EMBEDDINGS = {
    "nan": (IMAGES, row(np.nan), f"row 3 of .*{IMAGES} .*holds NaN or infinity"),
    "inf": (IMAGES, row(np.inf), f"row 3 of .*{IMAGES} .*holds NaN or infinity"),
    "zero": (IMAGES, row(0), f"row 3 of .*{IMAGES} .*is zero"),
    "unnormalised": (IMAGES, row(None, 1.5), f"row 3 of .*{IMAGES} .*has length 1.5.*expected .*length 1"),
    "width": (IMAGES, array(lambda x: x[:, :31]), rf"{IMAGES} is float16 of shape \(11, 31\), expected .*\(n, 32\)"),
    "integers": (IMAGES, array(lambda x: x.astype(np.int8)), f"{IMAGES} is int8"),
    "objects": (IMAGES, array(lambda x: x.astype(object)), f"{IMAGES} is not a readable .npy array .*[Oo]bject"),
    "rows": (IMAGES, array(lambda x: x[:9]), f"{KEYS} has 11 rows, expected 9 as in .*{IMAGES}"),
    "cut": (IMAGES, cut, f"{IMAGES} is not a readable .npy array"),
    "no images": (
        IMAGES,
        Path.unlink,
        "img_emb lacks 1 of 3 partitions, those of the shards 00001: run tools/embed.py",
    ),
    "no folder": ("img_emb", shutil.rmtree, r"img_emb lacks 3 of 3 partitions, .* 00000, 00001, 00002"),
    "keys cut": (KEYS, cut, f"{KEYS} cannot be read"),
    "no keys": (KEYS, Path.unlink, "metadata lacks 1 of 3 partitions, those of the shards 00001"),
    "meta cut": ("meta.json", cut, "meta.json is not JSON .*: run tools/embed.py again"),
    "no meta": ("meta.json", Path.unlink, "emb has no meta.json"),
    "count": ("meta.json", changed(num_samples=34), "has 35 rows, expected 34 as in its meta.json"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_cluster_names_the_invalid_file_of_the_embeddings(case: str, copy: Path) -> None:
    file, spoil, message = BAD_EMBEDDINGS[case]
    spoil(copy / "emb" / file)
    output = run("cluster", *cluster_args(copy, "again"), expect=2)
    assert_one_error(output, message)
    assert not (copy / "again" / "meta.json").exists()


def assert_one_error(output: str, message: str) -> None:
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    with pytest.raises(UserError, match=message):
        raise UserError(lines[0])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_an_invalid_row_outside_the_training_sample_is_an_error(metric: str, copy: Path) -> None:
    # The seed decides who is in the sample; of four rows of eleven one at least is outside.
    def change(values: np.ndarray) -> None:
        values[:4] = np.nan

    array(change)(copy / "emb" / IMAGES)
    for seed in range(20):
        more = ["--train-sample", 6, "--seed", seed, "--metric", metric]
        output = run("cluster", *cluster_args(copy, f"c{seed}"), *more, expect=2)
        assert_one_error(output, f"row [0-3] of .*{IMAGES} .*holds NaN")
        if (copy / f"c{seed}" / "state.npz").exists():
            return
    raise AssertionError("every sample held a bad row")


BAD_FOR_BALANCE = {
    "labels cut": ("clusters/labels/00001.parquet", cut, "labels/00001.parquet cannot be read"),
    "no labels": ("clusters/labels/00001.parquet", Path.unlink, "labels/00001.parquet is missing"),
    "meta cut": ("clusters/meta.json", cut, "clusters/meta.json is not JSON"),
    "no meta": ("clusters/meta.json", Path.unlink, "clusters has no meta.json"),
    "smaller k": ("clusters/meta.json", changed(k=2), r"labels/0000.\.parquet has label \d for .*, expected -1 \.\. 1"),
    "other model": ("clusters/meta.json", changed(model="ViT-B-32"), "clusters was made from .*another teacher .model"),
    "other weights": ("clusters/meta.json", changed(weights="x"), "clusters was made from .*another teacher .weights"),
    "other shards": ("clusters/meta.json", changed(shards_digest="x"), "clusters was made from other shards"),
    "nan": ("emb/" + IMAGES, row(np.nan), f"row 3 of .*{IMAGES} .*is zero or holds NaN"),
    "zero": ("emb/" + IMAGES, row(0), f"row 3 of .*{IMAGES} .*is zero or holds NaN"),
    "nan caption": ("emb/" + TEXTS, row(np.nan), f"row 3 of .*{TEXTS} .*is zero or holds NaN"),
    "captions cut": ("emb/" + TEXTS, cut, f"{TEXTS} is not a readable .npy array"),
    "images cut": ("emb/" + IMAGES, cut, f"{IMAGES} is not a readable .npy array"),
}


@pytest.mark.parametrize("case", BAD_FOR_BALANCE)
def test_balance_names_the_invalid_input_file(case: str, copy: Path) -> None:
    file, spoil, message = BAD_FOR_BALANCE[case]
    spoil(copy / file)
    assert_one_error(
        run("balance", *balance_args(copy, "again", "--threshold", 0.003, "--keep", "caption"), expect=2), message
    )
    assert not (copy / "again" / "meta.json").exists()


def test_balance_and_figures_of_images_that_became_unreadable_after_embedding(copy: Path, whole: Path) -> None:
    (copy / "shards").unlink()
    shutil.copytree(whole / "shards", copy / "shards")
    tar = copy / "shards" / "00002.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\x89PNG", b"\x89GIF"))  # of the same size: the index still fits
    again = balance_args(copy, "again", "--threshold", 0.003, "--shards", copy / "shards")
    said = run("balance", *again)
    assert said.count("cannot be read now and are shown as grey squares; the first is 00002/00002") == 1
    assert (copy / "again" / "gallery.html").is_file() and "is complete" in run("balance", *again)
    figures = ["--balance", copy / "again", "--shards", copy / "shards", "--out", copy / "figures"]
    assert run("figures", *figures).count("cannot be read now") == 1


FINISHED = {
    "embed": ("emb", [IMAGES, TEXTS, KEYS, "meta.json"]),
    "cluster": ("clusters", ["centroids.npy", "sizes.npy", "labels/00001.parquet", "meta.json"]),
    "balance": ("balance", ["keep/00001.npy", "report.json", "gallery.html", "subset.npy", "meta.json"]),
}


@pytest.mark.parametrize("how", [cut, Path.unlink], ids=["cut", "deleted"])
@pytest.mark.parametrize(("tool", "file"), [(tool, file) for tool, (_, files) in FINISHED.items() for file in files])
def test_a_damaged_finished_file_is_written_again(tool: str, file: str, how: Spoil, copy: Path, whole: Path) -> None:
    # In place: meta.json names the directories of the inputs.
    out, place = FINISHED[tool][0], f"{tool}-{file.replace('/', '-')}-{how.__name__}"
    shutil.copytree(whole / out, whole / place)
    how(whole / place / file)
    arguments = {
        "embed": embed_args(whole, place),
        "cluster": cluster_args(whole, place),
        "balance": balance_args(whole, place, "--threshold", 0.003),
    }[tool]
    assert "is complete" not in run(tool, *arguments)
    assert results(whole / place) == results(whole / out)
    if tool != "embed":
        assert "is complete" in run(tool, *arguments)


def test_more_partitions_than_files_that_may_be_open(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(800, 4)).astype(np.float16)
    write_embeddings(tmp_path / "emb", x, 400)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What other tests of this process have left open does not count: a quarter of the limit remains.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) * 4 // 3 + 200, limits[1]))
    try:
        rows = EmbeddingRows(tmp_path / "emb")
        for _ in range(2):
            for low in range(0, 800, 100):
                np.testing.assert_array_equal(rows.read(low, low + 100), x[low : low + 100])
        chosen = np.arange(799, -1, -7)
        np.testing.assert_array_equal(rows.take(chosen), x[chosen])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_clusters_for_the_rows(copy: Path) -> None:
    assert_one_error(run("cluster", *cluster_args(copy, "c", k=36), expect=2), "k is 36 but there are only 35 rows")
    assert "1.94 per cluster, fewer than 2" in run("cluster", *cluster_args(copy, "d", k=18))


def rewrite(folder: Path, vectors: np.ndarray) -> None:
    """Give every embedded sample one of these vectors, in turn."""
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).float(), dim=1).half().numpy()
    for path in sorted(folder.glob("img_emb/*.npy")):
        rows = len(np.load(path))
        np.save(path, unit[np.arange(rows) % len(unit)])


def test_one_distinct_row_is_an_error_and_few_are_a_warning(copy: Path) -> None:
    generator = np.random.default_rng(0)
    rewrite(copy / "emb", generator.normal(size=(1, 32)))
    for init in ("random", "k-means++"):
        output = run("cluster", *cluster_args(copy, f"one-{init}"), "--init", init, expect=2)
        assert_one_error(output, "all 35 samples of .*emb fall into one of 4 clusters")
        assert not (copy / f"one-{init}" / "meta.json").exists()
    rewrite(copy / "emb", generator.normal(size=(3, 32)))
    assert "only 3 of 10 clusters hold a sample" in run("cluster", *cluster_args(copy, "few", k=10))
    assert (np.load(copy / "few" / "sizes.npy") > 0).sum() == 3


def test_embeddings_that_are_not_unit_vectors_name_model_and_sample(copy: Path) -> None:
    clip = load_clip(f"local-dir:{copy / 'model'}")
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.fill_(float("nan"))
    from megacid.data.index import load_index

    index = load_index(copy / "shards")
    batch = Pairs(index, clip.preprocess_eval, clip.tokenizer).__getitems__([13, 14])
    with pytest.raises(UserError, match=r"sample 000010001 \(row 1 of .*00001.tar\) an embedding of length nan"):
        embed_stage.encode(clip, index, batch)


ARGUMENTS = {
    "embed": embed_args,
    "cluster": cluster_args,
    "balance": lambda f, o: balance_args(f, o, "--threshold", 0.003),
}


@pytest.mark.parametrize(
    ("tool", "nth"), [("embed", 1), ("embed", 5), ("cluster", 2), ("cluster", 6), ("balance", 1), ("balance", 3)]
)
def test_a_full_disk_is_one_line_and_nothing_half_written(tool: str, nth: int, whole: Path) -> None:
    out = whole / f"full-{tool}-{nth}"
    FaultPlan(Fault("offline:file", "os_error", nth=nth)).install(0)
    try:
        output = run(tool, *ARGUMENTS[tool](whole, out.name), expect=2)
    finally:
        FaultPlan.remove()
    assert_one_error(output, rf"{out}/.* cannot be written \(.*No space left on device\): free space")
    assert not (out / "meta.json").exists() and not list(out.rglob(".tmp-*"))
    run(tool, *ARGUMENTS[tool](whole, out.name))
    assert results(out) == results(whole / FINISHED[tool][0])


def test_a_file_size_limit_is_one_line_too(whole: Path, tmp_path: Path) -> None:
    tool = Tool("embed", whole, "limited", tmp_path / "log")

    def limit(step: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))

    ends = tool.fates(2, hooks={"embed:partition": limit})
    assert ends == [2, 2], tool.output
    for output in tool.output:
        # numpy's own writer loses the end of so small an array without an error.
        assert_one_error(output, r"img_emb_0000.\.npy cannot be written .*free space")
    assert not list(tool.out.rglob("*.npy"))
    assert tool.fates(2) == [0, 0]
    tool.equals(whole / "emb")


@pytest.mark.parametrize("tool", ["embed", "cluster", "balance"])
def test_an_out_that_is_a_file_or_has_foreign_files_is_refused(tool: str, copy: Path) -> None:
    (copy / "file").write_text("x")
    assert_one_error(
        run(tool, *ARGUMENTS[tool](copy, "file"), expect=2), "file cannot be written|file/.* cannot be written"
    )
    (copy / "other").mkdir()
    (copy / "other" / "thesis.txt").write_text("x")
    assert_one_error(run(tool, *ARGUMENTS[tool](copy, "other"), expect=2), f"not made by tools/{tool}.py")
    assert [path.name for path in (copy / "other").iterdir()] == ["thesis.txt"]


def test_partial_results_of_other_arguments_are_not_used(whole: Path, tmp_path: Path) -> None:
    tool = Tool("cluster", whole, "partial-cluster", tmp_path / "log")
    assert tool.fates(1, kill("cluster:iteration_saved", step=3)) == [KILLED]
    for more, message in (
        (["--k", 5], "made with k 4, this run has 5"),
        (["--seed", 1], "made with seed 0, this run has 1"),
        (["--iterations", 2], "made with iterations 4, this run has 2"),
        (["--tolerance", 0.5], r"made with tolerance 0\.0, this run has 0\.5"),
    ):
        assert_one_error(run("cluster", *tool.args, *more, expect=2), message)
    assert run("cluster", *tool.args)
    tool.equals(whole / "clusters")


def test_balance_refuses_a_folder_of_other_arguments_and_leaves_it_as_it_is(whole: Path, tmp_path: Path) -> None:
    tool = Tool("balance", whole, "partial-balance", tmp_path / "log")
    assert tool.fates(1, kill("balance:report")) == [KILLED]
    assert (tool.out / ".work").is_dir()
    threshold = balance_args(whole, tool.out.name, "--threshold", 0.003)
    before = results(tool.out)
    assert_one_error(run("balance", *threshold, expect=2), r"made with threshold None, this run has 0\.003")
    assert results(tool.out) == before
    uninterrupted = Tool("balance", whole, "whole-balance", tmp_path / "log")
    run("balance", *uninterrupted.args)
    run("balance", *tool.args)
    tool.equals(uninterrupted.out)
    assert "is complete" in run("balance", *tool.args)
    assert_one_error(run("balance", *tool.args, "--cap", 1, expect=2), "made with cap None, this run has 1")
    tool.equals(uninterrupted.out)


def test_other_labels_for_the_same_arguments_are_other_inputs(copy: Path) -> None:
    arguments = balance_args(copy, "again", "--threshold", 0.003)
    run("balance", *arguments)
    path = copy / "clusters" / "labels" / "00001.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_numpy().copy()
    labels[0] = (labels[0] + 1) % 4
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int32())), path)
    assert_one_error(run("balance", *arguments, expect=2), "again was made with labels '")


def test_embed_says_when_the_batch_size_changed(whole: Path) -> None:
    shutil.copytree(whole / "emb", whole / "batches")
    (whole / "batches" / IMAGES).unlink()
    assert "was started with batch_size 5, this run has 6" in run(
        "embed", *embed_args(whole, "batches"), "--batch-size", 6
    )


def test_partial_results_are_whole_and_of_one_fingerprint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = PartialResults(tmp_path, {"a": 1})
    partial.begin()
    partial.save_array("x", np.arange(5))
    partial.save_json("y", [[0.1, 3]])
    (tmp_path / ".work" / ".tmp-7-x.npy").write_bytes(b"half")
    partial.begin()
    assert partial.array("x", (5,), "i") is not None and partial.json("y") == [[0.1, 3]]
    assert partial.array("x", (6,), "i") is None and partial.array("x", (5,), "f") is None
    assert not list(tmp_path.rglob(".tmp-*"))
    cut(tmp_path / ".work" / "x.npy")
    cut(tmp_path / ".work" / "y.json")
    assert partial.array("x", (5,), "i") is None and partial.json("y") is None
    assert not caplog.records
    PartialResults(tmp_path, {"a": 2}).begin()
    assert "other arguments or inputs (a)" in caplog.text
    assert sorted(path.name for path in (tmp_path / ".work").iterdir()) == ["settings.json"]
