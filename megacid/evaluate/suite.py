"""Suites: the data sets that one call of tools/eval.py evaluates, by CLIP_benchmark's names.

A suite is a name of SUITES or a directory. A directory of CLIP_benchmark's repositories (wds_vtab-pets) and one with
the folders of its names (vtab/pets, wds/vtab/pets) give the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megacid.errors import UserError, nearest
from megacid.evaluate.datasets import Benchmark, dataset_type, load_benchmark
from megacid.evaluate.tasks import ADAMW, MULTILABEL_TASKS, RETRIEVAL_TASKS, TASKS, UNPROJECTED, json_file

# The paper's 14 sets as far as they can be told: docs/how-to/evaluate.md has the sources.
SUITES = {
    "clip_cid14": (
        *("food101", "vtab/cifar10", "vtab/cifar100", "birdsnap", "sun397", "cars", "fgvc_aircraft"),
        *("voc2007_multilabel", "vtab/dtd", "vtab/pets", "vtab/caltech101", "vtab/flowers", "stl10", "imagenet1k"),
    )
}
_FILES = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt", "test/nshards.txt")
_DEPTH = 3  # of wds/vtab/pets


def find_sets(directory: Path) -> dict[str, Path]:
    """The data sets in a directory, by name: folders with at least one of the files of a set, also incomplete ones.

    Raises:
        UserError: there is no set, or two sets have one name, or names that give one file of results.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory, expected one with data sets in CLIP_benchmark's layout")
    sets: dict[str, Path] = {}
    roots: dict[Path, Path] = {}  # by the file of results
    for root in sorted(_sets_in(directory, _DEPTH)):
        name = set_name(root.relative_to(directory).as_posix())
        file = json_file(Path(), name)
        if file in roots:
            raise UserError(
                f"{directory} has two sets of the name {name} ({roots[file]}, {root}), expected different ones, which "
                "name the results: rename a directory"
            )
        sets[name] = roots[file] = root
    if not sets:
        raise UserError(
            f"{directory} has no folder with {', '.join(_FILES[:-1])} or {_FILES[-1]}, expected data sets in "
            "CLIP_benchmark's layout: give the directory above them"
        )
    return sets


def _sets_in(directory: Path, depth: int) -> Iterator[Path]:
    for folder in directory.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            if any((folder / file).is_file() for file in _FILES):
                yield folder
            elif depth > 1:
                yield from _sets_in(folder, depth - 1)


def set_name(path: str) -> str:
    """The name of a set in results: CLIP_benchmark's without its prefix wds/. path: its folder, or a name with it."""
    name = path.removeprefix("wds/").removeprefix("wds_")
    return f"vtab/{name.removeprefix('vtab-')}" if name.startswith("vtab-") else name


def choose_sets(suite: str, data: Path | None) -> tuple[dict[str, Path], list[str]]:
    """The sets of a suite by name, and the names of those that are not there.

    Args:
        suite: a name of SUITES, or a directory, all of whose sets are the suite.
        data: the directory with the sets of a named suite. A folder may have the last part of a name alone, such as
            pets.

    Raises:
        UserError: an unknown name, no data, or not one of the sets is there.
    """
    if suite not in SUITES:
        if data is not None:
            raise UserError(f"--data is {data}, but --suite {suite} is not a named suite: {nearest(suite, [*SUITES])}")
        if not Path(suite).is_dir():
            raise UserError(f"--suite is {suite!r}, expected a directory or a named suite: {nearest(suite, [*SUITES])}")
        return find_sets(Path(suite)), []
    if data is None:
        raise UserError(f"--suite is {suite} without --data, expected both: add --data DIRECTORY, which has the sets")
    found = find_sets(data)
    sets = {name: found.get(name) or found.get(name.rpartition("/")[2]) for name in SUITES[suite]}
    present = {name: root for name, root in sets.items() if root is not None}
    if not present:
        raise UserError(f"{data} has none of the sets of {suite}, expected some of {', '.join(SUITES[suite])}")
    return present, [name for name in sets if name not in present]


def open_set(root: Path, name: str | None) -> Benchmark:
    """A classification set, or a retrieval set, which has neither class names nor templates. UserError if incomplete.

    name: of the set in results; None: the directory's name.
    """
    if dataset_type(root) == "retrieval":
        return Benchmark(root, name or root.resolve().name, [], [])
    return load_benchmark(root, name, multilabel=True)


def known_tasks(benchmark: Benchmark) -> list[str]:
    """The tasks of a set of this kind, but for those of `named_tasks`."""
    if benchmark.multilabel:
        return list(MULTILABEL_TASKS)
    return list(TASKS if benchmark.classnames else RETRIEVAL_TASKS)


def named_tasks(benchmark: Benchmark) -> list[str]:
    """The tasks of a set of this kind that run only where they are named."""
    if benchmark.multilabel:
        return [UNPROJECTED]
    return [UNPROJECTED, ADAMW] if benchmark.classnames else []
