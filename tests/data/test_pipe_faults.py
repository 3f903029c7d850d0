"""Commands that fail, and tars that are damaged, while they are read as a stream."""

from __future__ import annotations

import gzip
import os
import tarfile
import time
from pathlib import Path

import pytest
from harness import living
from pair_data import picture, put, write_shards
from piped_data import cat, numbers, open_sides, piped, write_stages
from shard_server import serve

from megacid.data.pipes import reading
from megacid.data.pipes.commands import find_pipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_shards(root / "shards")
    write_stages(root)
    tar = (root / "shards" / "00001.tar").read_bytes()
    with tarfile.open(root / "texts.tar", "w") as texts:
        put(texts, "a.txt", b"1")
        put(texts, "b.txt", b"2")
    with tarfile.open(root / "empty.tar", "w"):
        pass
    member_end = 512 + 512  # of the first picture
    for name, data in {
        "cut": tar[: len(tar) // 3],
        "cut-between": tar[:member_end],
        "gzip": gzip.compress(tar),
        "behind": tar + tar,
        "text": b"<html>404</html>",
    }.items():
        (root / f"{name}.tar").write_bytes(data)
    return root


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))


FAULTS = {
    "cat FOLDER/shards/00001.tar; exit 3": "its command ended with exit code 3",
    "head -c 3000 FOLDER/shards/00001.tar; exit 4": "its command ended with exit code 4",
    "cat FOLDER/missing.tar": "its command ended with exit code 1",
    "no-such-command x.tar": "its command ended with exit code 127",
    "true x.tar": "its command has written nothing",
    "cat FOLDER/cut.tar": "its command writes no whole tar (no end-of-archive mark: it was cut)",
    "cat FOLDER/cut-between.tar": "its command writes no whole tar (no end-of-archive mark: it was cut)",
    "cat FOLDER/behind.tar": "its command writes no whole tar (data behind the end-of-archive mark)",
    "cat FOLDER/gzip.tar": "its command writes gzip-compressed data, expected a tar that is not compressed: decompress",
    "cat FOLDER/text.tar": "its command writes no whole tar (truncated header)",
    "cat FOLDER/texts.tar": "none of its 2 samples has an image and a caption (.txt)",
    "cat FOLDER/empty.tar": "none of its 0 samples has an image and a caption (.txt)",
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_tar_that_cannot_be_read_is_named_and_one_is_tolerated(
    folder: Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = "pipe:" + command.replace("FOLDER", str(folder))
    good = [f"pipe:cat {folder}/shards/0000{number}.tar" for number in (0, 2)]
    stream = piped("::".join([*good, bad]), total_steps=3, buffer=2, caption="txt")
    seen = {number for batch in stream for number in numbers(batch)}
    assert stream.failed_tars == 1 and set(range(9)) <= seen and seen & set(range(16, 24))
    assert f"tar 1 of rank 0 that cannot be read: {find_pipes(bad)[0].name}.tar: {FAULTS[command]}" in caplog.text


def test_more_unreadable_tars_than_the_budget_end_the_run(folder: Path) -> None:
    spec = f"{cat(folder / 'shards')}::pipe:cat {folder}/cut.tar"
    last = list(piped(spec, total_steps=30))[-1]
    assert last.failure is not None and "2 of " in last.failure and "1 are allowed (error budget 0.001)" in last.failure
    assert "the last one cut.tar: its command writes no whole tar" in last.failure
    assert all(batch.failure is None for batch in piped(spec, total_steps=30, error_budget=0.1))


@pytest.mark.parametrize("workers", [0, 1])
def test_commands_that_all_fail_are_one_failure_in_seconds(folder: Path, workers: int) -> None:
    began = time.monotonic()
    batches = list(piped("pipe:cat nothing/{0..99}.tar", workers=workers, total_steps=2))
    assert [batch.failure for batch in batches] == [batches[0].failure] * 2 and time.monotonic() - began < 20
    assert batches[0].failure is not None
    assert "rank 0: 3 tars in a row cannot be read, the last one " in batches[0].failure


def test_a_command_that_fails_once_is_started_again_and_no_sample_is_read_twice(folder: Path, tmp_path: Path) -> None:
    tar, flag = folder / "shards" / "00001.tar", tmp_path / "flag"
    cut = 3 * 6 * 512 + 2 * 512  # between the picture and the caption of the fourth sample
    spec = f"pipe:test -e {flag} && exec cat {tar}; touch {flag}; head -c {cut} {tar}"
    stream = piped(spec, global_batch=7, micro_batch=7, total_steps=1, buffer=1)
    assert sorted(numbers(next(iter(stream)))) == list(range(9, 16)) and stream.failed_tars == 0
    assert stream._left_out == {0: {}}


def test_a_server_without_ranges_whose_answers_fail_first(folder: Path) -> None:
    with serve(folder / "shards") as server:
        server.faults = {"00000.tar": ["503"], "00001.tar": ["cut"], "00002.tar": "404"}
        stream = piped(f"pipe:curl -fs {server.url}/{{00000..00002}}.tar", total_steps=2, buffer=1)
        assert {number for batch in stream for number in numbers(batch)} == set(range(16))
        assert stream.failed_tars == 1 and server.gets["00002.tar"] == 2


def test_embeddings_of_other_samples_are_one_error(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(100):
            put(tar, f"other{number}.png", picture(number))
            put(tar, f"other{number}.txt", b"1")
    spec = f"pipe:cat {tmp_path}/00000.tar"
    for keep in (None, str(folder / "balance")):
        batch = next(iter(piped(spec, open_sides(folder, spec, keep=keep))))
        missing = folder / ("balance" if keep else "teacher")
        expected = f"251 of the last 251 samples cannot be used (251 without an embedding in {missing})"
        assert batch.failure is not None and batch.failure.startswith(f"rank 0: {expected}, expected at most 250 of")


def test_samples_that_break_a_rule_are_left_out_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, members in enumerate(("png txt", "png", "txt", "png txt", "png txt txt", "png txt", "png txt")):
            for ending in members.split():
                put(tar, f"k{number}.{ending}", picture(number) if ending == "png" else str(number).encode())
        put(tar, "k0.png", picture(0))
        put(tar, "k0.txt", b"0")
        put(tar, "blank.png", picture(0))
        put(tar, "blank.txt", b" nan ")
        put(tar, "long.png", picture(0))
        put(tar, "long.txt", b"1" * 2000)
        put(tar, "bad.png", b"no picture")
        put(tar, "bad.txt", b"9")
        put(tar, "k7.png", picture(7))
        put(tar, "k7.txt", b"7")
    stream = piped(f"pipe:cat {tmp_path}/0.tar", global_batch=6, micro_batch=6, total_steps=1, buffer=1)
    (batch,) = stream
    assert numbers(batch) == [0, 3, 4, 5, 6, 7]
    (left_out,) = stream._left_out.values()
    assert left_out == {
        "without a caption": 1, "without an image": 1, "duplicate key": 1, "blank caption": 1,
        "member of a repeated name": 1,
    }  # fmt: skip
    assert stream.bad_samples == 2  # `long` and `bad`


def test_a_command_that_hangs_is_a_failure_that_names_its_tar(folder: Path) -> None:
    spec = f"pipe:sleep 4; cat {folder}/shards/00001.tar"
    began = time.monotonic()
    batch = next(iter(piped(spec, workers=1, worker_timeout_s=0.5)))
    assert batch.failure is not None and time.monotonic() - began < 30
    assert "no batch from 1 loader workers for 0.5 s (data.worker_timeout_s)" in batch.failure
    assert "the workers were reading 00001.tar" in batch.failure


def test_commands_end_with_the_stream(tmp_path: Path) -> None:
    script = tmp_path / "endless-stream"
    script.write_text("import sys, tarfile, itertools, io\n"
                      "tar = tarfile.open(fileobj=sys.stdout.buffer, mode='w|')\n"
                      "for n in itertools.count():\n"
                      "    for ending, data in (('png', open(sys.argv[1], 'rb').read()), ('txt', b'7')):\n"
                      "        info = tarfile.TarInfo(f'k{n}.{ending}')\n"
                      "        info.size = len(data)\n"
                      "        tar.addfile(info, io.BytesIO(data))\n")  # fmt: skip
    (tmp_path / "picture.png").write_bytes(picture(7))
    spec = f"pipe:exec python3 {script} {tmp_path}/picture.png 0.tar"
    for workers in (0, 1):
        batches = iter(piped(spec, workers=workers))
        assert numbers(next(batches)) == [7] * 8
        batches.close()
        deadline = time.monotonic() + 10
        while living(os.path.basename(script)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert living(os.path.basename(script)) == {}
