"""Random shards, most of them broken: an error is a UserError of one line or a counted sample, never a traceback."""

from __future__ import annotations

import io
import json
import random
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_data import BOMBS
from pair_data import encoded, gradient, picture, stream, transform
from PIL import Image

from megacid.data.captions import is_blank
from megacid.data.decode import BadSample, decode_image
from megacid.data.index import ShardIndex, ShardReader, load_index
from megacid.data.index_verify import verify_index
from megacid.errors import UserError
from megacid.offline.embed.input import Pairs

IMAGES = [
    picture(1), picture(2), encoded(gradient(), "JPEG"), encoded(gradient(), "WEBP"), encoded(gradient(), "GIF"),
    encoded(gradient(), "TIFF"), encoded(gradient(1, 300), "PNG"), encoded(Image.new("I;16", (3, 3)), "PNG"),
    encoded(gradient(), "JPEG")[:200], picture(3)[:40], b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff",
]  # fmt: skip
CAPTIONS = [
    b"a red square", b"a", b"", b" \n", b"nan", b"None", b"null", "crème".encode(), "crème".encode("latin1"),
    "日本".encode("utf-16"), "日本".encode("shift-jis"), b"\xef\xbb\xbfmark", b"\xff\xfe", b"x" * 2000, b"y " * 40_000,
    b"\0\0", "\u202e\u2028".encode(), b"[1]", b"\xed\xa0\x80", b"\x1b[2J",
]  # fmt: skip
KEYS = [
    *(f"k{i}" for i in range(12)), "a.b", "a.1.2", "d/a", "x" * 120, "y" * 300, "日本", "a b", "-rf", "..", "../u",
    "/abs", "", "new\nline", "\x1b[2J", "nul\0nul", "\udcff", "a'\"", "%s{0}", "k1/", "d.e/f", "._k1",
]  # fmt: skip
ENDINGS = [
    "jpg", "png", "PNG", "jpeg", "webp", "gif", "tif", "heic", "txt", "TXT", "json", "cls", "caption", "seg.png",
    "en.txt", "b.jpg", "npy", "", "tar", "pyd", "mp4",
]  # fmt: skip
SOURCES = ["txt", "json:caption", "json:a.0.b", "json:0", "caption", "en.txt", "npy"]
PAX_NAMES = ["comment", "size", "path", "GNU.sparse.map", "SCHILY.xattr.a", "mtime", "é"]
PAX_VALUES = ["1", "0", "-1", "9" * 23, "x", "../../x.jpg", "k1.jpg", "\n", "é" * 500]
TYPES = [tarfile.REGTYPE] * 40 + [
    tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.AREGTYPE,
    tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"V", b"\xff",
]  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """A random json value, often a caption under a name that is looked for."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        text = rng.choice(CAPTIONS).decode("utf-8", rng.choice(["replace", "surrogateescape"]))
        return rng.choice([text, text, text, None, True, 7, -1.5, float("nan"), float("inf"), 10**30, ""])
    if kind < 8:
        names = ["caption", "a", "b", "0", "a.0.b", "uid", "url", "é", ""]
        return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(4))]


def content(rng: random.Random, ending: str, odd: float) -> bytes:
    """odd: probability of content that is no image, no caption, or of another kind."""
    kind = ending.lower().rpartition(".")[2] if rng.random() >= odd / 10 else rng.choice(ENDINGS)
    fine = rng.random() >= odd
    if kind == "json":
        data = json.dumps({"caption": "a red square", "a": [{"b": "a"}]} if fine else value(rng)).encode()
        return data if fine or rng.random() < 0.5 else rng.choice([*BOMBS.values(), data[:-1], b"\xff" + data])
    if kind == "cls":
        return b"7" if fine else rng.choice([b"-1", b"", b"x", b"\xff", b"9" * 300])
    texts = kind in ("txt", "caption", "npy")
    return (b"a red square" if texts else IMAGES[0]) if fine else rng.choice(CAPTIONS if texts else IMAGES)


def members(rng: random.Random, caption: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Mostly whole samples with neighbouring members, then perhaps shuffled, doubled or thinned out."""
    found = []
    odd = rng.choice([0.0, 0.02, 0.1, 0.5])
    for number in range(rng.randrange(30)):
        key = rng.choice(KEYS) if rng.random() < odd else f"s{number}"
        kinds = ["jpg", caption, *(["json"] if rng.random() < 0.3 else [])]
        for ending in rng.sample(ENDINGS, rng.randrange(5)) if rng.random() < odd else dict.fromkeys(kinds):
            info = tarfile.TarInfo(f"{key}.{ending}" if rng.random() >= odd / 5 else key)
            data = content(rng, ending, odd)
            info.size = len(data)
            if rng.random() < odd:
                info.type = rng.choice(TYPES)
                info.linkname = "k1.jpg" if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            if rng.random() < odd / 5:
                info.pax_headers = {rng.choice(PAX_NAMES): rng.choice(PAX_VALUES)}
            found.append((info, data))
    if found and rng.random() < 0.1:
        rng.shuffle(found)
    if found and rng.random() < 0.1:
        found += rng.sample(found, rng.randrange(len(found)))
    return [one for one in found if rng.random() >= odd / 10]


def tar_bytes(rng: random.Random, caption: str) -> bytes:
    buffer = io.BytesIO()
    form = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members(rng, caption):
            try:
                tar.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # a name that this format cannot hold
                continue
    return buffer.getvalue()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The tar, in 1 of 4 cases with a fault."""
    at, block = rng.randrange(len(data)), 512 * rng.randrange(len(data) // 512)
    fault = rng.randrange(40)
    if fault == 0:
        return data[:at]
    if fault == 1:
        return data[:block]
    if fault == 2:
        return data[:block] + bytes(512) + data[block + 512 :]
    if fault == 3:
        return data[:block] + data[block + 512 :]
    if fault == 4:
        return data + data[: rng.randrange(3000)]
    if fault == 5:
        return bytes(rng.randrange(2000)) + data
    if fault in (6, 7, 8):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed)) if fault == 6 else block + rng.randrange(512)] = rng.randrange(256)
        return bytes(changed)
    if fault == 9:
        return rng.choice([b"", b"\x1f\x8b" + data, rng.randbytes(3000), b"{" * 600])
    return data


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"a shard took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def no_tokens(captions: list[str]) -> torch.Tensor:
    assert all(caption.encode() or True for caption in captions)  # UTF-8 can encode them
    return torch.zeros(len(captions), 1, dtype=torch.int64)


def read_everything(index: ShardIndex, keep_blank: bool) -> None:
    """Every member of every sample, the batches of embedding, and an epoch of the training loader."""
    reader = ShardReader(index)
    for shard, size in enumerate(index.sizes.tolist()):
        keys = index.table(shard).keys
        assert len(set(keys)) == len(keys) == size
        for row in range(size):
            with pytest.raises(BadSample) if index.table(shard).text[row, 1] < 0 else readable():
                caption = reader.caption(shard, row)
                assert keep_blank or not is_blank(caption)
            with readable():
                decode_image(reader.read(shard, row, "image"))
        if size:
            start = int(index.starts[shard])
            batch = Pairs(index, transform, no_tokens).__getitems__(list(range(start, start + size)))
            assert batch.size == size and all(failure.reason for failure in batch.failures)
    reader.close()
    batches = stream(
        index, transform=transform, tokenize=no_tokens, error_budget=1.0, max_consecutive_errors=50, global_batch=2,
        micro_batch=2, total_steps=max(1, index.num_samples // 2),
    )  # fmt: skip
    for batch in batches:
        assert len(batch.sample_id) == 2


@contextmanager
def readable() -> Iterator[None]:
    try:
        yield
    except BadSample as error:
        assert error.reason and str(error)


def run_case(folder: Path, seed: int) -> str:
    """Index random shards and read them; returns what came of it."""
    rng = random.Random(seed)
    folder.mkdir()
    keep_blank, source = rng.random() < 0.2, rng.choice([*SOURCES, "txt", "txt", "txt"])
    ending = source.partition(":")[0] if rng.random() < 0.95 else rng.choice(ENDINGS)
    for number in range(rng.randrange(1, 3)):
        (folder / f"{number}.tar").write_bytes(damaged(rng, tar_bytes(rng, ending)))
    options: dict[str, Any] = {
        "caption": source, "keep_blank": keep_blank or None, "allow_bad": rng.random() < 0.7,
        "max_lost": rng.choice([0.05, 1.0]),
    }  # fmt: skip
    try:
        index = load_index(folder, **options)
        again = load_index(folder, caption=options["caption"])
        assert again.digest == index.digest and verify_index(folder, caption=options["caption"]) == []
        used, lost = index.num_samples, sum(index.dropped.values())
        read_everything(again, keep_blank)
    except UserError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) < 3000, text
        return "refused"
    return "some lost" if lost else "all used" if used else "none"


def fuzz(tmp_path: Path, seeds: range) -> dict[str, int]:
    counts: dict[str, int] = {}
    for seed in seeds:
        with at_most(20):
            try:
                outcome = run_case(tmp_path / str(seed), seed)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def test_random_shards_never_end_in_a_traceback(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, range(100))
    assert min(counts[outcome] for outcome in ("refused", "some lost", "all used")) >= 10  # every path is taken


@pytest.mark.slow
def test_two_thousand_random_shards_never_end_in_a_traceback(tmp_path: Path) -> None:
    fuzz(tmp_path, range(1000, 3000))
