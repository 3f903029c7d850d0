"""The file of a study: its arms, seeds, learning rates, clusterings and subsets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import hjson
from pydantic import BeforeValidator, Field, ValidationError

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.config.fields import Count, FilePath, FractionAboveZero, Section, Width, as_tuple
from megacid.config.messages import user_error
from megacid.errors import UserError, nearest, one_line
from megacid.storage.atomic import SETTINGS_BYTES, read_bounded

TEACHER = "teacher"  # name of the teacher's stage, and of its row in the tables
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Rate = Annotated[float, Field(gt=0)]  # learning rate
Rates = Annotated[tuple[Rate, ...], Field(min_length=1), BeforeValidator(as_tuple)]
OWN_KEYS = ("run.name", "run.dir", "run.seed", "data.shards", "data.teacher", "data.labels", "data.keep")
LEARNING_RATE = "optimizer.params.lr"


class Clusters(Section):
    """A clustering of the teacher's image embeddings."""

    k: Count
    """Number of clusters."""
    top_labels: Width = 1
    """Number of labels stored per pair."""
    of: str | None = None
    """Subset whose pairs are clustered; null: all pairs."""


class Subset(Section):
    """The pairs that an arm trains on: what balance keeps, one pair of each value in a column, or a random subset."""

    share: FractionAboveZero | None = None
    """Share of the pairs that is kept. Set this or random_as."""
    clusters: str | None = None
    """Clusters inside which balance compares pairs. Set one of this, cells and one_of with share."""
    cells: Count | None = None
    """Number of coarse clusters that balance makes for itself, so that it can come before clustering."""
    one_of: str | None = None
    """Column of the corpus's pairs.parquet, such as family: one pair of each value is kept, and others at random up to
    the share. What balance would keep if it knew."""
    link: Literal["components", "greedy", "semdedup"] = "components"
    """How balance makes groups of similar pairs."""
    keep: Literal["nearest", "farthest", "random", "caption", "medoid"] = "nearest"
    """Which pair of a group balance keeps."""
    random_as: str | None = None
    """Name of the subset whose size a random one has."""


class Arm(Section):
    """A way to train a student."""

    like: str | None = None
    """Arm whose settings this one starts from; those below replace or extend them."""
    set: Texts = ()
    """Overrides of the students' run file, SECTION.KEY=VALUE."""
    teacher: bool | None = None
    """Whether the arm reads the teacher's embeddings. null: as `like`, else false."""
    clusters: str | None = None
    """Clusters whose labels and centroids the arm uses. null: as `like`, else none."""
    subset: str | None = None
    """Subset that the arm trains on. null: as `like`, else all pairs."""
    rates: Rates | None = None
    """Learning rates to choose from. null: as `like`, else those of the study."""
    against: Texts = ()
    """Arms that this one is compared with. []: the study's base."""


class Study(Section):
    """The settings of a study."""

    corpus: FilePath
    """Output of tools/prepare_icons.py."""
    teacher: FilePath
    """Run file of the teacher."""
    student: FilePath
    """Run file of the students; arms override its settings."""
    ranks: Count
    """Number of ranks of a training run."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1), BeforeValidator(as_tuple)]
    """Seeds of the students. The first chooses the learning rate and trains the teacher."""
    rates: Rates
    """Learning rates to choose from, for each arm."""
    tune_on: str = "acc1"
    """Metric of the validation sets by which the learning rate is chosen."""
    base: str
    """Arm that the others are compared with."""
    validation: Texts
    """Evaluation sets of the corpus by which settings are chosen. Metrics of the sets seldom-... begin with seldom_."""
    test: Texts
    """Evaluation sets of the corpus that --test evaluates."""
    clusters: dict[str, Any] = Field(default_factory=dict)
    subsets: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, Any]
    """Groups of arms."""


Block = TypeVar("Block", bound=Section)


def _build(model: type[Block], block: Any, where: str) -> Block:
    """A block of the file. Raises UserError for unknown, missing and wrong keys."""
    if not isinstance(block, dict):
        raise UserError(f"{where} is {json.dumps(block, default=str)[:80]}, expected a block {{...}}: correct it")
    for key in block:
        if key not in model.model_fields:
            raise UserError(f'{where} has the unknown key "{key}": {nearest(key, list(model.model_fields))}')
    for key, info in model.model_fields.items():
        if info.is_required() and key not in block:
            raise UserError(f'{where} has no "{key}", expected it: add it')
    try:
        return model.model_validate(block)
    except ValidationError as error:
        raise user_error(error, model, where) from None


@dataclass(frozen=True)
class StudyFile:
    """A checked study file; in `arms` the settings of `like` are filled in."""

    path: Path
    study: Study
    clusters: dict[str, Clusters]
    subsets: dict[str, Subset]
    arms: dict[str, Arm]
    groups: dict[str, tuple[str, ...]]

    def named(self, names: Iterable[str]) -> list[str]:
        """Arms of these groups, or with these names; all without a name. Raises UserError for an unknown name."""
        arms: list[str] = []
        for name in names or self.groups:
            if name not in self.groups and name not in self.arms:
                raise UserError(
                    f"--arms has {name!r}, which {self.path} lacks: {nearest(name, [*self.groups, *self.arms])}"
                )
            arms += self.groups.get(name, (name,))
        return list(dict.fromkeys(arms))

    def subset_of(self, arm: str) -> str | None:
        """The subset that an arm trains on, its own or that of its clusters; None: all pairs."""
        found = self.arms[arm]
        return found.subset or (None if found.clusters is None else self.clusters[found.clusters].of)

    def compared(self, arms: Sequence[str]) -> list[str]:
        """The arms that these are compared with, apart from these."""
        others = dict.fromkeys(other for arm in arms for other in self.arms[arm].against)
        return [other for other in others if other not in arms]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The named arms, then those that they are compared with."""
        arms = self.named(names)
        return [*arms, *self.compared(arms)]


def load_study(path: Path) -> StudyFile:
    """Read and check a study file, JSON or Hjson. Raises UserError."""
    try:
        tree = hjson.loads(read_bounded(path, SETTINGS_BYTES).decode(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"cannot read the study file {path} ({error.strerror}): correct its path") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"the study file {path} is neither JSON nor Hjson: {one_line(error)}") from None
    study = _build(Study, tree, str(path))
    clusters = {name: _build(Clusters, block, f"clusters.{name}") for name, block in study.clusters.items()}
    subsets = {name: _build(Subset, block, f"subsets.{name}") for name, block in study.subsets.items()}
    arms: dict[str, Arm] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for group, members in study.arms.items():
        if not isinstance(members, dict) or not members:
            raise UserError(f"arms.{group} is {json.dumps(members)[:80]}, expected a block of arms: correct it")
        for name, block in members.items():
            if name in arms or name == TEACHER:
                raise UserError(f'arms.{group} has the arm "{name}", whose name is taken: choose another')
            arms[name] = _inherit(_build(Arm, block, f"arms.{group}.{name}"), arms, f"arms.{group}.{name}")
        groups[group] = tuple(members)
    arms = {name: _against_base(name, arm, study) for name, arm in arms.items()}
    file = StudyFile(path, study, clusters, subsets, arms, groups)
    _check_names(file)
    return file


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'a block of the study file has "{name}" twice, expected it once: remove one')
    return dict(pairs)


def _inherit(arm: Arm, arms: dict[str, Arm], where: str) -> Arm:
    if arm.like is None:
        return arm
    if arm.like not in arms:
        raise UserError(f"{where}.like is {arm.like!r}, expected an arm above it: {nearest(arm.like, list(arms))}")
    like = arms[arm.like]
    own = {key: value for key, value in dict(arm).items() if value is not None}
    return like.model_copy(update={**own, "set": like.set + arm.set, "against": arm.against})


def _against_base(name: str, arm: Arm, study: Study) -> Arm:
    return arm if arm.against or name == study.base else arm.model_copy(update={"against": (study.base,)})


def _check_names(file: StudyFile) -> None:
    """Every name in the file that refers to something exists."""
    clusters, subsets, arms = list(file.clusters), list(file.subsets), list(file.arms)
    references: list[tuple[str, str | None, list[str]]] = [("base", file.study.base, arms)]
    for name, cluster in file.clusters.items():
        references.append((f"clusters.{name}.of", cluster.of, subsets))
        if cluster.of in subsets and file.subsets[cluster.of].share is None:
            raise UserError(f"clusters.{name}.of is {cluster.of!r}, expected a subset with a share: correct it")
    for name, subset in file.subsets.items():
        where = f"subsets.{name}"
        if (subset.share is None) == (subset.random_as is None):
            raise UserError(f"{where} has both or none of share and random_as, expected one: correct it")
        given = [key for key in ("clusters", "cells", "one_of") if getattr(subset, key) is not None]
        if len(given) != (subset.share is not None):
            wanted = "none of them with random_as" if subset.share is None else "one of clusters, cells and one_of"
            raise UserError(f"{where} has {' and '.join(given) or 'only a share'}, expected {wanted}: correct it")
        references.append((f"{where}.clusters", subset.clusters, clusters))
        references.append((f"{where}.random_as", subset.random_as, subsets))
        if subset.random_as is not None and file.subsets.get(subset.random_as, subset).share is None:
            raise UserError(f"{where}.random_as is {subset.random_as!r}, expected a subset with a share: correct it")
        if subset.clusters is not None and getattr(file.clusters.get(subset.clusters), "of", None) is not None:
            raise UserError(f"{where}.clusters is {subset.clusters!r}, expected clusters of all pairs: correct it")
    for name, arm in file.arms.items():
        references += [(f"{name}.clusters", arm.clusters, clusters), (f"{name}.subset", arm.subset, subsets)]
        references += [(f"{name}.against", other, arms) for other in arm.against]
        for change in arm.set:
            key = change.partition("=")[0].removeprefix("megacid.")
            if key in (*OWN_KEYS, LEARNING_RATE):
                raise UserError(f"{name}.set has {change!r}, but the study sets {key} itself: use the keys of the arm")
    for where, value, known in references:
        if value is not None and value not in known:
            raise UserError(f"{where} is {value!r}, which {file.path} lacks: {nearest(value, known)}")
