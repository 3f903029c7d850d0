#!/usr/bin/env python3
"""Generate synthetic data: captioned digits, captioned scenes of shapes, or class-labelled feature vectors.

    tools/synthesize.py digits   --out data/digits
    tools/synthesize.py scenes   --out data/scenes --num 20000 --clusters 1000 --duplicates 0.4
    tools/synthesize.py features --out data/features --classes 1000000 --dim 512 --per-class 20

digits and scenes write OUT/train in img2dataset's layout (tars of jpg|png + txt + json, sizes.json) and OUT/test in the
webdataset layout of CLIP_benchmark. Some training samples are altered copies of others; their json names the original
as `origin`. The test split has no copies. The same arguments and Pillow version give bit-identical tars.
"""

import argparse
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, integer, local_path, natural, positive, real, seed_number
from megacid.data.index import load_index
from megacid.data.order import KeyedPermutation, derive_key
from megacid.distributed.progress import progress_bar
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.failpoints import failpoint
from megacid.storage.atomic import write_json_atomic
from megacid.storage.metadata import read_meta, write_meta
from megacid.storage.npy import write_array, write_npy
from megacid.storage.stage_directory import staged_folder
from sample_tars import add_member, write_classification
from synthetic_data import SceneMaker, altered, class_features

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a photo of the digit {word}.",
    "a handwritten {figure}.",
    "the number {word} written by hand.",
    "a small grey picture of a {figure}",
    "handwriting: {word}",
    "a scan of the numeral {figure}.",
)
DIGIT_TEMPLATES = ("a photo of the digit {c}.", "the number {c} written by hand.", "handwriting: {c}")


class Sample(NamedTuple):
    """One training pair. `origin`: number of the sample that it is a copy of; its own number for an original."""

    number: int
    origin: int
    label: int
    image: bytes
    extension: str
    caption: str
    change: str


# ---- writing --------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, extension: str, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if extension == "png" else "JPEG", quality=quality)  # PNG has no quality
    return buffer.getvalue()


def write_train(folder: Path, samples: Iterator[Sample], place: Any, shard_sizes: list[int]) -> dict[str, int]:
    """Write img2dataset's layout; `place(number) -> (shard, row)` locates every sample. Returns the counts."""
    folder.mkdir(parents=True)
    key = lambda number: "{:05d}{:04d}".format(*place(number))  # noqa: E731
    counts = {"pairs": 0, "originals": 0, "copies": 0}
    bar = progress_bar("train", "pair", sum(shard_sizes))
    for shard, size in enumerate(shard_sizes):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for _ in range(size):
                sample = next(samples)
                redundant = sample.origin != sample.number
                record = {
                    "key": key(sample.number),
                    "caption": sample.caption,
                    "label": sample.label,
                    "origin": key(sample.origin),
                    "redundant": redundant,
                    "change": sample.change,
                }
                add_member(tar, f"{record['key']}.{sample.extension}", sample.image)
                add_member(tar, f"{record['key']}.txt", sample.caption.encode())
                add_member(tar, f"{record['key']}.json", json.dumps(record).encode())
                bar.update()
                counts["pairs"] += 1
                counts["copies" if redundant else "originals"] += 1
    bar.close()
    sizes = {f"{shard:05d}.tar": size for shard, size in enumerate(shard_sizes)}
    write_json_atomic(folder / "sizes.json", sizes)
    return counts


def write_benchmark(folder: Path, names: list[str], templates: list[str], splits: dict[str, Iterator[Any]]) -> None:
    """`write_classification` of splits that yield (PIL image, class)."""
    write_classification(
        folder,
        names,
        templates,
        {split: ((encode(image, "png"), label) for image, label in samples) for split, samples in splits.items()},
    )


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that determine the content."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in ("out", "force", "make")}


def build(args: argparse.Namespace, make: Any) -> int:
    """Call `make(args, folder) -> counts` in a hidden folder and publish it with one rename, unless OUT is complete."""
    out: Path = args.out
    source = source_of(args)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "meta.json").is_file():
            raise UserError(f"{out} is not empty and was not made by this tool: choose another --out")
        try:
            before = read_meta(out, "synthesize")["source"]
        except UserError as error:
            if not args.force or "not JSON" not in str(error):
                raise UserError(f"{error}; pass --force, or delete {out}, to generate it again") from None
            before = None
        if before == source and not args.force:
            print(f"{out} already exists, made with the same arguments (pass --force to generate it again)")
            return 0
        if not args.force:
            raise UserError(f"{out} was made with other arguments ({before}): choose another --out, or pass --force")
    with staged_folder(out) as stage:
        counts = make(args, stage)
        failpoint("synthesize:before_meta")
        write_meta(stage, "synthesize", source, **counts)
    print(f"\n{out}")
    for name, value in counts.items():
        print(f"  {name:<22}{value:>12,}" if isinstance(value, int) else f"  {name:<22}{value!s:>12}")
    return 0


def finish_pairs(stage: Path, source: dict[str, Any], counts: dict[str, int], tests: int) -> dict[str, Any]:
    """Index the training tars, which also reads them back, and write a meta.json into both folders."""
    index = load_index(stage / "train")
    if index.num_samples != counts["pairs"] or index.dropped:
        raise RuntimeError(f"wrote {counts['pairs']} pairs, read back {index.num_samples}, skipped {index.dropped}")
    write_meta(stage / "train", "synthesize", source, shards_digest=index.digest, **counts)
    write_meta(stage / "test", "synthesize", source, images=tests)
    share = counts["originals"] / counts["pairs"]
    return {"shards": len(index.names), **counts, "share of originals": round(share, 4), "test images": tests}


# ---- digits ---------------------------------------------------------------------------------------------------------


def digit_image(pixels: np.ndarray, size: int) -> Image.Image:
    """A size x size RGB image of an 8 x 8 array of 0 .. 16."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    return grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def digit_caption(label: int, rng: np.random.Generator) -> str:
    template = DIGIT_CAPTIONS[int(rng.integers(len(DIGIT_CAPTIONS)))]
    return template.format(word=DIGITS[label], figure=label)


def make_digits(args: argparse.Namespace, stage: Path) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8)
    rng = np.random.default_rng(args.seed)
    if args.test_share + args.validation_share >= 1:
        raise UserError(
            f"--test-share and --validation-share are {args.test_share + args.validation_share:g} in all, expected "
            "less than 1: lower one of them"
        )
    split = np.zeros(len(labels), np.int8)  # 0: training, 1: test, 2: validation
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        tests = round(len(rows) * args.test_share)
        split[rows[:tests]] = 1
        split[rows[tests : tests + round(len(rows) * args.validation_share)]] = 2
    train_rows = np.flatnonzero(split == 0)
    originals = len(train_rows)
    copies = round(originals * args.redundancy / (1 - args.redundancy))
    # Pairs with number < originals are originals; the others are copies of the pair in `origin`.
    origin = np.concatenate([np.arange(originals), rng.integers(0, originals, copies)])
    order = rng.permutation(originals + copies)
    shard_sizes = [len(part) for part in np.array_split(order, args.shards)]
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    position = np.argsort(order)

    def place(number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(starts, position[number], side="right")) - 1
        return shard, int(position[number] - starts[shard])

    def samples() -> Iterator[Sample]:
        for number in order.tolist():
            of = int(origin[number])
            label = int(labels[train_rows[of]])
            image = digit_image(pixels[train_rows[of]], args.size)
            pair_rng = np.random.default_rng([args.seed, 1, number])
            if of == number:
                extension = ("jpg", "png")[int(pair_rng.integers(2))]
                data, change = encode(image, extension), "none"
            else:
                extension = "jpg"
                copy, quality, change = altered(image, pair_rng)
                data = encode(copy, extension, quality)
            yield Sample(number, of, label, data, extension, digit_caption(label, pair_rng), change)

    counts = write_train(stage / "train", samples(), place, shard_sizes)
    for number, held_out in ((1, "test"), (2, "validation"))[: 1 + bool(args.validation_share)]:
        splits = {
            name: ((digit_image(pixels[row], args.size), int(labels[row])) for row in rows)
            for name, rows in (("train", train_rows), ("test", np.flatnonzero(split == number)))
        }
        write_benchmark(stage / held_out, list(DIGITS), list(DIGIT_TEMPLATES), splits)
    return finish_pairs(stage, source_of(args), counts, int((split == 1).sum()))


# ---- scenes ---------------------------------------------------------------------------------------------------------


def make_scenes(args: argparse.Namespace, stage: Path) -> dict[str, Any]:
    train, test = (SceneMaker(args.clusters, args.duplicates * (1 - t), args.size, args.seed, t) for t in (0, 1))
    full, rest = divmod(args.num, args.samples_per_shard)
    shard_sizes = [args.samples_per_shard] * full + [rest] * (rest > 0)
    tests = round(args.num * args.test_share)

    def samples() -> Iterator[Sample]:
        for number in range(args.num):
            origin = train.origin(number)
            image, quality, change = train.image(origin), 92, "none"
            if origin != number:
                image, quality, change = altered(image, np.random.default_rng([args.seed, 2, number]))
            data = encode(image, "jpg", quality)
            yield Sample(number, origin, train.cluster(origin), data, "jpg", train.caption(number), change)

    counts = write_train(stage / "train", samples(), lambda n: divmod(n, args.samples_per_shard), shard_sizes)
    # The linear probe's training split: four originals per test image, which is small compared to train/.
    originals = (n for n in range(args.num) if train.origin(n) == n)
    splits = {
        "train": ((train.image(n), train.cluster(n)) for n in itertools.islice(originals, 4 * tests)),
        "test": ((test.image(n), test.cluster(n)) for n in range(tests)),
    }
    names = [train.scene(cluster).phrase for cluster in range(args.clusters)]
    write_benchmark(stage / "test", names, ["a {c}.", "a picture of a {c}"], splits)
    return finish_pairs(stage, source_of(args), counts, tests)


# ---- features -------------------------------------------------------------------------------------------------------

CHUNK_VALUES = 1 << 22  # feature values computed at once: at most a few hundred MB of scratch memory


def write_features(folder: Path, args: argparse.Namespace, per_class: int, first_sample: int, desc: str) -> int:
    """features/features_00000.npy float16 [n, d] and labels/labels_00000.npy int32 [n], shuffled over all rows."""
    (folder / "features").mkdir(parents=True)
    (folder / "labels").mkdir()
    total = args.classes * per_class
    order = KeyedPermutation(total, derive_key(args.seed, 23, first_sample))
    step = max(1, CHUNK_VALUES // args.dim)
    with progress_bar(desc, "row", total) as bar:
        for number, start in enumerate(range(0, total, args.rows_per_file)):
            rows = min(args.rows_per_file, total - start)
            name = folder / "features" / f"features_{number:05d}.npy"
            labels = np.empty(rows, np.int32)

            def blocks(start: int = start, rows: int = rows, labels: np.ndarray = labels) -> Iterator[np.ndarray]:
                for at in range(0, rows, step):
                    sample = order(np.arange(start + at, start + min(at + step, rows)))
                    label = labels[at : at + len(sample)] = sample // per_class
                    yield class_features(label, first_sample + sample, args.dim, args.noise, args.seed, args.nuisance)
                    bar.update(len(sample))

            with open(name, "wb") as file:
                write_npy(file, np.dtype(np.float16), (rows, args.dim), blocks())
            write_array(folder / "labels" / f"labels_{number:05d}.npy", labels)
    return total


def make_features(args: argparse.Namespace, stage: Path) -> dict[str, Any]:
    rows = write_features(stage, args, args.per_class, 0, "train")
    tests = write_features(stage / "test", args, args.test_per_class, rows, "test") if args.test_per_class else 0
    return {"classes": args.classes, "dim": args.dim, "rows": rows, "test rows": tests}


# ---- command line ---------------------------------------------------------------------------------------------------


share, length = real(0, 1, without=(1,)), real(0, 1000)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, except for required options and switches."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required or action.nargs == 0 else super()._get_help_string(action)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    kinds = parser.add_subparsers(required=True, dest="kind")

    def kind(name: str, make: Any, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        sub.add_argument("--out", type=local_path, required=True, help="output directory")
        sub.add_argument("--force", action="store_true", help="replace an earlier output of this tool")
        sub.add_argument("--seed", type=seed_number, default=0, help="determines all random choices")
        sub.set_defaults(make=make)
        return sub

    digits = kind("digits", make_digits, "1797 handwritten digits of scikit-learn, captioned, with planted copies")
    digits.add_argument("--size", type=positive, default=32, help="side of the images in pixels")
    digits.add_argument("--redundancy", type=share, default=0.4, help="share of copies among the training pairs")
    digits.add_argument("--test-share", type=share, default=0.2, help="share of each digit held out for the test split")
    digits.add_argument(
        "--validation-share",
        type=share,
        default=0.0,
        help="share of each digit for a second test split, OUT/validation",
    )
    digits.add_argument("--shards", type=positive, default=7, help="number of training tars")
    scenes = kind("scenes", make_scenes, "captioned scenes of coloured shapes with known clusters and planted copies")
    scenes.add_argument("--num", type=positive, default=20_000, help="number of training pairs, including copies")
    scenes.add_argument("--clusters", type=positive, default=1000, help="number of different scenes, at most 10368")
    scenes.add_argument("--duplicates", type=share, default=0.4, help="share of copies among the training pairs")
    scenes.add_argument("--size", type=positive, default=64, help="side of the images in pixels")
    scenes.add_argument(
        "--samples-per-shard", type=integer(1, 10_000), default=1000, help="pairs in one tar, at most 10000"
    )
    scenes.add_argument("--test-share", type=share, default=0.05, help="number of test images as a share of --num")

    features = kind(
        "features", make_features, "class-labelled feature vectors, for classification with any number of classes"
    )
    features.add_argument("--classes", type=positive, required=True, help="number of classes")
    features.add_argument("--dim", type=positive, default=128, help="feature width")
    features.add_argument("--per-class", type=positive, default=20, help="rows of each class")
    features.add_argument("--test-per-class", type=natural, default=0, help="rows of each class held out in OUT/test")
    features.add_argument(
        "--noise", type=length, default=0.5, help="expected length of the noise; the class centre has length 1"
    )
    features.add_argument(
        "--nuisance",
        type=length,
        default=0.0,
        help="expected length of a second noise, in a fixed quarter of the directions: a tower can learn to ignore it",
    )
    features.add_argument("--rows-per-file", type=positive, default=1_000_000, help="rows in one .npy")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_alone(lambda: build(args, args.make))


if __name__ == "__main__":
    sys.exit(run_tool(main))
