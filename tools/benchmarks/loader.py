"""Suite loader: samples per CPU second of the training loader, compared with webdataset's pipeline.

webdataset          the pipeline that open_clip_train builds, with open_clip's transform: float32 images
megacid             `PairStream` with data.decoder "pillow", and with its other values

All read the same tars with the same crops' distribution, transform and tokenizer of ViT-B-32 at 224 px. CPU time is
user and system time of the process and its workers. Our images stay uint8, since the device normalises them;
--normalize adds that step on the CPU. The providers take turns. The pictures are random textures and shapes, encoded as
JPEG of quality 90 with about as many bytes per pixel as photographs.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from open_clip.transform import image_transform_v2
from PIL import Image, ImageDraw

from argtypes import positive
from benchmarks.measure import cpu_seconds
from benchmarks.suite import Limit, Report, Row, make_report, print_table
from megacid.data.batch import Positions
from megacid.data.index import load_index
from megacid.data.joined import JoinSources
from megacid.data.joined_build import open_joined
from megacid.data.jpeg import image_reader
from megacid.data.loader import PairStream
from megacid.data.pairs import PairOptions
from megacid.data.sources import Source
from megacid.errors import UserError
from megacid.models.clip import (
    Decoder,
    PixelNormalization,
    StudentSpec,
    preprocess_cfg,
    tokenizer_for,
    train_transform,
)

HELP = "samples per CPU second of the training loader and of webdataset's pipeline at 224 px"
STUDENT = StudentSpec("ViT-B-32")
AUGMENT = "random_resized_crop"
OURS: tuple[Decoder, ...] = ("pillow", "simplejpeg", "simplejpeg_scaled")
SIDES, WORKERS = (256, 512), (0, 2)
BATCH, SHARDS, QUALITY, ROUNDS, LIMIT = 64, 4, 90, 3, 1.3
CAPTION = "a photo of number {}, with rough texture and some round and straight shapes in front of it"


def picture(side: int, seed: int) -> Image.Image:
    """A texture whose amplitudes fall with the frequency as in photographs, and shapes with sharp edges."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0
    grey, *colours = (
        np.fft.irfft2(
            (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)) / frequency**1.5,
            s=(side, side),
        )
        for _ in range(4)
    )
    pixels = np.stack([grey + 0.4 * colour for colour in colours], axis=2)
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, width = (int(value) for value in random.integers(0, side, 3))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width // 3, y + width // 4), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    return image


def write_tars(folder: Path, side: int, samples: int) -> Path:
    """Tars with images of that side and captions."""
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * samples // SHARDS, (shard + 1) * samples // SHARDS):
                buffer = io.BytesIO()
                picture(side, number).save(buffer, "JPEG", quality=QUALITY)
                for ending, data in (("jpg", buffer.getvalue()), ("txt", CAPTION.format(number).encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


# ---- providers -------------------------------------------------------------------------------------------------------


def webdataset_batches(folder: Path, samples: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch as in open_clip_train/data.py: its stages, its sizes of the shuffle buffers, its loader."""
    transform, tokenize = image_transform_v2(preprocess_cfg(STUDENT), is_train=True), tokenizer_for(STUDENT)
    stages = [
        webdataset.SimpleShardList(sorted(map(str, folder.glob("*.tar")))),
        webdataset.detshuffle(bufsize=2000, initial=500),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.select(lambda sample: "txt" in sample and "jpg" in sample),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenize(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    ]
    dataset = webdataset.DataPipeline(*stages).with_epoch(samples // BATCH // max(1, workers))
    # open_clip_train keeps the workers for the next epoch; here they end with their only one.
    yield from webdataset.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers)


def our_batches(
    decoder: Decoder, folder: Path, samples: int, workers: int, normalize: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same number of samples from the training loader."""
    options = PairOptions(
        transform=train_transform(STUDENT, AUGMENT, decoder),
        read_image=image_reader(decoder),
        tokenize=tokenizer_for(STUDENT),
        seed=0,
        seeded_transform=True,
        workers=workers,
    )
    plan = Positions(BATCH, BATCH, 1, rank=0, world=1, start_step=0, total_steps=samples // BATCH)
    source = Source(open_joined(JoinSources(load_index(folder))))
    normalization = PixelNormalization(STUDENT, "cpu")
    for batch in PairStream([source], plan, options):
        if batch.failure is not None or batch.replaced:
            raise UserError(f"the loader failed: {batch.failure or batch.replaced[0]}: no time is printed")
        yield normalization(batch.image) if normalize else batch.image, batch.text


def read_all(batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], samples: int) -> None:
    """Read an epoch to its end, so that all workers have ended. UserError if its content is not as expected."""
    count = 0
    for image, text in batches():
        if image.shape != (BATCH, 3, 224, 224) or len(text) != BATCH:
            raise UserError(f"a batch has images of shape {tuple(image.shape)}, expected {BATCH} of 224 px: no time")
        count += len(text)
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)  # the time of workers counts once they have ended
    if multiprocessing.active_children():
        raise UserError("loader workers outlive their epoch, so their CPU time is unknown: no time is printed")
    if count != samples:
        raise UserError(f"an epoch has {count} samples, expected {samples}: no time is printed")


# ---- the suite -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1, clock="cpu", device="cpu")
    parser.add_argument("--samples", type=positive, default=256, help="samples per epoch (default 256)")
    parser.add_argument("--normalize", action="store_true", help="also normalise our images on the CPU")


def run(args: argparse.Namespace) -> Report:
    if args.samples % (BATCH * max(WORKERS)) or args.device != "cpu" or args.clock != "cpu":
        raise UserError(
            f"--samples is {args.samples}, --device {args.device} and --clock {args.clock}, expected a multiple of "
            f"{BATCH * max(WORKERS)}, cpu and cpu: correct them"
        )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for side in SIDES:
            folder = write_tars(Path(temporary) / str(side), side, args.samples)
            for workers in WORKERS:
                rows += _measure(folder, side, workers, args)
    print_table(rows, COLUMNS)
    return make_report(args, rows)


def _measure(folder: Path, side: int, workers: int, args: argparse.Namespace) -> list[Row]:
    epoch = (folder, args.samples, workers)
    providers: dict[str, Any] = {"webdataset": functools.partial(webdataset_batches, *epoch)}
    providers |= {f"megacid, {name}": functools.partial(our_batches, name, *epoch, args.normalize) for name in OURS}
    runs = {name: functools.partial(read_all, batches, args.samples) for name, batches in providers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in itertools.product(range(1 + ROUNDS), runs):
        start = cpu_seconds()
        runs[name]()
        if number > 0:  # the first round fills caches
            seconds[name].append(cpu_seconds() - start)
    rows: list[Row] = []
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["webdataset"], times)]
        rates = [args.samples / time for time in times]
        rows.append(
            {"provider": name, "side": side, "workers": workers, "samples_per_s": rates, "over_webdataset": ratios}
        )
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda row: str(row["provider"]),
    "side": lambda row: f"{row['side']} px",
    "workers": lambda row: str(row["workers"]),
    "samples per CPU second:": lambda row: _range(row["samples_per_s"], ".0f"),
    "over webdataset [range]:": lambda row: _range(row["over_webdataset"], ".2f"),
}


def _range(values: list[float], spec: str) -> str:
    return f"{np.median(values):{spec}} [{min(values):{spec}}, {max(values):{spec}}]"


def check(report: Report) -> list[Limit]:
    """With simplejpeg our loader must read at least 1.3 times as many samples per CPU second as webdataset."""
    return [
        Limit(
            f"{row['provider']}, {row['side']} px, {row['workers']} workers: samples per CPU second over webdataset",
            float(np.median(row["over_webdataset"])),
            LIMIT,
            at_least=True,
        )
        for row in report["results"]
        if "simplejpeg" in row["provider"]
    ]
