"""Balance before clustering: balance --cells makes clusters of its own, cluster --keep trains on what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from balance_data import brute_medoids
from faultplan import Fault, kill
from offline_data import embed_args, results, run, save_model, write_embeddings, write_shards
from offline_tool import KILLED, Tool

from megacid.distributed.parallel import Parallel
from megacid.distributed.stopping import Progress, Stopped
from megacid.errors import EXIT_AGAIN, UserError
from megacid.offline.balance.context import BalanceSettings
from megacid.offline.balance.figures import read_balanced
from megacid.offline.balance.stage import balance
from megacid.offline.cluster.stage import cluster
from megacid.offline.cluster.state import KMeansSettings
from megacid.offline.rows import EmbeddingRows
from megacid.offline.tars import kept_rows

HOW = ("--target-keep", 0.45, "--keep", "medoid", "--neighbor-clusters", 2, "--seed", 3)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and embeddings, and in `first` and `then` what balance and after it cluster make of them."""
    folder = tmp_path_factory.mktemp("cells")
    write_shards(folder / "shards")
    save_model(folder / "model", seed=1)
    run("embed", *embed_args(folder))
    run("balance", *cells_args(folder, "first"))
    run("cluster", *then_args(folder, "then"))
    return folder


def cells_args(folder: Path, out: str, cells: int = 7) -> list[object]:
    return ["--embeddings", folder / "emb", "--cells", cells, "--out", folder / out, *HOW]


def then_args(folder: Path, out: str, *rest: object) -> list[object]:
    where = ["--embeddings", folder / "emb", "--out", folder / out, "--keep", folder / "first"]
    return [*where, "--k", 5, "--iterations", 4, *rest]


def tool(name: str, folder: Path, out: str, log: Path) -> Tool:
    made = Tool(name, folder, out, log)
    made.args = (cells_args if name == "balance" else then_args)(folder, out)
    return made


def test_cells_are_the_clusters_of_the_cluster_tool_and_samples_are_compared_inside_them(stage: Path) -> None:
    run("cluster", "--embeddings", stage / "emb", "--out", stage / "given", "--k", 7, "--seed", 3)
    run("balance", *cells_args(stage, "by-given")[:2], "--clusters", stage / "given", "--out", stage / "by-given", *HOW)
    assert results(stage / "first" / "cells") == results(stage / "given")
    own, given = results(stage / "first"), results(stage / "by-given")
    for name in given.keys() - {"meta.json", "settings.json"}:
        assert own[name] == given[name], name
    assert own.keys() - given.keys() == {name for name in own if name.startswith("cells/")}
    meta = json.loads((stage / "first" / "meta.json").read_text())
    assert meta["arguments"]["cells"] == 7 and "clusters" not in meta["source"]
    assert "cells" not in json.loads((stage / "by-given" / "settings.json").read_text())
    report = json.loads((stage / "first" / "report.json").read_text())
    assert report["removed_across_clusters"] > 0 and 10 < report["kept"] < 25


def test_tool_keeps_the_medoids(stage: Path) -> None:
    x = np.concatenate([np.load(path) for path in sorted((stage / "emb" / "img_emb").iterdir())])
    number = np.delete(np.arange(36), 16)  # sample 16 could not be decoded
    representative = np.concatenate([np.load(path) for path in sorted((stage / "first/representative").iterdir())])
    assert representative[16] == -1 and np.bincount(representative[number]).max() > 3
    np.testing.assert_array_equal(representative[number], number[brute_medoids(x, representative[number])])
    flags = np.concatenate([np.load(path) for path in sorted((stage / "first" / "keep").iterdir())])
    np.testing.assert_array_equal(flags, representative == np.arange(36))
    assert json.loads((stage / "first" / "meta.json").read_text())["keep"] == "medoid"


def test_a_finished_folder_is_kept_and_a_moved_one_is_read(stage: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (stage / "first").rglob("*")}
    assert "is complete" in run("balance", *cells_args(stage, "first"))
    assert {path: path.stat().st_mtime_ns for path in (stage / "first").rglob("*")} == before
    moved = read_balanced(Path(shutil.copytree(stage / "first", tmp_path / "moved")))
    assert moved.inputs.clusters == tmp_path / "moved" / "cells" and moved.inputs.k == 7


def test_damaged_outputs_and_cells_are_made_again_with_the_same_bits(stage: Path) -> None:
    shutil.copytree(stage / "first", stage / "damaged")
    (stage / "damaged" / "keep" / "00001.npy").unlink()
    (stage / "damaged" / "cells" / "labels" / "00002.parquet").write_bytes(b"cut")
    run("balance", *cells_args(stage, "damaged"))
    assert results(stage / "damaged") == results(stage / "first")


def test_damaged_cells_alone_are_made_again_too_and_figures_say_how(stage: Path) -> None:
    out = Path(shutil.copytree(stage / "first", stage / "cells-damaged"))
    settings = BalanceSettings(target_keep=0.45, keep="medoid", neighbor_clusters=2, seed=3, cells=7)
    for name, damage in (("labels/00002.parquet", b"cut"), ("meta.json", None)):
        file = out / "cells" / name
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(UserError, match=rf"cells/{name} is damaged or missing: run tools/balance\.py again"):
            read_balanced(out)
        balance(stage / "emb", None, out, settings, ALONE)
        assert results(out) == results(stage / "first")


KILLS = ["cluster:iteration", "cluster:before_meta", "balance:search", "balance:cross_cluster", "balance:medoids"]


def test_killed_at_every_stage_and_on_other_ranks_gives_the_same_bits(stage: Path, tmp_path: Path) -> None:
    cut = tool("balance", stage, "cut", tmp_path / "log")
    assert cut.fates(2, kill("cluster:iteration_saved", rank=1, step=2)) == [EXIT_AGAIN, KILLED], cut.output
    for at in KILLS:
        assert cut.fates(1, kill(at)) == [KILLED], (at, cut.output)
    assert cut.fates(1, kill("balance:report")) == [KILLED], cut.output
    # Nothing that is finished is done again.
    done = [kill(at) for at in ("cluster:iteration", "cluster:labels", "balance:search", "balance:part")]
    assert cut.fates(2, *done, kill("balance:medoids")) == [0, 0], cut.output
    cut.equals(stage / "first")
    ranks = tool("balance", stage, "ranks", tmp_path / "log")
    assert ranks.fates(4) == [0] * 4, ranks.output
    ranks.equals(stage / "first")


def test_partial_results_of_other_cells_are_not_used(stage: Path, tmp_path: Path) -> None:
    """Cells that were lost and made again may differ in their last bits, which the links inside of them must not."""
    cut = tool("balance", stage, "other-cells", tmp_path / "log")
    assert cut.fates(1, kill("balance:part")) == [KILLED]
    labels = cut.out / "cells" / "labels" / "00000.parquet"
    table = pq.read_table(labels)
    score = table["score"].to_numpy() + np.float32(1e-6)
    pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", [score]), labels)
    assert cut.fates(1) == [0]
    assert "holds partial results of other arguments or inputs (labels): starting again" in cut.output[0]


def kept(stage: Path) -> np.ndarray:
    """bool [35]: the embedded samples that balance kept."""
    flags = np.concatenate([np.load(path) for path in sorted((stage / "first" / "keep").iterdir())])
    return np.delete(flags, 16)  # sample 16 could not be decoded


@pytest.mark.parametrize("method", ["flat", "hierarchical"])
def test_centroids_are_those_of_the_kept_samples_alone_and_all_samples_get_labels(stage: Path, method: str) -> None:
    run("cluster", *then_args(stage, f"kept-{method}", "--method", method, "--top-labels", 2))
    x = np.concatenate([np.load(path) for path in sorted((stage / "emb" / "img_emb").iterdir())])
    alone = write_embeddings(stage / f"alone-{method}", x[kept(stage)], 2)
    out = stage / f"of-alone-{method}"
    run("cluster", "--embeddings", alone, "--out", out, "--k", 5, "--iterations", 4, "--method", method)
    centroids = np.load(stage / f"kept-{method}" / "centroids.npy")
    np.testing.assert_array_equal(centroids, np.load(out / "centroids.npy"))
    tables = [pq.read_table(path) for path in sorted((stage / f"kept-{method}" / "labels").iterdir())]
    label = np.concatenate([table["label"].to_numpy() for table in tables])
    cosine = x.astype(np.float64) @ centroids.astype(np.float64).T
    assert len(label) == 35 and (cosine[np.arange(35), label] > cosine.max(axis=1) - 1e-6).all()
    meta = json.loads((stage / f"kept-{method}" / "meta.json").read_text())
    assert meta["source"]["keep"] == str(stage / "first") and meta["num_samples"] == 35


def test_clusters_of_kept_samples_are_the_same_on_ranks_and_after_a_kill(stage: Path, tmp_path: Path) -> None:
    pair = tool("cluster", stage, "then-cut", tmp_path / "log")
    assert pair.fates(2, kill("cluster:iteration_saved", rank=0, step=2)) == [KILLED, EXIT_AGAIN], pair.output
    assert pair.fates(1, kill("cluster:labels", step=1)) == [KILLED], pair.output
    assert pair.fates(2, Fault("cluster:iteration", "kill")) == [0, 0], pair.output
    pair.equals(stage / "then")


ALONE = Parallel(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)


def test_kept_rows_follow_the_keys_not_the_order_of_the_embeddings(stage: Path, tmp_path: Path) -> None:
    expected = np.flatnonzero(kept(stage)).tolist()
    assert kept_rows(EmbeddingRows(stage / "emb"), stage / "first", ALONE).tolist() == expected
    copy = Path(shutil.copytree(stage / "emb", tmp_path / "copy"))
    metadata = sorted((copy / "metadata").iterdir())[0]
    table = pq.read_table(metadata)
    pq.write_table(table.take(list(range(len(table)))[::-1]), metadata)
    first = len(table)
    turned = sorted([first - 1 - row for row in expected if row < first] + [row for row in expected if row >= first])
    assert kept_rows(EmbeddingRows(copy), stage / "first", ALONE).tolist() == turned != expected


@pytest.mark.parametrize("name", ["balance", "cluster"])
def test_a_request_to_stop_ends_the_build_of_a_missing_index(stage: Path, tmp_path: Path, name: str) -> None:
    def stop(total: int) -> Progress:
        def progress(rows: int) -> None:
            raise Stopped(143)

        return progress

    index = stage / "shards" / "index"
    index.rename(tmp_path / "index")
    try:
        with pytest.raises(Stopped):
            if name == "balance":
                settings = BalanceSettings(target_keep=0.45, cells=7)
                balance(stage / "emb", None, tmp_path / "out", settings, ALONE, start_progress=stop)
            else:
                how, keep = KMeansSettings(k=5), stage / "first"
                cluster(stage / "emb", tmp_path / "out", how, ALONE, keep=keep, start_progress=stop)
        assert not (index / "index.json").exists()
    finally:
        shutil.rmtree(index)
        (tmp_path / "index").rename(index)


def test_kept_rows_are_found_after_a_move_of_the_tars(stage: Path, tmp_path: Path) -> None:
    keep, emb = (Path(shutil.copytree(stage / name, tmp_path / name)) for name in ("first", "emb"))

    def moved(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        meta["source"]["shards"] = str(tmp_path / f"old-{folder.name}")
        (folder / "meta.json").write_text(json.dumps(meta))

    moved(keep)
    assert kept_rows(EmbeddingRows(emb), keep, ALONE).tolist() == np.flatnonzero(kept(stage)).tolist()
    moved(emb)
    with pytest.raises(UserError, match=r"emb cannot be read from \S+/old-first or \S+/old-emb \(.*put a link to them"):
        kept_rows(EmbeddingRows(emb), keep, ALONE)
    (tmp_path / "old-emb").symlink_to(stage / "shards")
    assert kept_rows(EmbeddingRows(emb), keep, ALONE).tolist() == np.flatnonzero(kept(stage)).tolist()


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--cells", 0], "--cells is 0, expected"),
        (["--cells", 36], "--cells is 36, expected at most the 35 embedded samples: lower it"),
        (["--cells", 4, "--clusters", "given"], "not allowed with"),
        ([], "one of the arguments --clusters --cells is required"),
        (["--cells", 4, "--memory-gb", "nan"], "--memory-gb is nan"),
        (["--cells", 4, "--keep", "medoid", "--link", "greedy"], "--link is 'greedy', expected components"),
    ],
)
def test_argument_mistakes_are_one_line_and_leave_nothing(stage: Path, options: list[object], problem: str) -> None:
    where = ("--embeddings", stage / "emb", "--out", stage / "none")
    output = run("balance", *where, *options, "--threshold", 0.1, expect=2)
    assert problem in output and len(output.strip().splitlines()) == 1
    assert not (stage / "none").exists()


def test_a_memory_bound_that_is_too_small_is_named_and_a_larger_one_continues(stage: Path) -> None:
    small = run("balance", *cells_args(stage, "small"), "--memory-gb", 1e-6, expect=2)
    assert "memory bound is 1e-06 GB" in small and "raise --memory-gb" in small
    run("balance", *cells_args(stage, "small"), "--memory-gb", 1)
    assert results(stage / "small") == results(stage / "first")


def test_other_cells_or_kept_samples_are_refused(stage: Path, tmp_path: Path) -> None:
    assert "made with cells 7, this run has 5" in run("balance", *cells_args(stage, "first", cells=5), expect=2)
    other = shutil.copytree(stage / "first", tmp_path / "other")
    mask = np.load(other / "keep" / "00000.npy")
    np.save(other / "keep" / "00000.npy", ~mask)
    output = run("cluster", *then_args(stage, "then", "--keep", other), expect=2)
    assert "then was made with keep '" in output and "take another output directory" in output
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"shards_digest": "another"}))
    arguments = ["--embeddings", stage / "emb", "--out", stage / "none", "--k", 5, "--keep"]
    assert "was made from other shards than" in run("cluster", *arguments, other, expect=2)
    assert "was made by 'embed', expected one made by 'balance'" in run("cluster", *arguments, stage / "emb", expect=2)
    assert not (stage / "none").exists()


def test_more_clusters_than_kept_samples_are_refused(stage: Path) -> None:
    output = run("cluster", *then_args(stage, "many", "--k", 30), expect=2)
    assert "k is 30 but there are only" in output


def test_either_clusters_or_cells(stage: Path) -> None:
    for clusters, cells in ((stage / "given", 4), (None, None)):
        with pytest.raises(ValueError, match=r"expected either clusters or settings\.cells"):
            balance(stage / "emb", clusters, stage / "none", BalanceSettings(threshold=0.1, cells=cells), ALONE)
