"""The run file's "megacid" block as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RunConfig:
    name: str
    """Name of the run; its directory is `dir`/`name`."""
    total_steps: int
    """Optimizer steps of the whole run, > 0."""
    dir: str = "runs"
    """Where run directories stand."""
    seed: int = 0
    """Seed of initialisation, sample order, sampling of classes, augmentation; >= 0."""
    save_every: int = 1000
    """Steps between checkpoints, > 0; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept, >= 2: the newest may be the one that a crash damages."""
    log_every: int = 10
    """Steps between log lines and tensorboard points, > 0."""
    timeout_s: float = 600.0
    """Seconds without progress until the watchdog names the stalled rank and ends the run, > 0."""
    save_timeout_s: float = 1800.0
    """The same while a checkpoint is saved, > 0."""
    save_in_background: bool = False
    """Copy to host memory and write while training goes on: needs that memory twice, same guarantees."""
    check_every: int = 200
    """Steps between checks that all ranks hold the same step, settings and student, >= 0; 0: only at the start."""


@dataclass(frozen=True)
class StudentConfig:
    model: str
    """open_clip model name, or one of configs/models/; "feature-mlp": a small tower over data.features."""
    embed_dim: int | None = None
    """Width of the joint embedding; null: the teacher's (data.teacher) or else the model's own; feature-mlp needs it."""
    image_size: int | None = None
    """Pixels; null: the model's own."""
    context_length: int | None = None
    """Text tokens; null: the model's own."""
    pretrained: str | None = None
    """open_clip tag or local checkpoint to start from; null: from scratch."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    hidden: int = 512
    """Only for feature-mlp: width of its hidden layers, > 0."""
    layers: int = 2
    """Only for feature-mlp: number of hidden layers, >= 0."""


@dataclass(frozen=True)
class DataConfig:
    shards: str | None = None
    """Directory of .tar shards (img2dataset or webdataset layout); this or features."""
    features: str | None = None
    """Directory of class-labelled feature vectors (tools/synthesize.py features) instead of shards."""
    teacher: str | None = None
    """Directory written by tools/embed.py; needed by the terms instance, mse and by beta, gamma of cluster."""
    labels: str | None = None
    """Directory written by tools/cluster.py; needed by the term cluster."""
    labels_per_sample: int = 1
    """Nearest clusters that are a sample's labels, > 0: 1 is CLIP-CID, more is MLCD's loss (tools/cluster.py --top-labels)."""
    keep: str | None = None
    """Directory written by tools/balance.py; null: every sample is used."""
    augment: Literal["none", "random_resized_crop"] = "none"
    """Training augmentation, seeded per sample."""
    workers: int = 0
    """Loader processes per rank, >= 0; 0 decodes in the training process."""
    worker_timeout_s: float = 120.0
    """Seconds until a loader process that gives nothing is an error, > 0; only with workers."""
    block_shards: int = 16
    """Shards (files of features) that are shuffled together, > 0; larger mixes better, smaller reads more locally."""
    error_budget: float = 0.001
    """Share of samples that may be undecodable before the run ends, 0 to 1."""
    max_image_pixels: int = 64_000_000
    """Images with more pixels are refused before they are decoded."""


@dataclass(frozen=True)
class LossConfig:
    contrastive: float = 0.0
    """Weight of CLIP's student-student loss, >= 0."""
    instance: float = 0.0
    """Weight of instance discrimination distillation, >= 0."""
    cluster: float = 0.0
    """Weight (lambda) of cluster discrimination distillation, >= 0."""
    mse: float = 0.0
    """Weight of |student - teacher|^2 of the image and text embeddings, >= 0."""
    alpha: float = 1.0
    """Inside cluster: weight of CE(student, label), >= 0."""
    beta: float = 0.0
    """Inside cluster: weight of CE(teacher embedding, label), >= 0. [assumed]"""
    gamma: float = 0.0
    """Inside cluster: weight of KL(teacher || student), >= 0. [assumed]"""
    cluster_temperature: float = 1.0
    """Temperature of the KL, > 0. [assumed]"""
    temperature: float | None = None
    """Fixed temperature tau of the contrastive matrices; null: learned, 1/tau <= 100."""


@dataclass(frozen=True)
class ClassifierConfig:
    sample_rate: float = 0.1
    """Share of each rank's classes drawn per step, positives always among them; above 0, up to 1."""
    m1: float = 1.0
    """Margin cos(m1*theta + m2) - m3 on the target: SphereFace factor, >= 1."""
    m2: float = 0.0
    """ArcFace angle in radians, >= 0."""
    m3: float = 0.3
    """CosFace offset, >= 0."""
    margin_grad: Literal["exact", "straight_through"] = "exact"
    """Derivative of the margin: exact, or 1 as in insightface's ArcFace."""
    scale: float = 64.0
    """Logit scale s, > 0."""
    feature_rate: float = 1.0
    """Share of the embedding's dimensions used per step, above 0, up to 1."""
    filter_threshold: float | None = None
    """Negatives with a larger cosine leave the denominator; null: none do."""
    log_q: bool = False
    """Weigh sampled negatives by 1 / their chance, so that the denominator is unbiased for the one over all classes."""
    weight_grad: Literal["stored", "recomputed"] = "stored"
    """Gradient of the class rows: stored until the update, or recomputed in slabs: less memory, twice the arithmetic."""
    init: str = "centroids"
    """Start rows: centroids (of data.labels), random (N(0, 0.01)), or a path: .npy, .safetensors, or a directory of per-rank insightface checkpoints."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Row-sparse optimizer of the class rows."""
    lr: float | None = None
    """Peak learning rate of the rows; null: the student's."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Weight decay of the rows that a step touches, >= 0; decoupled in AdamW."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Storage of the row optimizer's averages; bf16 halves their memory and rounds at random without bias."""
    lazy: Literal["none", "decay"] = "none"
    """What a row owes for the steps that did not draw it: nothing, or the decays of weight and moments when it is used again."""


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int = 0
    """Steps of linear warm-up, >= 0."""
    kind: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to final_share, or constant."""
    final_share: float = 0.0
    """Share of the peak learning rate at the last step, 0 to 1."""


@dataclass(frozen=True)
class GuardConfig:
    max_consecutive_skips: int = 5
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run ends, > 0."""
    max_skipped_share: float = 0.01
    """Share of the last 1000 steps that may be skipped before the run ends, 0 to 1."""
    spike: Literal["off", "skip", "lower", "abort"] = "off"
    """What a loss spike does: nothing, skip the step, multiply its gradients by 0.1, or end the run."""
    spike_deviations: float = 10.0
    """A spike is a loss above median + this many median absolute deviations of the last 200 losses, > 0."""


@dataclass(frozen=True)
class MegacidConfig:
    """The "megacid" block."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


def defaults() -> dict[str, dict[str, Any]]:
    """section -> field -> default, of the fields that have one."""
    sections = typing.get_type_hints(MegacidConfig)
    return {
        name: {f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING}
        for name, section in sections.items()
    }


@dataclass(frozen=True)
class RunFile:
    """A loaded, linted run file. `megacid` is the block, `deepspeed` what DeepSpeed gets, `path` where it came from."""

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
        """The same run with the student's width written out."""
        student = dataclasses.replace(self.megacid.student, embed_dim=embed_dim)
        return dataclasses.replace(self, megacid=dataclasses.replace(self.megacid, student=student))

    def resolved(self) -> dict[str, Any]:
        return {**self.deepspeed, "megacid": dataclasses.asdict(self.megacid)}
