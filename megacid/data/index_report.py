"""What an index leaves out: a summary, the refusal of shards that lose many samples, and files that are not used."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from megacid.data.captions import CaptionSource
from megacid.data.shard_paths import ShardPaths
from megacid.data.tar_samples import LOST, extensions, remedy
from megacid.errors import UserError

MAX_LOST = 0.05  # share of the samples that may be lost, unless the user sets another
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_UNFINISHED = re.compile(r"\.tar(\.(part|partial|tmp|temp|download|crdownload|aria2|incomplete|\d+))?$", re.IGNORECASE)


def lost_samples(entries: list[dict[str, Any]]) -> Counter[str]:
    """Number of samples that the tars hold and the index does not use, by reason."""
    return _dropped(entries, lost=True)


def _dropped(entries: list[dict[str, Any]], *, lost: bool) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update({reason: count for reason, count in entry["dropped"].items() if (reason in LOST) == lost})
    return counts


def listed(counts: Counter[str]) -> str:
    """The most frequent reasons with their counts."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common(10))


def summary(entries: list[dict[str, Any]]) -> str:
    """One line: how many samples are used, how many are not, and why."""
    lost, members = lost_samples(entries), _dropped(entries, lost=False)
    used, without_text = (sum(entry[name] for entry in entries) for name in ("samples", "without_text"))
    text = f"{used:,} samples used" + (f" ({without_text:,} with a class but no caption)" if without_text else "")
    text += f", {lost.total():,} not used" + (f" ({listed(lost)})" if lost else "")
    return text + (f", skipped members: {listed(members)}" if members else "")


def lost_share(entries: list[dict[str, Any]]) -> float:
    """The share of the samples that are lost."""
    lost = lost_samples(entries).total()
    return lost / max(1, lost + sum(entry["samples"] for entry in entries))


def _accepted(entry: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Whether index.json has the same tar with at least as many lost samples."""
    if before is None or entry["bytes"] != before["bytes"]:
        return False
    return lost_samples([entry]).total() <= lost_samples([before]).total()


def check_losses(
    paths: ShardPaths,
    entries: list[dict[str, Any]],
    caption: CaptionSource,
    stored: dict[Path, dict[str, Any]] | None = None,
    *,
    max_lost: float = 1.0,
    writable: bool = True,
) -> None:
    """Raise UserError when no sample can be used, or a larger share than `max_lost` is lost.

    stored: by tar, the entries of index.json, whose losses were accepted. The share must be larger both among all tars
        and among those that are not accepted.
    """
    tars, used = paths.tars, sum(entry["samples"] for entry in entries)
    accepted = [_accepted(entry, (stored or {}).get(tar)) for entry, tar in zip(entries, tars)]
    judged = [entry for entry, old in zip(entries, accepted) if not old]
    if used and min(lost_share(entries), lost_share(judged)) <= max_lost:
        return
    where = ""
    if used and lost_share([entry for entry, old in zip(entries, accepted) if old]) > max_lost:
        where = " in tars that were added or changed"
        entries, tars = judged, [tar for tar, old in zip(tars, accepted) if not old]
    lost = lost_samples(entries)
    total = lost.total()
    if used:
        held = f"{total + sum(entry['samples'] for entry in entries):,} samples{where}"
        problem = f"{paths}: {total:,} of {held} cannot be used, expected at most {percent(max_lost)}"
    else:
        problem = f"{paths} has {len(entries)} tars but no complete sample"
    if not lost:
        skipped = listed(_dropped(entries, lost=False))
        endings = ", ".join(extensions(paths.tars[0]))
        raise UserError(
            f"{problem} (members of {paths.tars[0].name} end in: {endings or 'there are none'}; skipped: "
            f"{skipped or 'nothing'}): each sample needs an image and a .{caption.ending} (or .cls) of the same name"
        )
    reason, count = lost.most_common(1)[0]
    worst, tar = max(zip(entries, tars), key=lambda pair: pair[0]["dropped"].get(reason, 0))
    names = worst["dropped_names"].get(reason)
    example = names[0] if isinstance(names, list) and names else "one"
    accept = f", or run tools/index_shards.py {caption.option}--max-lost 1 to use the other {used:,}"
    raise UserError(
        f"{problem}, mostly because of: {reason} ({count:,} times, such as {example} in {tar.name}, whose members end "
        f"in {', '.join(extensions(tar))}); {remedy(reason, caption)}{accept if used else ''}"
        f"{' in a writable folder of links to the tars' if used and not writable else ''}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def unused_files(root: Path) -> str:
    """One line about shards in a form that is not read, next to the tars or in subfolders; "" when there are none."""
    names = sorted(path.name for path in root.iterdir() if path.name[0] != ".")
    compressed = [name for name in names if _COMPRESSED.search(name)]
    unfinished = [name for name in names if _UNFINISHED.search(name) and not name.endswith(".tar")]
    # Two levels only: a walk through a large tree would delay every start.
    below = [path.relative_to(root) for pattern in ("*/*.tar", "*/*/*.tar") for path in root.glob(pattern)]
    below = sorted(path for path in below if not any(part.startswith(".") for part in path.parts))
    folders = sorted({str(path.parent) for path in below})
    parts = []
    if compressed:
        parts.append(f"{len(compressed):,} compressed tars (such as {compressed[0]}): decompress them")
    if unfinished:
        parts.append(
            f"{len(unfinished):,} files that do not end in .tar (such as {unfinished[0]}): complete or rename them"
        )
    if below:
        parts.append(
            f"{len(below):,} tars in {len(folders):,} subfolders (such as {folders[0]}): give that folder, or move its "
            "tars up"
        )
    return "; ".join(parts)
