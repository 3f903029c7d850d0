"""Several weighted sources in one stream: which samples they give, how they are joined, and what they must share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_data import same, save, source, stream, stream_of, write_parquet, write_shards

from megacid.data.batch import Batch
from megacid.data.index import ShardIndex
from megacid.data.loader import PairStream
from megacid.data.side_tables import LabelTable
from megacid.data.sources import check_sources_agree
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError
from megacid.storage.metadata import write_meta

SMALL = {"00000": 6, "00001": 5}
LARGE, BOTH = 24, 35  # samples of the large source, whose ids come first, and of both


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("large") / "shards")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("small") / "shards", sizes=SMALL)


def mixed(large: ShardIndex, small: ShardIndex, **changes: Any) -> PairStream:
    """12 steps of 8, of which the small source gives 2: two epochs of its 11 samples and 2 more."""
    return stream_of(source(large, "large", 3), source(small, "small", 1), **{"total_steps": 12, **changes})


def ids(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch.sample_id.tolist()]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) > 0 and all(map(same, a, b))


def test_every_batch_has_the_shares_and_a_small_source_begins_again(large: ShardIndex, small: ShardIndex) -> None:
    batches = list(mixed(large, small))
    for batch in batches:
        own_row = torch.where(batch.sample_id < LARGE, batch.sample_id, batch.sample_id - LARGE)
        assert torch.equal(batch.image[:, 0, 0, 0].long(), own_row) and torch.equal(batch.text[:, 0], own_row)
        assert int((batch.sample_id >= LARGE).sum()) == 2
    seen = ids(batches)
    of_large, of_small = [i for i in seen if i < LARGE], [i for i in seen if i >= LARGE]
    for epoch in range(3):
        assert sorted(of_large[24 * epoch : 24 * (epoch + 1)]) == list(range(LARGE))
    assert sorted(of_small[:11]) == sorted(of_small[11:22]) == list(range(LARGE, BOTH))
    assert of_small[:11] != of_small[11:22] and len(of_small) == 24


@pytest.mark.parametrize("world,micro,accumulation,workers", [(2, 4, 1, 0), (4, 1, 2, 0), (1, 4, 2, 2)])
def test_global_batches_do_not_depend_on_ranks_micro_batches_or_workers(
    large: ShardIndex, small: ShardIndex, world: int, micro: int, accumulation: int, workers: int
) -> None:
    expected = [batch.sample_id.tolist() for batch in mixed(large, small)]
    how = dict(world=world, micro_batch=micro, accumulation=accumulation, workers=workers)
    ranks = [list(mixed(large, small, rank=rank, **how)) for rank in range(world)]
    for step in range(12):
        parts = [ranks[r][step * accumulation + m].sample_id for m in range(accumulation) for r in range(world)]
        assert torch.cat(parts).tolist() == expected[step]


def test_resuming_at_any_step_gives_the_same_batches(large: ShardIndex, small: ShardIndex) -> None:
    whole = list(mixed(large, small))
    for step in range(12):
        assert equal(list(mixed(large, small, start_step=step)), whole[step:])


def test_one_source_with_a_name_and_any_weight_is_the_stream_of_plain_shards(large: ShardIndex) -> None:
    assert equal(list(stream_of(source(large, "name", 0.3))), list(stream(large)))


def test_shards_that_are_listed_twice_give_other_samples_at_a_time(large: ShardIndex) -> None:
    seen = ids(stream_of(source(large, "a"), source(large, "b")))
    first, second = [i for i in seen if i < LARGE], [i - LARGE for i in seen if i >= LARGE]
    assert sorted(first) == sorted(second) == list(range(24)) and first != second


def test_a_bad_sample_is_named_with_its_source_and_replaced_by_another_of_it(
    tmp_path: Path, large: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = write_shards(tmp_path / "shards", sizes=SMALL, damaged={3})
    batches = mixed(large, damaged)
    read = list(batches)
    assert "small/00000/k3: " in caplog.text and "large/" not in caplog.text
    assert batches.bad_samples == len([reason for batch in read for reason in batch.replaced]) > 0
    assert all(int((batch.sample_id >= LARGE).sum()) == 2 for batch in read) and LARGE + 3 not in ids(read)
    pairs = batches._pairs
    pairs._note(1, 1, 4)
    assert pairs.being_read() == "small/00001/k10"


def test_a_sample_id_is_shown_as_source_tar_and_key(large: ShardIndex, small: ShardIndex) -> None:
    batches = mixed(large, small)
    assert [batches.name_of(i) for i in (0, 23, 24, 30)] == [
        "large/00000/k0",
        "large/00002/k23",
        "small/00000/k0",
        "small/00001/k6",
    ]
    assert batches.name_of(-1) == "-1" and stream(large).name_of(23) == "23"


def test_shares_and_epochs_are_reported_by_source(large: ShardIndex, small: ShardIndex) -> None:
    batches = mixed(large, small)
    assert batches.progress(96) == {
        "train/large/share": 0.75, "train/large/epoch": 3.0, "train/small/share": 0.25, "train/small/epoch": 24 / 11,
    }  # fmt: skip
    statistics = batches.statistics()
    assert (statistics["kept"], statistics["small/kept"], statistics["small/share"]) == (35, 11, 0.25)
    assert stream(large).progress(96) == {} and stream(large).statistics()["kept"] == 24


def test_a_source_smaller_than_its_share_of_a_batch_is_refused(large: ShardIndex, small: ShardIndex) -> None:
    with pytest.raises(UserError, match="11 usable samples of 11, expected at least 12, the share of source small of "):
        stream_of(source(large, "large"), source(small, "small"), global_batch=24, micro_batch=24)


# ---- side tables ---------------------------------------------------------------------------------------------------


def side_tables(folder: Path, index: ShardIndex, first: int, dtype: Any = np.float16) -> dict[str, Any]:
    """Embeddings [first + row, 1] and labels first + row."""
    for number, (name, start, stop) in enumerate(zip(index.names, index.starts, index.starts[1:])):
        rows = np.arange(start, stop)
        keys = [f"k{row}" for row in rows]
        emb = np.stack([first + rows, np.ones(len(rows))], axis=1).astype(dtype)
        for kind in ("img_emb", "text_emb"):
            save(folder / "t" / kind / f"{kind}_{number:05d}.npy", emb)
        write_parquet(folder / "t" / "metadata" / f"metadata_{number:05d}.parquet", image_path=keys)
        write_parquet(folder / "c" / "labels" / f"{name}.parquet", key=keys, label=(first + rows).tolist())
    partitions = {name: number for number, name in enumerate(index.names)}
    teacher = {"model": "m", "pretrained": "p", "weights": "w", "precision": "fp32", "dim": 2}
    teacher |= {"made_for": f"{folder} {np.dtype(dtype)}"}  # no joined table of another test is this one's
    write_meta(folder / "t", "embed", {}, shards_digest=index.digest, partitions=partitions, **teacher)
    save(folder / "c" / "centroids.npy", np.zeros((BOTH, 2), np.float32))
    write_meta(folder / "c", "cluster", {}, shards_digest=index.digest, k=BOTH)
    return opened(folder, index)


def opened(folder: Path, index: ShardIndex) -> dict[str, Any]:
    return {"teacher": TeacherTable(folder / "t", index), "labels": LabelTable(folder / "c", index)}


def change_meta(folder: Path, **fields: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | fields))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_embeddings_and_labels_are_those_of_the_sample_whichever_source_it_is_of(
    tmp_path: Path, large: ShardIndex, small: ShardIndex, dtype: Any
) -> None:
    sources = [
        source(large, "large", 3, **side_tables(tmp_path / "large", large, 0)),
        source(small, "small", 1, **side_tables(tmp_path / "small", small, LARGE, dtype)),
    ]
    check_sources_agree({one.name: one.joined.sources for one in sources})
    batches = list(stream_of(*sources))
    for batch in batches:
        assert torch.equal(batch.label, batch.sample_id) and torch.equal(batch.teacher_image[:, 0].long(), batch.label)
        assert torch.equal(batch.teacher_text, batch.teacher_image)
        # Ranks exchange embeddings: they have one dtype, whatever sources a micro-batch has.
        assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    assert max(ids(batches)) >= LARGE


OTHER_STAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "another k": ("c", {"k": 50}, r"labels of other clusters than .*large/c of source large \(k is 50, expected 35\)"),
    "other centroids": (
        "c",
        {},
        r"\(centroids.npy has other values\): run tools/cluster.py --assign-only .*large/c on",
    ),
    "no centroids": ("c", {}, r"small/c/centroids.npy cannot be read \(No such file or directory\), expected"),
    "another model": (
        "t",
        {"model": "n"},
        r"another teacher than .*large/t of source large \(model 'n', expected 'm'\)",
    ),
    "other weights": ("t", {"weights": "v"}, r"\(weights 'v', expected 'w'\): run tools/embed.py with one teacher for"),
    "views": ("t", {}, r"small/t has 2 views, expected those of .*large/t, no views"),
}


@pytest.mark.parametrize("case", OTHER_STAGE)
def test_another_clustering_or_teacher_is_one_error_that_names_both(
    tmp_path: Path, large: ShardIndex, small: ShardIndex, case: str
) -> None:
    folder, fields, message = OTHER_STAGE[case]
    first = source(large, **side_tables(tmp_path / "large", large, 0)).joined.sources
    side_tables(tmp_path / "small", small, LARGE)
    change_meta(tmp_path / "small" / folder, **fields)
    centroids = tmp_path / "small" / "c" / "centroids.npy"
    if case == "other centroids":
        save(centroids, np.ones((BOTH, 2), np.float32))
    elif case == "no centroids":
        centroids.unlink()
    second = replace(first, index=small, **opened(tmp_path / "small", small))
    if case == "views":
        second.teacher.views = "2 views"
    with pytest.raises(UserError, match=message) as error:
        check_sources_agree({"large": first, "small": second})
    assert "\n" not in str(error.value)


def test_adopted_embeddings_of_one_model_agree(tmp_path: Path, large: ShardIndex, small: ShardIndex) -> None:
    """Their weights are not known: what is recorded is a digest of the embeddings."""
    tables = {}
    for name, index in (("large", large), ("small", small)):
        side_tables(tmp_path / name, index, 0)
        change_meta(tmp_path / name / "t", weights=f"adopted:{name}")
        tables[name] = source(index, **opened(tmp_path / name, index)).joined.sources
    check_sources_agree(tables)
