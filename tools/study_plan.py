"""The stages and training runs that follow from a study file.

Legend: OUT is the directory of the study; a stage is one offline step that several arms share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.config.load import load_run
from megacid.config.schema import RunFile, defaults
from megacid.errors import UserError
from megacid.training.run_settings import MAY_CHANGE, flat
from study_file import LEARNING_RATE, OWN_KEYS, TEACHER, StudyFile


def digest(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


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
        subset = self.file.subset_of(arm)
        if clusters is not None and clusters.of not in (None, subset):
            raise UserError(f"{arm} has the subset {subset!r} and clusters of {clusters.of!r}: name one of them")
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
