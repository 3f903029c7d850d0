import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_data import (
    SIZES,
    keep_dir,
    label_dir,
    make_tar,
    same,
    save,
    stream,
    teacher_dir,
    transform,
    write_parquet,
    write_shards,
)
from PIL import Image

from megacid.data.index import ShardIndex, load_index
from megacid.data.loader import BUDGET_FLOOR, PairStream
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.data.workers import start_worker
from megacid.errors import UserError
from megacid.storage.metadata import write_meta

DAMAGED = {5, 17}  # global rows of the `damaged` fixture


def noisy(image: Image.Image) -> torch.Tensor:
    return transform(image) + torch.randint(256, (3, 4, 4), dtype=torch.uint8) + random.randrange(256)  # modulo 256


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards", damaged=DAMAGED)


def test_image_text_and_id_belong_together_and_an_epoch_is_complete(index: ShardIndex) -> None:
    seen = []
    for batch in stream(index):
        assert batch.image.dtype == torch.uint8 and batch.text.dtype == batch.sample_id.dtype == torch.int64
        assert torch.equal(batch.image[:, 0, 0, 0].long(), batch.sample_id)
        assert torch.equal(batch.text[:, 0], batch.sample_id)
        assert batch.replaced == () and batch.label is None and batch.teacher_image is None
        seen += batch.sample_id.tolist()
    assert len(seen) == 48 and sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


@pytest.mark.parametrize("world,micro,accumulation", [(2, 4, 1), (4, 2, 1), (1, 2, 4), (2, 2, 2)])
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(
    index: ShardIndex, world: int, micro: int, accumulation: int
) -> None:
    expected = [batch.sample_id.tolist() for batch in stream(index)]
    ranks = [
        list(stream(index, world=world, rank=rank, micro_batch=micro, accumulation=accumulation))
        for rank in range(world)
    ]
    for step in range(6):
        parts = [ranks[r][step * accumulation + m].sample_id for m in range(accumulation) for r in range(world)]
        assert torch.cat(parts).tolist() == expected[step]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_even_random_augmentation(damaged: ShardIndex, workers: int) -> None:
    alone = list(stream(damaged, transform=noisy, seeded_transform=True))
    others = list(stream(damaged, transform=noisy, seeded_transform=True, workers=workers))
    assert len(alone) == len(others) == 6
    assert all(same(a, b) and a.replaced == b.replaced for a, b in zip(alone, others))
    again = list(stream(damaged, transform=noisy, seeded_transform=True, world=2, rank=1, micro_batch=4))
    assert all(torch.equal(a.image[4:], b.image) for a, b in zip(alone, again))


def test_seeded_augmentation_differs_by_epoch_and_leaves_the_generators_alone(index: ShardIndex) -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    noise = {}
    for number, batch in enumerate(stream(index, transform=noisy, seeded_transform=True)):
        for sample, image in zip(batch.sample_id.tolist(), batch.image):
            noise[number // 3, sample] = image
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert not any(torch.equal(noise[0, s], noise[1, s]) for s in range(24))


def test_resuming_at_a_step_gives_the_same_batches(index: ShardIndex) -> None:
    whole = list(stream(index, micro_batch=4, accumulation=2))
    rest = stream(index, micro_batch=4, accumulation=2, start_step=4)
    assert len(rest) == 4
    assert all(same(a, b) for a, b in zip(whole[8:], rest, strict=True))
    assert len(stream(index, start_step=6)) == 0 and list(stream(index, start_step=9)) == []


def test_bad_samples_are_replaced_named_and_counted(damaged: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    batches = stream(damaged)
    clean_ids = {s for batch in batches for s in batch.sample_id.tolist()}
    assert clean_ids == set(range(24)) - DAMAGED
    assert batches.samples_read == 48
    assert 4 <= batches.bad_samples <= 6  # two in each of two epochs; a stand-in may be bad as well
    assert "00000/k5" in caplog.text and "00002/k17" in caplog.text
    again = stream(damaged, world=2, rank=0, micro_batch=4), stream(damaged, world=2, rank=1, micro_batch=4)
    for whole, left, right in zip(stream(damaged), *again):
        assert whole.sample_id.tolist() == left.sample_id.tolist() + right.sample_id.tolist()


def failures(batches: PairStream) -> list[str | None]:
    """The failure of every batch; all have the same shapes, and after the first failure they are dummies."""
    read = list(batches)
    assert len(read) == len(batches) == 6 and len({(b.image.shape, b.text.shape, b.label is None) for b in read}) == 1
    reasons = [batch.failure for batch in read]
    first = next(i for i, failure in enumerate(reasons) if failure)
    assert set(reasons[:first]) <= {None} and set(reasons[first:]) == {reasons[first]}
    for batch in read[first + 1 :]:
        assert not batch.image.any() and (batch.sample_id == -1).all()
    return reasons


def test_too_many_bad_samples_are_the_failure_of_their_batch(damaged: ShardIndex) -> None:
    (failure,) = set(failures(stream(damaged, error_budget=0.0))) - {None}
    assert re.search(r"[12] bad samples .* 0 are allowed", failure or "")
    reasons = failures(stream(damaged, error_budget=2 / BUDGET_FLOOR))
    assert reasons[0] is None and re.search(r"[34] bad samples .* the last one 0000\d/k\d+: ", reasons[-1] or "")
    # The batch that exceeds the budget is the real one.
    first = next(batch for batch in stream(damaged, error_budget=2 / BUDGET_FLOOR) if batch.failure)
    assert torch.equal(first.image[:, 0, 0, 0].long(), first.sample_id)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_decodable_is_a_failure_instead_of_a_loop(tmp_path: Path, workers: int) -> None:
    index = write_shards(tmp_path / "shards", damaged=set(range(24)))
    reasons = failures(stream(index, max_consecutive_errors=7, workers=workers))
    assert reasons[0] is not None and re.match(r"7 bad samples in a row, the last one 0000\d/k\d+: ", reasons[0])


def test_one_decodable_sample_among_all_is_found(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", damaged=set(range(24)) - {13})
    assert next(iter(stream(index, error_budget=1.0))).sample_id.tolist() == [13] * 8


def test_samples_without_text_take_no_part(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", without_text={0, 10, 23})
    batches = stream(index, global_batch=7, micro_batch=7, total_steps=3)
    assert sorted(s for b in batches for s in b.sample_id.tolist()) == sorted(set(range(24)) - {0, 10, 23})
    statistics = batches.statistics()
    assert statistics["samples"] == 24 and statistics["kept"] == 21 and statistics["without_text"] == 3


def test_keep_labels_and_teacher_follow_the_sample(tmp_path: Path, index: ShardIndex) -> None:
    n = 0
    for number, (name, size) in enumerate(SIZES.items()):
        rows = list(range(n, n + size))[::-1]
        keys = [f"k{row}" for row in rows]
        save(tmp_path / "k" / "keep" / f"{name}.npy", np.array([row % 2 == 0 for row in rows[::-1]]))
        write_parquet(
            tmp_path / "c" / "labels" / f"{name}.parquet", key=keys[1:], label=[row + 100 for row in rows[1:]]
        )
        emb = np.array([[row, 1] for row in rows], np.float16)
        save(tmp_path / "t" / "img_emb" / f"img_emb_{number:05d}.npy", emb)
        save(tmp_path / "t" / "text_emb" / f"text_emb_{number:05d}.npy", emb + np.float16(0.5))
        write_parquet(tmp_path / "t" / "metadata" / f"metadata_{number:05d}.parquet", image_path=keys)
        n += size
    write_meta(tmp_path / "k", "balance", {}, shards_digest=index.digest)
    write_meta(tmp_path / "c", "cluster", {}, shards_digest=index.digest, k=200)
    partitions = {name: number for number, name in enumerate(SIZES)}
    write_meta(tmp_path / "t", "embed", {}, shards_digest=index.digest, dim=2, partitions=partitions)
    tables = dict(
        keep=KeepTable(tmp_path / "k", index), labels=LabelTable(tmp_path / "c", index),
        teacher=TeacherTable(tmp_path / "t", index),
    )  # fmt: skip
    batches = stream(index, global_batch=4, micro_batch=4, total_steps=3, **tables)
    seen = []
    for batch in batches:
        ids = batch.sample_id
        # The last row of every shard (8, 15, 23) has no label.
        expected = torch.where((ids == 8) | (ids == 15) | (ids == 23), -1, ids + 100)
        assert torch.equal(batch.label, expected)
        assert torch.equal(batch.image[:, 0, 0, 0].long(), ids)
        assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.float16  # as stored
        assert torch.equal(batch.teacher_image[:, 0].long(), ids)
        assert torch.equal(batch.teacher_text, batch.teacher_image + 0.5)
        seen += ids.tolist()
    assert sorted(seen) == list(range(0, 24, 2))
    statistics = batches.statistics()
    assert statistics["kept"] == 12 and statistics["without_teacher"] == 0
    assert statistics["labelled_share"] == pytest.approx(11 / 12)


def test_a_sample_that_the_teacher_lacks_is_left_out_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    make_tar(tmp_path / "s" / "00000.tar", ["a", "b", "c"])
    make_tar(tmp_path / "s" / "00001.tar", ["d", "e"])
    index = load_index(tmp_path / "s")
    one_by_one = dict(global_batch=1, micro_batch=1, total_steps=5)
    batches = stream(
        index, **one_by_one, seed=0, teacher=TeacherTable(teacher_dir(tmp_path / "t", index.digest), index),
        labels=LabelTable(label_dir(tmp_path / "c", index.digest), index),
        keep=KeepTable(keep_dir(tmp_path / "k", index.digest), index), max_consecutive_errors=1,
    )  # fmt: skip
    assert batches.statistics()["without_teacher"] == 0  # b, which it lacks, is not kept
    without_keep = stream(index, **one_by_one, teacher=batches.sources[0].teacher)
    statistics = without_keep.statistics()
    assert (statistics["kept"], statistics["without_teacher"]) == (4, 1)
    assert "not a readable" in (next(iter(batches)).failure or "")


def teacher_without(folder: Path, index: ShardIndex, missing: set[int], **meta: object) -> TeacherTable:
    """Embeddings of all samples of `write_shards` but some; `meta`: more fields of meta.json."""
    row, empty = 0, []
    for number, (name, size) in enumerate(SIZES.items()):
        rows = [r for r in range(row, row + size) if r not in missing]
        row += size
        if not rows:
            empty.append(name)
            continue
        emb = np.array([[r, 1] for r in rows], np.float16)
        save(folder / "img_emb" / f"img_emb_{number:05d}.npy", emb)
        save(folder / "text_emb" / f"text_emb_{number:05d}.npy", emb)
        write_parquet(folder / "metadata" / f"metadata_{number:05d}.parquet", image_path=[f"k{r}" for r in rows])
    partitions = {name: number for number, name in enumerate(SIZES)}
    write_meta(folder, "embed", {}, shards_digest=index.digest, dim=2, partitions=partitions, empty=empty, **meta)
    return TeacherTable(folder, index)


def skipped_by_shard(missing: set[int]) -> dict[str, int]:
    counts = {"00000": len(missing & {*range(9)}), "00001": len(missing & {*range(9, 16)})}
    return {name: count for name, count in (counts | {"00002": len(missing & {*range(16, 24)})}).items() if count}


@pytest.mark.parametrize("recorded", [True, False], ids=["in meta.json", "not recorded"])
@pytest.mark.parametrize("also", ["nothing", "keep", "without text"])
@pytest.mark.parametrize("missing", [{3}, {0, 8, 9, 23}, {*range(9, 16)}, {*range(12)}], ids=len)
def test_samples_that_embed_skipped_are_not_charged_to_the_error_budget(
    tmp_path: Path, missing: set[int], also: str, recorded: bool
) -> None:
    usable, options = {*range(24)} - missing, {}
    without_text = {1, 22} if also == "without text" else set()
    index = write_shards(tmp_path / "shards", damaged=missing, without_text=without_text)
    meta = {"failures_by_shard": skipped_by_shard(missing)} if recorded else {}
    usable, lacking = usable - without_text, missing - without_text
    if also == "keep":
        usable, lacking = ({row for row in rows if row % 2} for rows in (usable, lacking))
        for name, rows in zip(SIZES, (range(9), range(9, 16), range(16, 24))):
            save(tmp_path / "k" / "keep" / f"{name}.npy", np.array([row % 2 == 1 for row in rows]))
        write_meta(tmp_path / "k", "balance", {}, shards_digest=index.digest)
        options["keep"] = KeepTable(tmp_path / "k", index)
    teacher = teacher_without(tmp_path / "t", index, missing, **meta)
    one_epoch = dict(global_batch=1, micro_batch=1, total_steps=len(usable))
    batches = stream(index, **one_epoch, error_budget=0.0, teacher=teacher, **options)
    seen = list(batches)
    assert sorted(s for batch in seen for s in batch.sample_id.tolist()) == sorted(usable)
    assert not any(batch.failure or batch.replaced for batch in seen)
    statistics = batches.statistics()
    assert (statistics["kept"], statistics["without_teacher"]) == (len(usable), len(lacking))


def test_damage_met_while_training_is_still_charged_to_the_error_budget(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", damaged={5})  # became unreadable after it was embedded
    teacher = teacher_without(tmp_path / "t", index, {3, 4}, failures_by_shard={"00000": 2})
    (failure,) = set(failures(stream(index, error_budget=0.0, teacher=teacher))) - {None}
    assert re.search(r"bad samples .* 00000/k5: ", failure or "")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"00000": 1}, "counts 1 samples of 00000.tar without an embedding, its metadata 2: run tools/embed.py again"),
        ({}, "counts 0 samples of 00000.tar without an embedding, its metadata 2: run tools/embed.py again"),
    ],
)
def test_a_count_of_skipped_samples_that_is_wrong_is_an_error_at_the_start(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    index = write_shards(tmp_path / "shards")
    teacher = teacher_without(tmp_path / "t", index, {3, 4}, failures_by_shard=counts)
    with pytest.raises(UserError, match=message):
        stream(index, error_budget=0.0, teacher=teacher)


def failures_of(batches: PairStream) -> str:
    return "; ".join(batch.failure for batch in batches if batch.failure)


@pytest.mark.parametrize("counts", [["00000"], {"00000": "1"}, {"00000": -1}])
def test_counts_of_skipped_samples_are_checked(tmp_path: Path, index: ShardIndex, counts: object) -> None:
    with pytest.raises(UserError, match=r"has failures_by_shard .*, expected a number for every shard: run"):
        teacher_without(tmp_path / "t", index, set(), failures_by_shard=counts)


def test_too_few_usable_samples_name_what_is_missing(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", without_text={0, 1, 2, 3})
    counts = {"00000": 5 + 4, "00001": 7, "00002": 6}
    teacher = teacher_without(tmp_path / "t", index, {*range(22)}, failures_by_shard=counts)
    with pytest.raises(
        UserError, match=r"2 usable samples of 24 \(4 without a caption, 18 without a teacher embedding\), expected"
    ):
        stream(index, teacher=teacher)


def test_sizes_that_do_not_fit_are_user_errors(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="global batch is 8"):
        stream(index, micro_batch=3)
    with pytest.raises(UserError, match="24 usable samples of 24, expected at least one global batch of 25"):
        stream(index, global_batch=25, micro_batch=25)
    with pytest.raises(UserError, match="rank is 1"):
        stream(index, rank=1)


def test_batch_moves_and_keeps_what_is_none(index: ShardIndex) -> None:
    batch = next(iter(stream(index))).to("meta")
    assert batch.image.is_meta and batch.sample_id.is_meta and batch.label is None and batch.replaced == ()


def test_workers_do_not_run_the_trainers_signal_handlers() -> None:
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(name) for name in names]
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        start_worker(os.getppid(), 0)
        assert [signal.getsignal(name) for name in names] == [signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN]
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler)
