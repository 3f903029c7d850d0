"""The generated part of docs/corpus.md, from docs/corpus/*.json: what tools/prepare_icons.py measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from icon_sets import SPLITS

Facts = dict[str, Any]
TITLES = {"iconify": "@iconify/json", "fonts": "qtawesome"}


def facts_of(summary: Facts, meta: Facts, before: Facts | None) -> Facts:
    """What docs/corpus/KIND.json keeps of a corpus: its summary with counts for names, and what a whole run took.

    Args:
        before: the earlier facts. Their run stays if this one was continued and made the same tars.
    """
    counts = {name: len(summary[name]) for name in ("no_caption", "no_picture")}
    run = {name: meta.get(name) for name in ("seconds", "cpu_seconds", "workers", "renderer")}
    facts = {**summary, **counts, "run": run}
    if run["cpu_seconds"] is None and before is not None and _tars_of(before) == _tars_of(facts):
        facts["run"] = before["run"]
    return facts


def _tars_of(facts: Facts) -> tuple[Any, ...]:
    """What decides the tars."""
    return facts["package"], facts["pairs"], facts["size"], facts["run"]["renderer"]


def page_part(corpora: list[Facts]) -> str:
    """Tables of sizes, licences and redundancy, one column per corpus, and an example picture of each."""
    heads = [f"`{TITLES[facts['package']['kind']]}` {facts['package']['version']}" for facts in corpora]
    parts = [
        "## Sizes",
        _table(heads, corpora, {**_SIZES, **_COST}),
        "## Held-out design systems",
        _held_out(heads, corpora),
        "## Licences",
        _licences(heads, corpora),
        "## Redundancy",
        _table(heads, corpora, _REDUNDANCY),
        "## Examples",
        *(_picture(head, facts) for head, facts in zip(heads, corpora)),
    ]
    return "\n\n".join(parts)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _split(name: str) -> Callable[[Facts], str]:
    def cell(facts: Facts) -> str:
        sizes = facts["splits"][name]
        return f"{sizes['pairs']:,} of {sizes['systems']}"

    return cell


def _set(name: str, *keys: str) -> Callable[[Facts], str]:
    def cell(facts: Facts) -> str:
        sizes = facts["evaluation_sets"].get(name)
        return "none" if sizes is None else " / ".join(f"{sizes[key]:,}" for key in keys)

    return cell


def _share(*path: str) -> Callable[[Facts], str]:
    def cell(facts: Facts) -> str:
        value: Any = facts
        for key in path:
            value = value[key]
        return percent(value)

    return cell


_SIZES: dict[str, Callable[[Facts], str]] = {
    "pairs": lambda facts: f"{facts['pairs']:,}",
    "side in pixels": lambda facts: f"{facts['size']}",
    **{f"`{split}`: pairs, of design systems": _split(split) for split in SPLITS},
    "different captions in `train`": lambda facts: f"{facts['splits']['train']['captions']:,}",
    "`concepts-validation`: classes / pictures": _set("concepts-validation", "classes", "test"),
    "`concepts-test`: classes / pictures": _set("concepts-test", "classes", "test"),
    "`seldom-validation`: classes / pictures": _set("seldom-validation", "classes", "test"),
    "`seldom-test`: classes / pictures": _set("seldom-test", "classes", "test"),
    "`retrieval-validation`, `retrieval-test`: pairs": lambda facts: (
        f"{_set('retrieval-validation', 'pairs')(facts)}, {_set('retrieval-test', 'pairs')(facts)}"
    ),
    "icons left out since they do not render": lambda facts: f"{facts['no_picture']:,}",
    "icons left out for a name that is no caption": lambda facts: f"{facts['no_caption']:,}",
}
_COST: dict[str, Callable[[Facts], str]] = {
    "CPU time": lambda facts: (
        "not measured" if facts["run"]["cpu_seconds"] is None else f"{facts['run']['cpu_seconds']:.0f} s"
    ),
}
_REDUNDANCY: dict[str, Callable[[Facts], str]] = {
    "training pairs whose family has other members": _share("redundancy", "share_in_families"),
    "training pairs beyond one per family": _share("redundancy", "beyond_one_per_family"),
    "training pairs beyond one per picture (equal bytes)": _share("redundancy", "equal_pictures"),
    "training pairs whose concept 2 or more systems draw": _share("redundancy", "share_in_concepts_of_2_systems"),
    "training pairs whose concept 10 or more systems draw": _share("redundancy", "share_in_concepts_of_10_systems"),
    "training pairs with a near neighbour": _share("nearest", "train", "near"),
    "... of the same family": _share("nearest", "train", "near_in_family"),
    "... of another family, same concept": _share("nearest", "train", "near_other_family_same_concept"),
    "validation pairs with a near neighbour in `train`": _share("nearest", "validation", "near"),
    "test pairs with a near neighbour in `train`": _share("nearest", "test", "near"),
    "test pairs with an equal picture in `train`": _share("nearest", "test", "equal_picture_in_train"),
}


def _table(heads: list[str], corpora: list[Facts], rows: dict[str, Callable[[Facts], str]]) -> str:
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {name} | {' | '.join(cell(facts) for facts in corpora)} |" for name, cell in rows.items()]
    return "\n".join(lines)


def _held_out(heads: list[str], corpora: list[Facts]) -> str:
    lines = ["| corpus | split | design systems |", "|---|---|---|"]
    for head, facts in zip(heads, corpora):
        for split in SPLITS[1:]:
            systems = sorted(facts["splits"][split]["pairs_per_system"])
            lines.append(f"| {head} | {split} | {', '.join(systems)} |")
    return "\n".join(lines)


def _licences(heads: list[str], corpora: list[Facts]) -> str:
    names = dict.fromkeys(name for facts in corpora for name in facts["licences"])

    def cell(facts: Facts, name: str) -> str:
        entry = facts["licences"].get(name)
        return f"{entry['pairs']:,} of {entry['sets']}" if entry else ""

    rows = {f"{name}: pairs, of sets": (lambda facts, name=name: cell(facts, name)) for name in names}
    left_out = [
        f"Left out of {head}: {', '.join(_licence_of(item) for item in facts['left_out'].items())}."
        for head, facts in zip(heads, corpora)
        if facts["left_out"]
    ]
    return "\n\n".join([_table(heads, corpora, rows), *left_out])


def _licence_of(left_out: tuple[str, Facts]) -> str:
    return f"{left_out[0]} ({left_out[1]['licence']})"


def _picture(head: str, facts: Facts) -> str:
    kind = facts["package"]["kind"]
    return f"{head}\n\n![Icons of some concepts in {TITLES[kind]}](images/corpus-{kind}.png)"
