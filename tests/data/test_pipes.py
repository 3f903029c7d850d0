"""Streams from commands that write tars: order, joins, resuming."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_data import picture, put, same, save, write_parquet, write_shards
from PIL import Image
from piped_data import NONE, SKIPPED, cat, numbers, open_sides, piped, write_stages

from megacid.config.load import load_run
from megacid.data.augmentation import Views
from megacid.data.pipes.commands import StreamPosition, TarOrder, find_pipes
from megacid.data.pipes.side_files import SideFiles
from megacid.errors import UserError
from megacid.storage.metadata import write_meta


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipes")
    write_shards(root / "shards")
    write_stages(root)
    return root


@pytest.mark.parametrize(("tars", "readers"), [(7, 1), (7, 3), (4, 8), (12, 4)])
def test_every_tar_of_an_epoch_is_read_by_one_reader_and_no_reader_reads_more_than_another(
    tars: int, readers: int
) -> None:
    order, epochs = TarOrder(tars, seed=5), 8
    read = [[order.at(turn) for turn in range(reader, epochs * tars, readers)] for reader in range(readers)]
    assert sorted(itertools.chain(*read)) == [(epoch, tar) for epoch in range(epochs) for tar in range(tars)]
    assert max(map(len, read)) - min(map(len, read)) <= 1
    first, second = ([order.at(turn)[1] for turn in range(e * tars, e * tars + tars)] for e in (0, 1))
    assert first != second and [TarOrder(tars, seed=6).at(turn)[1] for turn in range(tars)] != first


def test_image_and_caption_belong_together_and_every_sample_is_read_once_per_epoch(folder: Path) -> None:
    batches = list(piped(cat(folder / "shards")))
    seen = [number for batch in batches for number in numbers(batch)]
    assert len(seen) == 48
    # The buffer of 5 carries samples over the end of an epoch.
    assert all(1 <= seen.count(number) <= 3 for number in range(24))
    assert sorted(seen[:19]) == sorted(set(seen[:19])) and seen[:8] != sorted(seen[:8])
    assert len(set(itertools.chain(*(batch.sample_id.tolist() for batch in batches)))) == 24


def test_embeddings_labels_and_masks_are_joined_by_key(folder: Path) -> None:
    spec = cat(folder / "shards")
    for keep in (None, str(folder / "balance")):
        used = set()
        stream = piped(spec, open_sides(folder, spec, keep=keep))
        for batch in stream:
            ids = numbers(batch)
            used |= set(ids)
            assert batch.label is not None and batch.label.tolist() == [number + 100 for number in ids]
            assert batch.teacher_image is not None and batch.teacher_text is not None
            assert batch.teacher_image.dtype == torch.float16
            assert batch.teacher_image.tolist() == [[number, 1] for number in ids]
            assert batch.teacher_text.tolist() == [[number, 2] for number in ids]
        assert used <= (set(range(0, 24, 2)) if keep else set(range(24)) - {SKIPPED})
        (left_out,) = stream._left_out.values()
        assert left_out[f"without an embedding in {folder / ('balance' if keep else 'teacher')}"] >= 1
        assert (left_out.get("not kept by data.keep", 0) > 0) is (keep is not None)


def test_dummies_have_the_shapes_of_batches(folder: Path) -> None:
    spec = cat(folder / "shards")
    stream = piped(spec, open_sides(folder, spec))
    batch, dummy = next(iter(stream)), stream._dummy("reason")
    for name in ("image", "text", "label", "teacher_image", "teacher_text", "sample_id"):
        assert getattr(batch, name).shape == getattr(dummy, name).shape
        assert getattr(batch, name).dtype == getattr(dummy, name).dtype


def test_batches_follow_from_seed_ranks_and_readers_and_ranks_share_the_tars(folder: Path) -> None:
    spec = cat(folder / "shards")
    here, in_a_process = list(piped(spec)), list(piped(spec, workers=1))
    assert all(map(same, here, in_a_process)) and not same(here[0], next(iter(piped(spec, seed=2))))
    plan = dict(global_batch=8, micro_batch=4, world=2, total_steps=3, workers=2, buffer=2)
    ranks = [list(piped(spec, rank=rank, **plan)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [3, 3] and all(map(same, ranks[1], piped(spec, rank=1, **plan)))
    assert [batch.progress.reader for batch in ranks[0] if batch.progress] == [0, 1, 0]
    # The first batches of readers 0 to 2 are of the three tars of the first epoch.
    read = [set(numbers(batch)) for batch in (*ranks[0][:2], ranks[1][0])]
    assert len(set.union(*read)) == 12


def test_a_resumed_stream_begins_with_the_next_tar_of_every_reader(folder: Path) -> None:
    spec = cat(folder / "shards")
    tars = find_pipes(spec)
    position = StreamPosition(tars, 0, 1, 1)
    batches = iter(piped(spec))
    for _ in range(2):
        position.advance(next(batches))
    begun = position.next_turns[0]
    assert begun in (2, 3) and position.epoch == begun / 3
    state = json.loads(json.dumps(position.state([position.next_turns])))
    resumed = StreamPosition(tars, 0, 1, 1)
    assert resumed.load_state(state) == "every reader continues at its next tar"
    after = [list(piped(spec, turns=resumed.next_turns, start_step=2)) for _ in range(2)]
    assert len(after[0]) == 4 and all(map(same, *after))
    order = TarOrder(3, seed=1)
    allowed = [set(range(9)), set(range(9, 16)), set(range(16, 24))]
    (next_tar, following) = (order.at(turn)[1] for turn in (begun, begun + 1))
    assert set(numbers(after[0][0])) <= allowed[next_tar] | allowed[following]


def test_other_numbers_of_readers_begin_where_no_reader_had_begun() -> None:
    tars = find_pipes("pipe:cat {0..9}.tar")
    state = StreamPosition(tars, 0, 2, 2).state([[8, 5], [6, 11]])
    for world, workers in ((1, 1), (1, 3), (3, 1), (4, 2)):
        begin = []
        for rank in range(world):
            position = StreamPosition(tars, rank, world, workers)
            assert "continue at tar 11 of the sequence, which 4 readers had reached" in position.load_state(state)
            begin += position.next_turns
        readers = world * workers
        assert [turn % readers for turn in begin] == list(range(readers))
        assert sorted(begin) == list(range(11, 11 + readers))


@pytest.mark.parametrize("state", [None, [], {}, {"tars": "other", "next_turns": [3]}, {"next_turns": [1]}])
def test_a_checkpoint_of_other_data_begins_the_sequence_again(state: object) -> None:
    position = StreamPosition(find_pipes("pipe:cat {0..9}.tar"), 1, 2, 1)
    assert "read from the beginning" in position.load_state(state) and position.next_turns == [1]
    broken = StreamPosition(find_pipes("pipe:cat {0..9}.tar"), 1, 2, 1).state([["x"], [-1]])
    assert "read from the beginning" in position.load_state(broken)


def test_a_view_and_a_caption_come_with_their_own_embeddings(tmp_path: Path) -> None:
    """Embeddings are [number, view] and [number, caption]; caption c of a sample is the text "10 * number + c"."""
    views, teacher, samples = Views(3, seed=7, crops="these"), tmp_path / "teacher", range(1, 9)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in samples:
            put(tar, f"k{number}.png", picture(number))
            texts = [str(10 * number + c) for c in range(1 + number % 4)]
            put(tar, f"k{number}.json", json.dumps({"captions": texts if number < 8 else ["80", "81"]}).encode())
    counts = [1 + number % 4 for number in samples]  # sample 8 has another number now: it is bad
    for kind, rows in (
        ("img", [[number, 9] for number in samples]),
        ("text", [[number, 9] for number in samples]),
        ("view", [[number, view] for number in samples for view in range(3)]),
        ("caption", [[number, c] for number, count in zip(samples, counts) for c in range(count)]),
    ):
        save(teacher / f"{kind}_emb" / f"{kind}_emb_00000.npy", np.array(rows, np.float16))
    keys = [f"k{number}" for number in samples]
    write_parquet(teacher / "metadata" / "metadata_00000.parquet", image_path=keys, captions=counts)
    facts = {"dim": 2, "partitions": {"0": 0}, "caption": "json:captions.*", **views.setting}
    write_meta(teacher, "embed", {}, shards_digest="x", **facts)
    spec = f"pipe:cat {tmp_path}/0.tar"
    sides = SideFiles.open(find_pipes(spec), "json:captions.*", [str(teacher)], None, 1, None)

    def seed_and_number(image: Image.Image) -> torch.Tensor:
        return torch.tensor([np.array(image)[0, 0, 0], torch.random.initial_seed() % 251], dtype=torch.uint8)

    stream = piped(spec, sides, caption="json:captions.*", transform=seed_and_number, seeded_transform=True, seed=3)
    seen = set()
    for batch in stream:
        assert batch.teacher_image is not None and batch.teacher_text is not None
        images, texts = batch.teacher_image.int().tolist(), batch.teacher_text.int().tolist()
        for (shown, seed), text, image, caption in zip(batch.image.tolist(), batch.text[:, 0].tolist(), images, texts):
            assert image[0] == shown and seed == views.seed_of(f"k{shown}", image[1]) % 251
            assert caption[0] == shown and text == 10 * shown + caption[1]
            seen.add((shown, image[1], caption[1]))
    assert (
        len(seen) > 20
        and {view for _, view, _ in seen} == {0, 1, 2}
        and {number for number, _, _ in seen} == {*range(1, 8)}
    )
    assert stream.bad_samples >= 5


NAMES = {
    "pipe:aws s3 cp s3://bucket/laion/00012.tar -": "00012",
    "pipe:curl -fsL 'https://example.org/a/b-1.tar?token=$T'": "b-1",
    "pipe:zcat x/00003.tar.gz": None,
    "pipe:cat 00001.tar | tee copy/00001.tar": "00001",
    "pipe:cat 1.tar 2.tar": None,
    "pipe:fetch 17": None,
}


@pytest.mark.parametrize("url", NAMES)
def test_a_tar_is_named_by_the_only_tar_of_its_command(url: str) -> None:
    assert find_pipes(url)[0].name == NAMES[url]


def test_a_run_file_has_commands_as_they_are_or_paths_but_not_both() -> None:
    digits = Path(__file__).resolve().parents[2] / "configs" / "digits_cpu.json"
    command = "pipe:curl -H 'Authorization: $TOKEN' https://example.org/{0..9}.tar"
    both = json.dumps([command, "pipe:cat ~/10.tar"])
    assert load_run(digits, [f"data.shards={both}"], world=1).megacid.data.shards == f"{command}::pipe:cat ~/10.tar"
    with pytest.raises(UserError, match=r"data.shards.* expected pipe:COMMAND in every part, since tars that are"):
        load_run(digits, [f"data.shards={command}::shards"], world=1)
    with pytest.raises(UserError, match="variables are not expanded"):
        load_run(digits, [f"data.shards=shards::{command}"], world=1)


def test_specs_and_stages_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    spec = cat(folder / "shards")
    for wrong, message in (
        (f"{spec}::{folder}/shards", "expected pipe:COMMAND in every part"),
        ("pipe:cat a/1.tar::pipe:cat b/1.tar", "commands 0 and 1 of data.shards read a tar of the same name, 1.tar"),
        ("pipe:cat {0..9999999}.tar", "more than 1,000,000 tars"),
    ):
        with pytest.raises(UserError, match=message):
            find_pipes(wrong)
    write_stages(tmp_path, digest="others")
    for of, changes, message in (
        ("pipe:fetch 17", {}, "command 0 of data.shards names no .tar, or several"),
        ("pipe:cat {00000..00003}.tar", {}, "no embeddings of 1 shards .00003."),
        ("pipe:cat {00000..00003}.tar", {"teachers": ()}, "has no files of 1 of the 4 tars of data.shards .00003."),
        (spec, {"caption": "json:caption"}, "was made from the captions in 'txt', this run reads them from 'json:capt"),
        (spec, {"labels": str(tmp_path / "labels")}, "was made from other shards .digest others. than"),
        (spec, {"labels": str(folder / "teacher")}, "was made by 'embed', expected one made by 'cluster'"),
    ):
        with pytest.raises(UserError, match=message):
            open_sides(folder, of, **changes)
    (tmp_path / "teacher" / "meta.json").unlink()
    with pytest.raises(UserError, match=r"which have the keys of its samples, and they are not there"):
        open_sides(tmp_path, spec, teachers=(), labels=None)
    assert open_sides(folder, spec, teachers=(), labels=None, keep=None) == NONE
