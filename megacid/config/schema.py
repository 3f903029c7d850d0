"""The run file as frozen dataclasses. The text below each field is its documentation in docs/configuration.md."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RunConfig:
    """Name, length, checkpoints and limits of the run."""

    name: str
    """Name of the run, without "/". Its directory is `dir`/`name`."""
    total_steps: int
    """Number of optimizer steps of the whole run, > 0."""
    dir: str = "runs"
    """Parent directory of the run directory. A leading ~ is expanded in all paths; variables ($NAME) are refused."""
    seed: int = 0
    """Seed of initialisation, sample order, class sampling and augmentation, >= 0."""
    save_every: int = 1000
    """Steps between checkpoints, > 0. The last step is always saved."""
    keep_last: int = 2
    """Number of newest checkpoints to keep, >= 2, since a crash may damage the newest one."""
    log_every: int = 10
    """Steps between log lines and tensorboard points, > 0."""
    timeout_s: float = 600.0
    """Seconds without progress after which the watchdog names the stalled rank and ends the run, > 0."""
    save_timeout_s: float = 1800.0
    """The same limit in seconds for the first step and while a checkpoint is saved, > 0."""
    save_in_background: bool = False
    """Write checkpoints while training continues. Needs host memory for a copy of each rank's part; same guarantees."""
    check_every: int = 200
    """Steps between checks that all ranks are at the same step with the same student, >= 0; 0: never."""


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained."""

    model: str
    """An open_clip model name, a model of megacid/models/configs, or "feature-mlp", an MLP over data.features."""
    embed_dim: int | None = None
    """Width of the joint embedding; null: the teacher's, without a teacher the model's own. Required by feature-mlp."""
    image_size: int | None = None
    """Side of the square input image in pixels; null: the model's own."""
    context_length: int | None = None
    """Number of text tokens; null: the model's own."""
    pretrained: str | None = None
    """Initial weights: an open_clip tag or a local checkpoint; null: random."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    hidden: int = 512
    """Width of the hidden layers of feature-mlp, > 0."""
    layers: int = 2
    """Number of hidden layers of feature-mlp, >= 0."""


@dataclass(frozen=True)
class DataConfig:
    """Training data and the outputs of the offline tools."""

    shards: str | None = None
    """Directory of .tar shards in img2dataset's or webdataset's layout. Set exactly one of shards and features."""
    features: str | None = None
    """Directory of labelled feature vectors, as tools/synthesize.py features writes it. Set this or shards."""
    teacher: str | None = None
    """Output of tools/embed.py. Required by loss.instance, loss.mse, and by loss.cluster with beta or gamma."""
    labels: str | None = None
    """Output of tools/cluster.py. Required by loss.cluster on shards."""
    labels_per_sample: int = 1
    """Number of nearest clusters that label a sample, > 0: 1 is CLIP-CID, more is MLCD (cluster.py --top-labels)."""
    keep: str | None = None
    """Output of tools/balance.py; null: every sample is used."""
    augment: Literal["none", "random_resized_crop"] = "none"
    """Image augmentation, seeded per sample."""
    workers: int = 0
    """Number of loader processes per rank, >= 0; 0 decodes in the training process."""
    worker_timeout_s: float = 120.0
    """Seconds without a batch from a loader process after which the run ends with an error, > 0."""
    block_shards: int = 16
    """Number of shards or feature files shuffled together, > 0. More mixes better, fewer reads more locally."""
    error_budget: float = 0.001
    """Fraction of undecodable samples above which the run ends, 0 to 1."""
    max_image_pixels: int = 64_000_000
    """Images with more pixels are skipped before they are decoded, > 0 and at most 89478485."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. A term of weight 0 is not computed."""

    contrastive: float = 0.0
    """Weight of CLIP's contrastive loss between the student's images and texts, >= 0."""
    instance: float = 0.0
    """Weight of instance discrimination distillation, >= 0."""
    cluster: float = 0.0
    """Weight (lambda) of cluster discrimination distillation, >= 0."""
    mse: float = 0.0
    """Weight of the squared distance of student and teacher embeddings, of images and texts, >= 0."""
    alpha: float = 1.0
    """Inside cluster: weight of the cross-entropy of the student and the label, >= 0."""
    beta: float = 0.0
    """Inside cluster: weight of the cross-entropy of the teacher's embedding and the label, >= 0. [assumed]"""
    gamma: float = 0.0
    """Inside cluster: weight of KL(teacher || student), >= 0. [assumed]"""
    cluster_temperature: float = 1.0
    """Inside cluster: temperature of the KL, > 0. [assumed]"""
    temperature: float | None = None
    """Fixed temperature of the contrastive and instance losses, >= 0.01; null: learned, 1/temperature <= 100."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The class-sharded margin classifier of loss.cluster, and its optimizer."""

    sample_rate: float = 0.1
    """Fraction of each rank's classes sampled per step, above 0, up to 1. Positive classes are always included."""
    m1: float = 1.0
    """SphereFace factor of the margin cos(m1 * theta + m2) - m3 on the target class, >= 1."""
    m2: float = 0.0
    """ArcFace angle of the margin in radians, >= 0."""
    m3: float = 0.3
    """CosFace offset of the margin, >= 0."""
    margin_grad: Literal["exact", "straight_through"] = "exact"
    """Derivative of the margin: exact, or 1 (straight_through) as in insightface's ArcFace."""
    scale: float = 64.0
    """Logit scale s, > 0."""
    feature_rate: float = 1.0
    """Fraction of the embedding's dimensions used per step (UNICOM), above 0, up to 1."""
    filter_threshold: float | None = None
    """Negatives with a larger cosine are left out of the denominator; null: none."""
    log_q: bool = False
    """Weight sampled negatives by 1 / their probability, which makes the softmax denominator unbiased."""
    weight_grad: Literal["stored", "recomputed"] = "stored"
    """Gradient of the class rows: stored, or recomputed in slabs (less memory, twice the arithmetic)."""
    init: str = "centroids"
    """Initial rows: centroids (of data.labels), random (N(0, 0.01)), or the path of a .npy or .safetensors file or of a
    directory of per-rank insightface checkpoints."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Row-sparse optimizer of the class rows."""
    lr: float | None = None
    """Peak learning rate of the class rows; null: the student's."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Weight decay of the rows that a step updates, >= 0; decoupled in AdamW."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Storage of the row optimizer's moments. bf16 halves their memory and uses stochastic rounding."""
    lazy: Literal["none", "decay"] = "none"
    """What a row catches up on when it is sampled again: nothing, or the decays of the steps between."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rates of student and classifier, as fractions of their peaks."""

    warmup_steps: int = 0
    """Steps of linear warm-up, >= 0 and fewer than run.total_steps."""
    kind: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to final_share, or constant."""
    final_share: float = 0.0
    """Fraction of the peak learning rate at the end of the cosine, 0 to 1."""


@dataclass(frozen=True)
class GuardConfig:
    """When steps are skipped, and when the run ends because of them."""

    max_consecutive_skips: int = 5
    """Number of skipped steps in a row at which the run ends, > 0."""
    max_skipped_share: float = 0.01
    """Fraction of the last 1000 steps that may be skipped before the run ends, 0 to 1."""
    spike: Literal["off", "skip", "lower", "abort"] = "off"
    """Reaction to a loss spike: none, skip the step, multiply its gradients by 0.1 (lower), or end the run (abort)."""
    spike_deviations: float = 10.0
    """A spike is a loss above the median of the last 200 by this many median absolute deviations, > 0."""


@dataclass(frozen=True)
class MegacidConfig:
    """The "megacid" block of a run file."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


def defaults() -> dict[str, dict[str, Any]]:
    """section -> field -> default, for the fields that have one."""
    sections = typing.get_type_hints(MegacidConfig)
    return {
        name: {f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING}
        for name, section in sections.items()
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
        student = dataclasses.replace(self.megacid.student, embed_dim=embed_dim)
        return dataclasses.replace(self, megacid=dataclasses.replace(self.megacid, student=student))

    def resolved(self) -> dict[str, Any]:
        """The run file with every default filled in, as JSON-able values."""
        return {**self.deepspeed, "megacid": dataclasses.asdict(self.megacid)}
