"""Which icons are pairs of which split, and which pictures make the evaluation sets.

The splits are design systems held out whole: a system is in one split with all its sets and those drawn from it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from icon_names import caption_of, concept_of, stem_of, style_words, system_of
from icon_packages import Icon, IconPackage
from megacid.data.captions import is_blank
from megacid.data.order import KeyedPermutation, derive_key
from megacid.errors import UserError

SPLITS = ("train", "validation", "test")
RETRIEVAL_PAIRS = 5000
TEST_PICTURES = 4  # of a class and system, in the test split of a classification set
TEMPLATES = ("{c}", "{c} outline", "{c} filled")


class HeldOut(NamedTuple):
    """The design systems of the held-out splits, and which concepts become classes.

    least_systems, least_train_systems: a class is drawn in so many systems of its split, and of the training split.
    train_pictures: of a class and training system, in the train split of a classification set.
    """

    validation: str
    test: str
    least_systems: int
    least_train_systems: int
    train_pictures: int

    def split_of(self) -> dict[str, str]:
        return {system: split for split in SPLITS[1:] for system in getattr(self, split).split()}


HELD_OUT = {  # by kind of package
    "iconify": HeldOut(
        validation="ant-design basil circum ep iconoir ionicons lsicon mage octicon oui pajamas tdesign teenyicons "
        "unicons uiw",
        test="akar-icons bi carbon charm ci eva fe font-awesome gravity-ui heroicons humbleicons jam lucide "
        "majesticons proicons radix-icons system-uicons zondicons",
        least_systems=5,
        least_train_systems=8,
        train_pictures=1,
    ),
    "fonts": HeldOut(
        validation="remix",
        test="codicons elusive font-awesome",
        least_systems=1,
        least_train_systems=1,
        train_pictures=4,
    ),
}


class Pair(NamedTuple):
    """An icon with what its name says. The key says where it is: five digits of the tar, four of the row."""

    key: str
    split: str
    icon: Icon
    caption: str
    system: str
    stem: str
    concept: str

    @property
    def family(self) -> str:
        return f"{self.system}:{self.stem}"


@dataclass
class Plan:
    """The pairs of all splits in the order of their keys, and icons whose name is no caption."""

    pairs: list[Pair]
    no_caption: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """sha256 of where each icon is and of its caption, which decide the bytes of the tars."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(f"{pair.key}\0{pair.split}\0{pair.icon.prefix}:{pair.icon.name}\0{pair.caption}\n".encode())
        return digest.hexdigest()


def plan_pairs(package: IconPackage, per_tar: int) -> Plan:
    """Give every icon of the free sets its split and key. Raises UserError when a split has no icon."""
    held_out = HELD_OUT[package.kind]
    split_of = held_out.split_of()
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    no_caption = []
    for icons in package.sets.values():
        if not icons.is_free:
            continue
        system = system_of(icons.prefix)
        split = split_of.get(system, "train")
        styles = style_words(icons.drawings.keys(), icons.suffixes)
        for name, drawing in icons.drawings.items():
            caption = caption_of(name)
            if is_blank(caption):  # such as the icon "null"
                no_caption.append(f"{icons.prefix}:{name}")
                continue
            stem = stem_of(name, styles, icons.prefixes)
            icon = Icon(icons.prefix, name, drawing)
            found[split].append(Pair("", split, icon, caption, system, stem, concept_of(stem)))
    pairs: list[Pair] = []
    tars = 0
    for number, split in enumerate(SPLITS):
        if not found[split]:
            systems = getattr(held_out, split, "others than those held out")
            raise UserError(
                f"the package has no free icon for the split {split}, expected some of the design systems {systems}: "
                "take a complete package"
            )
        order = KeyedPermutation(len(found[split]), derive_key(number))(np.arange(len(found[split]))).tolist()
        for row, at in enumerate(order):
            key = f"{tars + row // per_tar:05d}{row % per_tar:04d}"
            pairs.append(found[split][at]._replace(key=key))
        tars += -(-len(order) // per_tar)
    return Plan(pairs, no_caption)


class Classification(NamedTuple):
    """Class names, and (key, class) of the pictures in each split of the set."""

    names: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def classification(pairs: Iterable[Pair], split: str, kind: str, *, seldom: bool = False) -> Classification:
    """A classification set of a held-out split: concepts of one word, drawn by many of its systems.

    The pictures to score are of the held-out systems, those of the linear probe's train split are of the training
    systems: a score says whether a model knows the concept, not the drawing.

    Args:
        seldom: instead the concepts that fewer training systems draw, but at least one of each split. May be empty.

    Raises:
        UserError: the set is empty.
    """
    by_concept: dict[str, dict[str, dict[str, list[Pair]]]] = defaultdict(
        lambda: {split: defaultdict(list) for split in SPLITS}
    )
    systems: dict[str, set[str]] = {split: set() for split in SPLITS}
    for pair in pairs:
        systems[pair.split].add(pair.system)
        if pair.concept.isalpha() and len(pair.concept) > 2:
            by_concept[pair.concept][pair.split][pair.system].append(pair)
    held_out = HELD_OUT[kind]
    least = min(held_out.least_systems, max(1, len(systems[split])))
    least_train = min(held_out.least_train_systems, max(1, len(systems["train"])))
    names = sorted(
        concept
        for concept, drawn in by_concept.items()
        if (
            drawn[split] and 1 <= len(drawn["train"]) < least_train
            if seldom
            else len(drawn[split]) >= least and len(drawn["train"]) >= least_train
        )
    )
    if not names and not seldom:
        raise UserError(
            f"no concept of one word is drawn by {least} design systems of the split {split} and {least_train} of the "
            "training split, so its classification set would be empty: take a complete package"
        )
    chosen = {
        part: [
            (pair.key, label)
            for label, name in enumerate(names)
            for _, of_system in sorted(by_concept[name][part].items())
            for pair in sorted(of_system, key=_draw)[:limit]
        ]
        for part, limit in ((split, TEST_PICTURES), ("train", held_out.train_pictures))
    }
    return Classification(names, chosen["train"], chosen[split])


def retrieval(pairs: Iterable[Pair], split: str, picture_of: Mapping[str, int]) -> list[Pair]:
    """At most RETRIEVAL_PAIRS pairs of a split, with each caption and each picture once: an equal one would be a second
    right answer.

    Args:
        picture_of: by key, the same number for pictures with equal bytes.
    """
    chosen: list[Pair] = []
    seen: set[str | int] = set()
    for pair in sorted((pair for pair in pairs if pair.split == split), key=_draw):
        caption_and_picture = {pair.caption.lower(), picture_of[pair.key]}
        if seen.isdisjoint(caption_and_picture):
            seen |= caption_and_picture
            chosen.append(pair)
    return chosen[:RETRIEVAL_PAIRS]


def _draw(pair: Pair) -> bytes:
    """A random order that depends on the icon alone."""
    return hashlib.sha256(f"{pair.icon.prefix}:{pair.icon.name}".encode()).digest()
