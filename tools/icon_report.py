"""Measures an icon corpus: sizes, licences, how redundant it is; draws examples.

Shapes: n pairs, m queries, p pixels.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from icon_packages import IconPackage, IconSet
from icon_sets import SPLITS, Pair
from megacid.data.order import KeyedPermutation, derive_key
from megacid_kernels.rows import unit_rows

QUERIES = 2000  # pairs of each split whose nearest neighbour is looked for
NEAR = 0.95  # least cosine of the grey thumbnails of near-duplicates
_BLOCK = 16_384
EXAMPLE_CONCEPTS = "home user mail camera bell calendar heart trash car folder".split()
EXAMPLE_SYSTEMS = 12  # of each row of examples


def equal_pictures(digests: list[bytes]) -> np.ndarray:
    """int64 [n]: the first row whose picture has the same bytes."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(digest, row) for row, digest in enumerate(digests)], np.int64)


def summarize(package: IconPackage, pairs: list[Pair], picture: np.ndarray, thumbnails: np.ndarray) -> dict[str, Any]:
    """The JSON-able facts of a corpus that depend on its content alone.

    Args:
        pairs: n, in the order of their keys.
        picture: int64 [n], see `equal_pictures`.
        thumbnails: uint8 [n, p], see `TarContent`.
    """
    rows = {split: np.array([row for row, pair in enumerate(pairs) if pair.split == split]) for split in SPLITS}
    return {
        "package": {"kind": package.kind, "version": package.version},
        "pairs": len(pairs),
        "splits": {split: _sizes([pairs[row] for row in rows[split]]) for split in SPLITS},
        "licences": _licences(package, pairs),
        "left_out": {
            icons.prefix: {"licence": icons.licence or "none", "icons": len(icons.drawings)}
            for icons in package.sets.values()
            if not icons.is_free
        },
        "redundancy": _redundancy([pairs[row] for row in rows["train"]], picture[rows["train"]]),
        "nearest": _nearest(pairs, rows, picture, thumbnails),
    }


def _sizes(pairs: list[Pair]) -> dict[str, Any]:
    systems = Counter(pair.system for pair in pairs)
    return {
        "pairs": len(pairs),
        "sets": len({pair.icon.prefix for pair in pairs}),
        "systems": len(systems),
        "captions": len({pair.caption for pair in pairs}),
        "pairs_per_system": dict(systems.most_common()),
    }


def _licences(package: IconPackage, pairs: list[Pair]) -> dict[str, dict[str, int]]:
    of_set = Counter(pair.icon.prefix for pair in pairs)
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"sets": 0, "pairs": 0})
    for prefix, count in of_set.items():
        entry = found[str(package.sets[prefix].licence)]
        entry["sets"] += 1
        entry["pairs"] += count
    return dict(sorted(found.items(), key=lambda item: -item[1]["pairs"]))


def _redundancy(pairs: list[Pair], picture: np.ndarray) -> dict[str, Any]:
    """What the names say of the training pairs, and equal pictures."""
    families = Counter(pair.family for pair in pairs)
    systems: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        systems[pair.concept].add(pair.system)
    drawn_by = Counter({concept: len(found) for concept, found in systems.items()})
    return {
        "families": len(families),
        "share_in_families": _share(families[pair.family] > 1 for pair in pairs),
        "beyond_one_per_family": _share_of(len(pairs) - len(families), len(pairs)),
        "concepts": len(systems),
        "share_in_concepts_of_2_systems": _share(drawn_by[pair.concept] >= 2 for pair in pairs),
        "share_in_concepts_of_10_systems": _share(drawn_by[pair.concept] >= 10 for pair in pairs),
        "most_drawn_concepts": dict(drawn_by.most_common(5)),
        "equal_pictures": _share_of(len(pairs) - len(np.unique(picture)), len(pairs)),
    }


def _nearest(
    pairs: list[Pair], rows: dict[str, np.ndarray], picture: np.ndarray, thumbnails: np.ndarray
) -> dict[str, Any]:
    """Of a sample of each split: its nearest neighbour among the training pairs, by cosine of grey thumbnails."""
    train = rows["train"]
    in_train = set(picture[train].tolist())
    facts: dict[str, Any] = {"pixels": thumbnails.shape[1], "near_cosine": NEAR}
    for number, split in enumerate(SPLITS):
        count = min(QUERIES, len(rows[split]))
        order = KeyedPermutation(len(rows[split]), derive_key(7, number))(np.arange(count))
        queries = np.sort(rows[split][order])
        best, cosine = nearest_rows(thumbnails, queries, train)
        near = [(pairs[a], pairs[b]) for a, b, c in zip(queries, best, cosine) if c >= NEAR]
        facts[split] = {
            "queries": count,
            "median_cosine": round(float(np.median(cosine)), 3),
            "near": _share_of(len(near), count),
            "near_in_family": _share_of(sum(a.family == b.family for a, b in near), count),
            "near_other_family_same_concept": _share_of(
                sum(a.family != b.family and a.concept == b.concept for a, b in near), count
            ),
        }
        if split != "train":
            facts[split]["equal_picture_in_train"] = _share(int(picture[row]) in in_train for row in rows[split])
    return facts


def nearest_rows(thumbnails: np.ndarray, queries_m: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, cosine) [m] of the most similar row of `base` for each query, other than itself."""
    unit = _unit_rows(thumbnails[queries_m])
    best, cosine = np.full(len(queries_m), -1), np.full(len(queries_m), -1.0, np.float32)
    for start in range(0, len(base), _BLOCK):
        block = base[start : start + _BLOCK]
        similarity = unit @ _unit_rows(thumbnails[block]).T
        similarity[queries_m[:, None] == block[None, :]] = -1
        at = similarity.argmax(1)
        value = similarity[np.arange(len(at)), at]
        better = value > cosine
        best[better], cosine[better] = block[at[better]], value[better]
    return best, cosine


def _unit_rows(pixels: np.ndarray) -> np.ndarray:
    return unit_rows(torch.from_numpy(pixels).float()).numpy()


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return _share_of(sum(values), len(values))


def _share_of(part: int, whole: int) -> float:
    return round(part / max(1, whole), 4)


def attribution(package: IconPackage, pairs: list[Pair]) -> str:
    """A Markdown page that names the author, source and licence of each set."""
    of_set = Counter(pair.icon.prefix for pair in pairs)

    def row(icons: IconSet) -> str:
        cells = icons.prefix, icons.title, icons.author, icons.licence, icons.url, f"{of_set[icons.prefix]:,}"
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [
        "# Attribution",
        "",
        "The pictures of this corpus were rendered from the icon sets below, without other changes. Each set keeps its "
        "licence. Logos and brand icons may be trademarks of their owners.",
        "",
        "| set | title | author | licence (SPDX) | source | pairs |",
        "|---|---|---|---|---|---:|",
        *(row(icons) for icons in package.sets.values() if of_set[icons.prefix]),
    ]
    return "\n".join(lines) + "\n"


def examples(pairs: list[Pair], read: Callable[[str], bytes]) -> Image.Image:
    """A picture with one row per concept: how design systems of the training split, then of the test split, draw it.

    Args:
        read: the PNG file of a key.
    """
    drawn_from = ("train", "test")
    drawn: dict[str, dict[str, dict[str, Pair]]] = defaultdict(lambda: {split: {} for split in SPLITS})
    for pair in pairs:
        if pair.concept in EXAMPLE_CONCEPTS:
            chosen = drawn[pair.concept][pair.split]
            if pair.system not in chosen or len(pair.icon.name) < len(chosen[pair.system].icon.name):
                chosen[pair.system] = pair
    pictures = {
        (concept, split): [
            Image.open(io.BytesIO(read(pair.key))).convert("RGB")
            for _, pair in sorted(drawn[concept][split].items())[:EXAMPLE_SYSTEMS]
        ]
        for concept in EXAMPLE_CONCEPTS
        for split in drawn_from
    }
    side = max((picture.width for row in pictures.values() for picture in row), default=1)
    step, label = side + 8, 64
    columns = {split: max(3, *(len(pictures[concept, split]) for concept in EXAMPLE_CONCEPTS)) for split in drawn_from}
    middle = label + columns["train"] * step + 24
    size = (middle + columns["test"] * step, 20 + step * len(EXAMPLE_CONCEPTS))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for split, left in zip(drawn_from, (label, middle)):
        draw.text((left, 2), f"{split} systems", fill="black", font=font)
        for number, concept in enumerate(EXAMPLE_CONCEPTS):
            top = 20 + number * step
            draw.text((2, top + side // 2 - 6), concept, fill="black", font=font)
            for column, picture in enumerate(pictures[concept, split]):
                sheet.paste(picture, (left + column * step, top + 4))
    return sheet
