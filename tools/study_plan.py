"""The file of a study: its settings, and the stages and training runs that follow from them.

Legend: OUT is the directory of the study; a stage is one offline step that several arms share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import hjson
from pydantic import BeforeValidator, Field, ValidationError

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.config.fields import Count, FilePath, FractionAboveZero, Section, Width, as_tuple
from megacid.config.load import load_run
from megacid.config.messages import user_error
from megacid.config.schema import RunFile, defaults
from megacid.errors import UserError, nearest, one_line
from megacid.storage.atomic import SETTINGS_BYTES, read_bounded
from megacid.training.run_settings import MAY_CHANGE, flat

TEACHER = "teacher"  # name of the teacher's stage, and of its row in the tables
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Rates = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1), BeforeValidator(as_tuple)
]  # learning rates
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


def digest(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StudyFile:
    """A checked study file; in `arms` the settings of `like` are filled in."""

    path: Path
    study: Study
    clusters: dict[str, Clusters]
    subsets: dict[str, Subset]
    arms: dict[str, Arm]
    groups: dict[str, tuple[str, ...]]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Arms of these groups, or with these names; all without a name. Then the arms that they are compared with.

        Raises UserError for an unknown name.
        """
        arms: list[str] = []
        for name in names or self.groups:
            if name not in self.groups and name not in self.arms:
                raise UserError(
                    f"--arms has {name!r}, which {self.path} lacks: {nearest(name, [*self.groups, *self.arms])}"
                )
            arms += self.groups.get(name, (name,))
        for arm in list(arms):
            arms += self.arms[arm].against
        return list(dict.fromkeys(arms))


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
    arms = {name: _compared(name, arm, study) for name, arm in arms.items()}
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


def _compared(name: str, arm: Arm, study: Study) -> Arm:
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


# ---- stages and runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A step that arms share.

    Attributes:
        settings: JSON-able, what decides its result apart from the stages in `needs`.
        digest: of the settings and of all stages before.
    """

    name: str
    settings: dict[str, Any]
    needs: tuple[Stage, ...] = ()
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        value = digest([self.name, self.settings, [stage.digest for stage in self.needs]])
        object.__setattr__(self, "digest", value)


@dataclass(frozen=True)
class Run:
    """One training run of an arm.

    Attributes:
        changes: overrides of the students' run file.
        settings: what the run file then has apart from the defaults and from paths.
        digest: of the settings, the number of ranks, and the stages that it reads.
    """

    arm: str
    rate: float
    seed: int
    changes: tuple[str, ...]
    settings: dict[str, Any]
    digest: str

    @property
    def name(self) -> str:
        return run_name(self.arm, self.rate, self.seed)


def run_name(arm: str, rate: float, seed: int) -> str:
    return f"{arm}-lr-{rate:g}-seed-{seed}"


def settings_of(run: RunFile) -> dict[str, Any]:
    """The settings of a run that decide its result and differ from the defaults, without paths."""
    usual = flat({"megacid": defaults()})
    free = (*MAY_CHANGE, *(f"megacid.{key}" for key in OWN_KEYS))
    return {
        key: value
        for key, value in flat(run.resolved()).items()
        if usual.get(key) != value and not any(key == name or key.startswith(name + ".") for name in free)
    }


class Plan:
    """Stages and runs of a study over a corpus. Relative paths of the stages are those of OUT."""

    def __init__(self, file: StudyFile, out: Path, corpus: Path, corpus_digest: str) -> None:
        self.file, self.out, self.corpus = file, out, corpus
        self.teacher_run = load_run(file.study.teacher, self.teacher_changes(), world=file.study.ranks)
        self.index = Stage("index", {"corpus": corpus_digest})
        settings = {**settings_of(self.teacher_run), "ranks": file.study.ranks, "seed": file.study.seeds[0]}
        self.teacher = Stage(TEACHER, settings, (self.index,))
        self.embeddings = Stage("embeddings", {}, (self.teacher,))

    @property
    def shards(self) -> Path:
        return self.corpus / "train"

    def teacher_changes(self) -> list[str]:
        where = (f"run.dir={json.dumps(str(self.out / 'runs'))}", f"run.name={TEACHER}")
        return [*where, f"run.seed={self.file.study.seeds[0]}", f"data.shards={json.dumps(str(self.shards))}"]

    def clusters(self, name: str) -> Stage:
        found = self.file.clusters[name]
        before = (self.embeddings,) if found.of is None else (self.embeddings, self.subset(found.of))
        return Stage(f"clusters/{name}", {"k": found.k, "top_labels": found.top_labels}, before)

    def subset(self, name: str) -> Stage:
        found = self.file.subsets[name]
        if found.random_as is not None:
            return Stage(f"subsets/{name}", {"random": True}, (self.subset(found.random_as),))
        if found.one_of is not None:
            return Stage(f"subsets/{name}", {"share": found.share, "one_of": found.one_of}, (self.index,))
        settings: dict[str, Any] = {"share": found.share, "keep": found.keep}
        if found.link != "components":  # its default has no place in the digests of stored results
            settings["link"] = found.link
        if found.clusters is None:
            return Stage(f"subsets/{name}", settings | {"cells": found.cells}, (self.embeddings,))
        return Stage(f"subsets/{name}", settings, (self.clusters(found.clusters),))

    def run(self, arm: str, rate: float, seed: int) -> Run:
        """Raises UserError when the arm's settings are no valid run file."""
        found, study = self.file.arms[arm], self.file.study
        clusters = self.file.clusters[found.clusters] if found.clusters is not None else None
        needs: list[Stage] = [self.embeddings if found.teacher else self.index]
        values: dict[str, Any] = {"run.name": run_name(arm, rate, seed), "run.dir": str(self.out / "runs")}
        values |= {"run.seed": seed, LEARNING_RATE: rate}
        if clusters is not None:
            needs.append(self.clusters(str(found.clusters)))
            values["data.labels"] = str(self.out / needs[-1].name)
        subset = found.subset
        if clusters is not None and clusters.of is not None:
            if subset not in (None, clusters.of):
                raise UserError(f"{arm} has the subset {subset!r} and clusters of {clusters.of!r}: name one of them")
            subset = clusters.of
        if subset is not None:
            needs.append(self.subset(subset))
            values["data.keep"] = str(self.out / needs[-1].name)
        values["data.shards"] = str(self.shards)
        if found.teacher:
            values["data.teacher"] = str(self.out / "embeddings")
        changes = (*found.set, *(f"{key}={json.dumps(value)}" for key, value in values.items()))
        try:
            settings = settings_of(load_run(study.student, list(changes), world=study.ranks))
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from None
        value = digest([settings, seed, study.ranks, sorted({stage.digest for stage in needs})])
        return Run(arm, rate, seed, changes, settings, value)

    def stages(self, arms: Iterable[str]) -> list[Stage]:
        """The teacher and what these arms need, each stage once, in the order of work."""
        ordered: dict[str, Stage] = {}

        def add(stage: Stage) -> None:
            for before in stage.needs:
                add(before)
            if stage is not self.index:  # its digest is known, so it is done
                ordered.setdefault(stage.name, stage)

        add(self.teacher)
        for arm in arms:
            found = self.file.arms[arm]
            if found.teacher:
                add(self.embeddings)
            if found.clusters is not None:
                add(self.clusters(found.clusters))
            if found.subset is not None:
                add(self.subset(found.subset))
        return list(ordered.values())

    def rates(self, arm: str) -> tuple[float, ...]:
        return self.file.arms[arm].rates or self.file.study.rates
