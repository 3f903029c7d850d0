#!/usr/bin/env python3
"""Make a corpus of captioned pictures from a package of icons: @iconify/json (npm) or qtawesome (PyPI).

    tools/prepare_icons.py --package iconify-json-2.2.535.tgz --out data/icons --workers 4
    tools/prepare_icons.py --package qtawesome-1.4.2-py3-none-any.whl --out data/icon-fonts

The package is an archive or the folder it unpacks to. Sets whose licence is not in a list of free ones are left out.
Captions are the names of the icons. Whole design systems are held out for validation and test.

    OUT/train, OUT/validation, OUT/test    tars of png + txt
    OUT/pairs.parquet                      per pair: split, set, name, caption, design_system, family, concept, picture
    OUT/concepts-validation, -test         classification sets in CLIP_benchmark's webdataset layout
    OUT/seldom-validation, -test           the same for concepts that few training systems draw, if there are any
    OUT/retrieval-validation, -test        retrieval sets in the same layout
    OUT/ATTRIBUTION.md, summary.json, examples.png

The same command continues a run that was stopped. The bytes depend on the package, --size, --pairs-per-tar and the
versions of the renderers, not on --workers.
"""

import argparse
import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, integer, local_path
from icon_packages import IconPackage, read_package
from icon_report import attribution, equal_pictures, examples, summarize
from icon_sets import SPLITS, TEMPLATES, Pair, Plan, classification, plan_pairs, retrieval
from icon_tars import Renderer, TarJob, make_tars
from megacid.data.index import ShardReader, load_index
from megacid.distributed.stopping import run_alone
from megacid.errors import UserError, run_tool
from megacid.storage.atomic import disk_errors, write_json_atomic, write_text, writing
from megacid.storage.stage_directory import StageDirectory
from sample_tars import write_classification, write_retrieval

MAX_NAMED = 20  # icons without a picture that are printed; summary.json has all


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--package", type=local_path, required=True, help="archive or folder of the icons")
    parser.add_argument("--out", type=local_path, required=True, help="output directory")
    parser.add_argument(
        "--size", type=integer(8, 1024), default=32, help="side of the pictures in pixels (default: 32)"
    )
    parser.add_argument(
        "--pairs-per-tar", type=integer(1, 10_000), default=4000, help="pairs in one tar, at most 10000 (default: 4000)"
    )
    parser.add_argument(
        "--workers",
        type=integer(1, 256),
        default=os.cpu_count() or 1,
        help="processes that render (default: all cores)",
    )
    return parser.parse_args(argv)


def renderer_version(kind: str) -> str:
    name = {"iconify": "resvg-py", "fonts": "pillow"}[kind]
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        raise UserError(f"SVG icons need the package {name}: pip install 'megacid[corpus]'") from None


class PictureReader:
    """Reads pictures of the corpus by key."""

    def __init__(self, out: Path) -> None:
        self.place: dict[str, tuple[ShardReader, int, int]] = {}
        for split in SPLITS:
            reader = ShardReader(load_index(out / split))
            for shard in range(len(reader.index.names)):
                for row, key in enumerate(reader.index.table(shard).keys):
                    self.place[key] = reader, shard, row

    def __call__(self, key: str) -> bytes:
        reader, shard, row = self.place[key]
        return reader.read(shard, row, "image")


def write_pairs(path: Path, pairs: list[Pair], picture: np.ndarray) -> None:
    """One row per pair. picture: the key of the first pair with the same picture."""
    columns = {
        "key": [pair.key for pair in pairs],
        "split": [pair.split for pair in pairs],
        "set": [pair.icon.prefix for pair in pairs],
        "name": [pair.icon.name for pair in pairs],
        "caption": [pair.caption for pair in pairs],
        "design_system": [pair.system for pair in pairs],
        "family": [pair.family for pair in pairs],
        "concept": [pair.concept for pair in pairs],
        "picture": [pairs[row].key for row in picture],
    }
    with writing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def write_evaluation_sets(
    out: Path, kind: str, pairs: list[Pair], picture: np.ndarray, read: PictureReader
) -> dict[str, Any]:
    """Write the sets of the held-out splits, without pictures that an earlier split has; returns their sizes."""
    sizes: dict[str, Any] = {}
    picture_of = {pair.key: first for pair, first in zip(pairs, picture.tolist())}
    pairs = [pair for pair in pairs if pairs[picture_of[pair.key]].split == pair.split]
    caption_of = {pair.key: pair.caption for pair in pairs}
    for split in SPLITS[1:]:
        for name, seldom in ((f"concepts-{split}", False), (f"seldom-{split}", True)):
            shutil.rmtree(out / name, ignore_errors=True)
            chosen = classification(pairs, split, kind, seldom=seldom)
            if not chosen.names:
                continue
            splits = {"train": chosen.train, "test": chosen.test}
            write_classification(
                out / name,
                chosen.names,
                list(TEMPLATES),
                {part: ((read(key), label) for key, label in rows) for part, rows in splits.items()},
            )
            sizes[name] = {"classes": len(chosen.names), **{part: len(rows) for part, rows in splits.items()}}
        folder = out / f"retrieval-{split}"
        shutil.rmtree(folder, ignore_errors=True)
        keys = [pair.key for pair in retrieval(pairs, split, picture_of)]
        write_retrieval(folder, ((read(key), caption_of[key]) for key in keys))
        sizes[folder.name] = {"pairs": len(keys)}
    return sizes


def make_corpus(args: argparse.Namespace, package: IconPackage, plan: Plan) -> dict[str, Any]:
    """Write everything but meta.json; returns the summary."""
    out: Path = args.out
    jobs: dict[str, TarJob] = {}
    for pair in plan.pairs:
        path = out / pair.split / f"{pair.key[:5]}.tar"
        jobs.setdefault(str(path), TarJob(path, [])).pairs.append((pair.key, pair.caption, pair.icon))
    fonts = {icons.prefix: icons.font for icons in package.sets.values() if icons.font}
    contents = make_tars(list(jobs.values()), Renderer(args.size, fonts), args.workers)
    written = {key for content in contents for key in content.keys}
    pairs = [pair for pair in plan.pairs if pair.key in written]
    picture = equal_pictures([digest for content in contents for digest in content.digests])
    thumbnails = np.concatenate([content.thumbnails for content in contents])
    failures = {name: reason for content in contents for name, reason in sorted(content.failures.items())}
    write_pairs(out / "pairs.parquet", pairs, picture)
    write_text(out / "ATTRIBUTION.md", attribution(package, pairs))
    with disk_errors(out):
        read = PictureReader(out)
        with writing(out / "examples.png") as temporary:
            examples(pairs, read).save(temporary, "PNG")
        sets = write_evaluation_sets(out, package.kind, pairs, picture, read)
        summary = {
            "size": args.size,
            **summarize(package, pairs, picture, thumbnails),
            "evaluation_sets": sets,
            "no_caption": plan.no_caption,
            "no_picture": dict(sorted(failures.items())),
        }
        write_json_atomic(out / "summary.json", summary)
    return summary


def report(out: Path, summary: dict[str, Any], seconds: float, cpu_seconds: float) -> None:
    """Print what was made and what was left out."""
    print(f"{out}: {summary['pairs']:,} pairs at {summary['size']} px, {seconds:.0f} s, {cpu_seconds:.0f} CPU seconds")
    for split, sizes in summary["splits"].items():
        print(f"  {split:<12}{sizes['pairs']:>9,} pairs, {sizes['systems']} design systems")
    for name, sizes in summary["evaluation_sets"].items():
        print(f"  {name:<22}" + ", ".join(f"{value:,} {what}" for what, value in sizes.items()))
    for prefix, facts in summary["left_out"].items():
        print(f"  left out: {prefix}, {facts['icons']:,} icons, licence {facts['licence']}")
    print(f"  {len(summary['no_caption'])} icons with a name that is no caption")
    print(f"  {len(summary['no_picture'])} icons that do not render")
    for name, reason in list(summary["no_picture"].items())[:MAX_NAMED]:
        print(f"    {name}: {reason}")


def build(args: argparse.Namespace) -> int:
    began, used = time.monotonic(), sum(os.times()[:4])  # a process that a shell became has used time before
    package = read_package(args.package)
    plan = plan_pairs(package, args.pairs_per_tar)
    arguments = {
        "package": package.digest(),
        "plan": plan.digest(),  # other held-out systems in another version of this tool must not reuse tars
        "size": args.size,
        "pairs_per_tar": args.pairs_per_tar,
        "renderer": renderer_version(package.kind),
    }
    stage = StageDirectory(args.out, "prepare_icons", arguments)
    if stage.finished() is not None:
        print(f"{args.out} is complete, made with the same arguments")
        return 0
    stage.begin()
    continued = any(any((args.out / split).glob("*.tar")) for split in SPLITS)
    summary = make_corpus(args, package, plan)
    cpu_seconds = sum(os.times()[:4]) - used
    seconds = time.monotonic() - began
    # A continued run has no time of the whole corpus.
    times_of_all = {} if continued else {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 2)}
    stage.commit(
        {"package": str(args.package), "version": package.version},
        pairs=summary["pairs"],
        renderer=arguments["renderer"],
        workers=args.workers,
        **times_of_all,
    )
    report(args.out, summary, seconds, cpu_seconds)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_alone(lambda: build(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
