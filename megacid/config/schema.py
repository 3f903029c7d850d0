"""The run file as a pydantic model: its sections (sections.py), what they must agree on, and DeepSpeed's part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from megacid.config import conditions as when
from megacid.config.conditions import check_effects, compares_with_teacher, terms_with_teacher
from megacid.config.fields import Section
from megacid.config.sections import (
    FEATURE_TOWER,
    ClassifierConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LossConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StudentConfig,
)
from megacid.errors import UserError


class MegacidConfig(Section):
    """The "megacid" block of a run file."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    classifier: Annotated[ClassifierConfig, when.ClusterTerm] = ClassifierConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> MegacidConfig:
        loss, data, student, schedule = self.loss, self.data, self.student, self.schedule
        if schedule.warmup_steps >= self.run.total_steps:
            raise UserError(
                f'"megacid.schedule.warmup_steps" is {schedule.warmup_steps}, expected fewer than run.total_steps, '
                f"{self.run.total_steps}"
            )
        if schedule.decay_start(self.run.total_steps) < schedule.warmup_steps:
            raise UserError(
                f'"megacid.schedule.decay_share" is {schedule.decay_share}, so the decay begins at step '
                f"{schedule.decay_start(self.run.total_steps)} of {self.run.total_steps}, expected at least "
                f"warmup_steps, {schedule.warmup_steps}: lower one of the two"
            )
        source = "shards" if data.features is None else "features"
        if (source == "features") != (student.model == FEATURE_TOWER):
            remedy = f'"{FEATURE_TOWER}"' if source == "features" else "an open_clip model, or set data.features"
            raise UserError(f'"megacid.student.model" is {student.model!r} but the data are {source}: write {remedy}')
        check_effects(self)
        if source == "features":
            self._features_are_classified()
        if data.teachers[1:]:
            self._teachers_fit()
        if loss.cluster and loss.gamma and data.labels_per_sample > 1:
            raise UserError(
                f'"megacid.data.labels_per_sample" is {data.labels_per_sample} and "megacid.loss.gamma" is '
                f"{loss.gamma}, expected one label for the KL: set labels_per_sample to 1, or gamma to 0"
            )
        for name, source_config in data.all_sources.items():
            self._source_is_complete(f"data.sources.{name}" if name else "data", source_config)
        if isinstance(temperatures := loss.affinity_temperature, tuple) and len(temperatures) != len(data.teachers):
            raise UserError(
                f'"megacid.loss.affinity_temperature" has {len(temperatures)} values, expected a number, or one for '
                f"each teacher in data.teacher ({len(data.teachers)}): write as many"
            )
        return self

    def _source_is_complete(self, path: str, source: SourceConfig) -> None:
        needs_teacher, (first, *_) = terms_with_teacher(self.loss), self.data.all_sources
        if needs_teacher and source.teacher is None:
            raise UserError(
                f'"megacid.{path}.teacher" is null but the term {needs_teacher[0]} needs teacher embeddings: name the '
                "output of tools/embed.py"
            )
        if len(source.teachers) != len(self.data.teachers):
            raise UserError(
                f'"megacid.{path}.teacher" names {len(source.teachers)} teachers, expected {len(self.data.teachers)} '
                f"as in source {first}: name the same teachers in the same order"
            )
        if self.loss.cluster and source.labels is None:
            raise UserError(
                f'"megacid.{path}.labels" is null but the term cluster needs labels: name the output of '
                "tools/cluster.py"
            )

    def _teachers_fit(self) -> None:
        joint_width = compares_with_teacher(self.loss) or self.student.embed_dim is None
        if joint_width and self.loss.cluster and self.classifier.init == "centroids":
            raise UserError(
                f'"megacid.classifier.init" is "centroids", which have the width of one teacher, but the student has '
                f'that of {len(self.data.teachers)} teachers together: write "random"'
            )

    def _features_are_classified(self) -> None:
        if self.student.embed_dim is None:
            raise UserError(
                f'"megacid.student.embed_dim" is null, expected the width of {FEATURE_TOWER}: write for example 512'
            )
        if not self.loss.cluster:
            raise UserError(
                f'"megacid.loss.cluster" is {self.loss.cluster}, expected > 0: features train no other term than '
                "cluster"
            )
        if self.classifier.init == "centroids":
            raise UserError(
                '"megacid.classifier.init" is "centroids" but data.features has none: write "random", or the path of '
                "a .npy file"
            )


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in MegacidConfig.model_fields.items()}  # type: ignore[misc]


def defaults() -> dict[str, dict[str, Any]]:
    """section -> field -> default, for the fields that have one."""
    return {
        name: {key: field.default for key, field in section.model_fields.items() if not field.is_required()}
        for name, section in SECTIONS.items()
    }


@dataclass(frozen=True)
class RunFile:
    """A checked run file: the "megacid" block and, as `deepspeed`, the configuration that DeepSpeed gets."""

    path: Path
    megacid: MegacidConfig
    deepspeed: dict[str, Any]

    @property
    def directory(self) -> Path:
        return Path(self.megacid.run.dir) / self.megacid.run.name

    @property
    def gradient_clipping(self) -> float:
        return float(self.deepspeed["gradient_clipping"])

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def bf16(self) -> bool:
        return bool(self.deepspeed.get("bf16", {}).get("enabled", False))

    @property
    def global_batch(self) -> int:
        return int(self.deepspeed["train_batch_size"])

    @property
    def micro_batch(self) -> int:
        return int(self.deepspeed["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        return int(self.deepspeed["gradient_accumulation_steps"])

    @property
    def grad_reduction(self) -> Literal["mean", "sum"]:
        return "sum" if self.deepspeed.get("gradient_allreduce_op", "mean") == "sum" else "mean"

    def with_embed_dim(self, embed_dim: int) -> RunFile:
        """The same run with the student's width filled in."""
        student = self.megacid.student.model_copy(update={"embed_dim": embed_dim})
        return dataclasses.replace(self, megacid=self.megacid.model_copy(update={"student": student}))

    def resolved(self) -> dict[str, Any]:
        """The run file with every default filled in, as JSON-able values."""
        return {**self.deepspeed, "megacid": self.megacid.model_dump()}
