"""The sections of the "megacid" block as pydantic models. The text below each field is its documentation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megacid.config import conditions as when
from megacid.config.fields import (
    Beta,
    Count,
    DirectoryName,
    FilePath,
    Fraction,
    FractionAboveZero,
    IndexedShards,
    LocalPath,
    OneOrSeveralPaths,
    OneOrSeveralTemperatures,
    Seconds,
    Section,
    Shards,
    Steps,
    TrackerNames,
    Weight,
    Width,
    as_tuple,
    named_blocks,
)
from megacid.errors import UserError

FEATURE_TOWER = "feature-mlp"


class RunConfig(Section):
    """Name, length, checkpoints and limits of the run."""

    name: DirectoryName
    """Name of the run, without "/". Its directory is `dir`/`name`."""
    total_steps: Steps
    """Number of optimizer steps of the whole run."""
    dir: LocalPath = "runs"
    """Parent directory of the run directory. A leading ~ is expanded in all paths; variables ($NAME) are refused."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initialisation, sample order, class sampling and augmentation."""
    save_every: Steps = 1000
    """Steps between checkpoints. The last step is always saved."""
    keep_last: Annotated[int, Field(ge=2, le=10**9)] = 2
    """Number of newest checkpoints to keep, at least 2, since a crash may damage the newest one."""
    log_every: Steps = 10
    """Steps between log lines and points of the trackers."""
    trackers: TrackerNames = ("tensorboard",)
    """Experiment trackers that show the run's scalars. wandb and trackio are packages of their own."""
    timeout_s: Seconds = 600.0
    """Seconds without progress after which the watchdog names the stalled rank and ends the run."""
    start_timeout_s: Seconds = 600.0
    """Seconds to wait for all ranks to start. A line every 30 s names those that are missing."""
    save_timeout_s: Seconds = 1800.0
    """The same limit in seconds for the first step, while a checkpoint is saved, and for a batch of an evaluation."""
    save_in_background: bool = False
    """Write checkpoints while training continues. Needs host memory for a copy of each rank's part; same guarantees."""
    checkpoint_mirror: FilePath | None = None
    """URL (s3://, gs://, hf://) or path where every checkpoint is copied in the background, and from which a start
    fetches one that is newer than those of the run directory; null: none."""
    check_every: Annotated[int, Field(ge=0, le=10**12)] = 200
    """Steps between checks that all ranks are at the same step with the same student; 0: never."""


class StudentConfig(Section):
    """The model that is trained."""

    model: str
    """An open_clip model name, a model of megacid/models/configs, a model directory with initial weights
    (local-dir:PATH, hf-hub:ORG/NAME), or "feature-mlp", an MLP over data.features."""
    embed_dim: Width | None = None
    """Width of the joint embedding; null: the teacher's, of several their sum, without one the model's own. Only a run
    whose only term with a teacher is affinity may have another width than the teacher. Required by feature-mlp."""
    image_size: Annotated[Annotated[int, Field(gt=0, le=16_384)] | None, when.Shards] = None
    """Side of the square input image in pixels; null: the model's own."""
    context_length: Annotated[Width | None, when.Shards] = None
    """Number of text tokens; null: the model's own."""
    pretrained: Annotated[FilePath | None, when.Shards] = None
    """Initial weights: an open_clip tag or a local checkpoint; null: random, or those of a model directory. Projections
    of another width than embed_dim are drawn from run.seed."""
    projection: Annotated[bool, when.Shards] = False
    """Add a linear projection to each tower that has none (SigLIP), which gives it the width embed_dim."""
    projection_init: Annotated[Literal["random", "teacher"], when.Shards, when.TeacherTerm] = "random"
    """Initial projections: those of the weights or random ones, or a least-squares fit to the stored embeddings of
    the teacher (teacher)."""
    freeze: Annotated[tuple[str, ...], BeforeValidator(as_tuple), when.Shards] = ()
    """Parameters that stay as they are: "image" or "text" for a tower, or patterns over open_clip's names such as
    visual.transformer.resblocks.[0-5].*"""
    layer_decay: Annotated[float, Field(gt=0, le=1), when.Shards] = 1.0
    """Factor of the learning rate for each block farther from the end of its tower (BEiT, EVA-CLIP); 1: none."""
    patch_dropout: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, when.Shards] = None
    """Share of the image patches that each training step leaves out at random; null: the model's own, usually none."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, kept in fp32 and saved; null: none."""
    grad_checkpointing: Annotated[bool, when.Shards] = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: Annotated[bool, when.Shards] = False
    """Give images to the student in the NHWC memory format, which convolutional towers (ResNet, ConvNeXt) keep:
    usually faster. A ViT has one convolution and gains nothing."""
    compile: Annotated[bool, when.Shards] = False
    """Compile both towers with torch.compile: a slow first step, usually faster ones after it. Needs a C or C++
    compiler; not at ZeRO stage 3."""
    hidden: Annotated[Width, when.Features, when.HiddenLayers] = 512
    """Width of the hidden layers of feature-mlp."""
    layers: Annotated[int, Field(ge=0, le=1024), when.Features] = 2
    """Number of hidden layers of feature-mlp."""


class SourceConfig(Section):
    """One of several sources: shards and what the offline tools made of them."""

    shards: IndexedShards
    """As data.shards, without commands (pipe:)."""
    weight: Annotated[float, Field(gt=0, le=1e15)] = 1.0
    """Share of the samples among the weights of all sources, which need not sum to 1."""
    caption: str = "txt"
    """As data.caption."""
    teacher: Annotated[OneOrSeveralPaths | None, when.TeacherTerm] = None
    """As data.teacher: the outputs of tools/embed.py for these shards, with the teachers of the other sources."""
    labels: Annotated[FilePath | None, when.ClusterTerm] = None
    """As data.labels. The labels of all sources must be of the same clusters (tools/cluster.py --assign-only)."""
    keep: FilePath | None = None
    """As data.keep."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """The directories of `teacher`."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher or ()


NamedSources = Annotated[dict[str, SourceConfig], BeforeValidator(named_blocks)]


def _shown(value: object) -> str:
    return f"{len(value)} sources" if isinstance(value, dict) else repr(value)


class DataConfig(Section):
    """Training data and the outputs of the offline tools."""

    shards: Shards | None = None
    """Tar shards in img2dataset's or webdataset's layout: a directory, a brace pattern, a glob, a .tar file, a URL of
    one of these (s3://, gs://, hf://, https://), or several of them as a list or joined by `::`; or
    commands that write tars (pipe:COMMAND), which are read in a stream and never indexed. Set exactly one of
    shards, sources and features."""
    sources: NamedSources | None = None
    """Several corpora that are mixed by weight: a block of their names, each with a block of its own. They replace
    shards, caption, teacher, labels and keep."""
    cache_dir: Annotated[LocalPath | None, when.RemoteFiles] = None
    """Directory on a local disk for the files of URLs, shared by all ranks and runs of a node; null: the one that the
    variable MEGACID_CACHE_DIR names."""
    cache_gb: Annotated[float, Field(gt=0, le=10**9), when.RemoteFiles, when.CacheDirectory] = 100.0
    """Size of cache_dir in GB (10^9 bytes): at least that of the files that are read and fetched at a time."""
    caption: Annotated[str, when.OneSource] = "txt"
    """Where the captions are: `txt`, the ending of another text member, `json:FIELD`, or `json:FIELD.*` for a list of
    which each epoch draws one caption. As for tools/embed.py."""
    features: LocalPath | None = None
    """Directory of labelled feature vectors, as tools/synthesize.py features writes it. Set this, shards or sources."""
    teacher: Annotated[OneOrSeveralPaths | None, when.OneSource, when.TeacherTerm] = None
    """Output of tools/embed.py, or the URL of a copy, required by the terms that read it; a list of them for several
    teachers."""
    labels: Annotated[FilePath | None, when.OneSource, when.ClusterTerm] = None
    """Output of tools/cluster.py, or the URL of a copy. Required by loss.cluster on shards."""
    labels_per_sample: Annotated[Width, when.Shards, when.ClusterTerm] = 1
    """Number of nearest clusters that label a sample: 1 is CLIP-CID, more is MLCD (cluster.py --top-labels)."""
    keep: Annotated[FilePath | None, when.OneSource] = None
    """Output of tools/balance.py, or the URL of a copy; null: every sample is used."""
    augment: Annotated[Literal["none", "random_resized_crop"], when.Shards] = "none"
    """Image augmentation, seeded per sample. With a teacher that has embedded views (tools/embed.py --views) it must be
    random_resized_crop, and the crops are the teacher's."""
    decoder: Annotated[Literal["pillow", "simplejpeg", "simplejpeg_scaled"], when.Shards] = "pillow"
    """Decoding and resizing of images. `simplejpeg` (its package is needed) decodes JPEGs, and torch resizes: values
    differ by at most 2 of 255. `simplejpeg_scaled` also decodes JPEGs at 1/2, 1/4 or 1/8 size if the crop allows it."""
    workers: Annotated[int, Field(ge=0, le=1024), when.Shards] = 0
    """Number of loader processes per rank; 0 decodes in the training process."""
    worker_timeout_s: Annotated[Seconds, when.Shards, when.Workers] = 120.0
    """Seconds without a batch from a loader process after which the run ends with an error."""
    prefetch: Annotated[int, Field(gt=0, le=1024), when.Shards, when.Workers] = 2
    """Number of micro-batches that each loader process prepares ahead, in shared memory."""
    block_shards: Annotated[Count, when.NoPipes] = 64
    """Number of shards or feature files shuffled together. More mixes better, fewer reads more locally."""
    shuffle_buffer: Annotated[Count, when.Pipes] = 5000
    """Number of samples that each loader process keeps as bytes, of which it draws the next one."""
    error_budget: Annotated[Fraction, when.Shards] = 0.001
    """Fraction of undecodable samples, and with pipe: of tars that cannot be read, above which the run ends."""
    max_image_pixels: Annotated[int, Field(gt=0, le=89_478_485), when.Shards] = 64_000_000
    """Images with more pixels are skipped before they are decoded; the decoder itself refuses more than 89478485."""

    @property
    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources by name, in the order of their names; shards without a name are one with the name ""."""
        if self.shards is None:
            return dict(sorted((self.sources or {}).items()))
        own = {key: getattr(self, key) for key in ("shards", "caption", "teacher", "labels", "keep")}
        return {"": SourceConfig.model_construct(**own)}  # the values are checked

    @property
    def teachers(self) -> tuple[str, ...]:
        """The directories of the teachers of the first source."""
        return next((source.teachers for source in self.all_sources.values()), ())

    @model_validator(mode="after")
    def _one_kind(self) -> DataConfig:
        kinds = {"shards": self.shards, "sources": self.sources, "features": self.features}
        found = {f'"megacid.data.{key}"': value for key, value in kinds.items() if value is not None}
        if len(found) != 1:
            what = f"{' and '.join(found)} are both set ({', '.join(map(_shown, found.values()))})"
            if not found:
                what = '"megacid.data.shards", "megacid.data.sources" and "megacid.data.features" are null'
            raise UserError(
                f"{what}, expected exactly one: name the directory of the shards or of the feature vectors, or several "
                "sources, and write null for the others"
            )
        return self


class LossConfig(Section):
    """Weights of the loss terms. A term of weight 0 is not computed."""

    contrastive: Annotated[Weight, when.Shards] = 0.0
    """Weight of CLIP's contrastive loss between the student's images and texts."""
    instance: Annotated[Weight, when.Shards] = 0.0
    """Weight of instance discrimination distillation."""
    cluster: Weight = 0.0
    """Weight (lambda) of cluster discrimination distillation."""
    mse: Annotated[Weight, when.Shards] = 0.0
    """Weight of the squared distance of student and teacher embeddings, of images and texts."""
    affinity: Annotated[Weight, when.Shards] = 0.0
    """Weight of the cross-entropy of the student's image-text similarities under the teacher's (DistillClipLoss)."""
    alpha: Annotated[Weight, when.ClusterTerm] = 1.0
    """Inside cluster: weight of the cross-entropy of the student and the label."""
    beta: Annotated[Weight, when.Shards, when.ClusterTerm] = 0.0
    """Inside cluster: weight of the cross-entropy of the teacher's embedding and the label. [assumed]"""
    gamma: Annotated[Weight, when.Shards, when.ClusterTerm] = 0.0
    """Inside cluster: weight of KL(teacher || student). [assumed]"""
    cluster_temperature: Annotated[float, Field(gt=0), when.ClusterTerm, when.KL] = 1.0
    """Inside cluster: temperature of the KL. [assumed]"""
    form: Annotated[Literal["softmax", "sigmoid"], when.ContrastiveTerm] = "softmax"
    """Form of contrastive and instance: CLIP's softmax over the batch, or SigLIP's sigmoid of each pair, with a learned
    logit bias."""
    temperature: Annotated[Annotated[float, Field(ge=0.01)] | None, when.SimilarityTerm] = None
    """Fixed temperature of the student's similarities; null: learned, 1/temperature <= 100."""
    affinity_temperature: Annotated[OneOrSeveralTemperatures, when.AffinityTerm] = 0.01
    """Inside affinity: temperature of the teacher's similarities, which OpenCLIP's models learn down to 0.01; a list
    gives each of several teachers its own."""

    @model_validator(mode="after")
    def _one_term(self) -> LossConfig:
        if not (self.contrastive or self.instance or self.cluster or self.mse or self.affinity):
            raise UserError(
                'every weight in "megacid.loss" is 0: set at least one of contrastive, instance, cluster, mse '
                "and affinity above 0"
            )
        if self.cluster and not (self.alpha or self.beta or self.gamma):
            raise UserError(
                f'"megacid.loss.cluster" is {self.cluster} but alpha, beta and gamma are all 0: set one of them above '
                "0, or cluster to 0"
            )
        return self


class ClassifierConfig(Section):
    """The class-sharded margin classifier of loss.cluster, and its optimizer."""

    sample_rate: FractionAboveZero = 0.1
    """Fraction of each rank's classes sampled per step. Positive classes are always included."""
    m1: Annotated[float, Field(ge=1), when.StudentLogits] = 1.0
    """SphereFace factor of the margin cos(m1 * theta + m2) - m3 on the target class."""
    m2: Annotated[float, Field(ge=0, lt=math.pi), when.StudentLogits] = 0.0
    """ArcFace angle of the margin in radians."""
    m3: Annotated[float, Field(ge=0), when.StudentLogits] = 0.3
    """CosFace offset of the margin."""
    margin_grad: Annotated[Literal["exact", "straight_through"], when.StudentLogits, when.AngularMargin] = "exact"
    """Derivative of the margin: exact, or 1 (straight_through) as in insightface's ArcFace."""
    scale: Annotated[float, Field(gt=0)] = 64.0
    """Logit scale s."""
    feature_rate: FractionAboveZero = 1.0
    """Fraction of the embedding's dimensions used per step (UNICOM); from width 32 on, rounded to a multiple of 16."""
    filter_threshold: Annotated[float, Field(ge=-1, lt=1)] | None = None
    """Negatives with a larger cosine are left out of the denominator; null: none."""
    log_q: Annotated[bool, when.Sampling] = False
    """Weight sampled negatives by 1 / their probability, which makes the softmax denominator unbiased."""
    static_shapes: Annotated[bool, when.Sampling] = False
    """Pad the class rows of a step to a multiple of 512, the same on every rank: shapes repeat from step to step."""
    cuda_graph: bool = False
    """Replay loss and gradients of the classifier from a CUDA graph, with the same bits: on one GPU."""
    labels_loss: Annotated[Literal["mlcd", "mean"], when.SeveralLabels] = "mlcd"
    """Loss of several labels per sample: MLCD's, or the mean of their softmax losses with the others as negatives."""
    weight_grad: Literal["stored", "recomputed", "auto"] = "stored"
    """Gradient of the class rows: stored, or recomputed in slabs (less memory, twice the arithmetic). auto stores it,
    but computes it in slabs where Triton's chunks would be so short that moving memory takes longer."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the classifier: auto is Triton on a GPU, else PyTorch."""
    precision: Annotated[Literal["auto", "fp16", "bf16", "fp32"], when.TritonKernels] = "auto"
    """Of the matrix products in Triton: fp16 (auto) cosines, bf16, or fp32. PyTorch computes in fp32."""
    memory_budget_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a chunk's exponentials, or with recomputed of a slab, in GB (10^9 bytes); null: it follows the sizes of
    the gradient and of the GPU."""
    init: FilePath = "centroids"
    """Initial rows: centroids (of data.labels), random (N(0, 0.01)), or the path of a .npy or .safetensors file or of a
    directory of per-rank insightface checkpoints."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Row-sparse optimizer of the class rows."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate of the class rows; null: the student's."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple), when.AdamW] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0), when.AdamW] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[Beta, when.SGD] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of the rows that a step updates; decoupled in AdamW."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Storage of the row optimizer's moments. bf16 halves their memory and uses stochastic rounding."""
    lazy: Annotated[Literal["none", "decay"], when.Sampling] = "none"
    """What a row catches up on when it is sampled again: nothing, or the decays of the steps between."""


class ScheduleConfig(Section):
    """Learning rates of student and classifier, as fractions of their peaks."""

    warmup_steps: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Steps of linear warm-up, fewer than run.total_steps."""
    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: cosine decay to final_share, constant, or constant with a decay to final_share
    at the end (wsd: warm-up, stable, decay)."""
    final_share: Annotated[Fraction, when.Decay] = 0.0
    """Fraction of the peak learning rate at the end of the decay."""
    decay_share: Annotated[FractionAboveZero, when.WSD] = 0.2
    """Fraction of run.total_steps in which wsd decays. The warm-up must end before."""
    decay_shape: Annotated[Literal["1-sqrt", "linear"], when.WSD] = "1-sqrt"
    """Decay of wsd over its progress p: 1 - sqrt(p) (arXiv 2405.18392), or 1 - p (linear)."""

    def decay_start(self, total_steps: int) -> int:
        """The first step of the decay, in a run of so many steps."""
        decay_steps = max(1, round(self.decay_share * total_steps))
        return total_steps - decay_steps if self.kind == "wsd" else self.warmup_steps


class EvalConfig(Section):
    """Evaluation of the student while it trains, which changes no bit of the training."""

    datasets: Annotated[tuple[FilePath, ...], BeforeValidator(as_tuple), when.Shards] = ()
    """Directories of classification sets, in the layout of tools/eval.py --dataset-root; []: no evaluation."""
    every: Annotated[Steps, when.EvalSets] = 1000
    """Steps between evaluations. The last step is always evaluated."""
    tasks: Annotated[
        tuple[Literal["zero_shot", "knn"], ...], Field(min_length=1), BeforeValidator(as_tuple), when.EvalSets
    ] = ("zero_shot",)
    """What is measured on the test split: zero_shot, by class names and templates; knn, by the train split."""
    neighbors: Annotated[Count, when.EvalSets, when.NearestNeighbors] = 20
    """Number k of train images that vote for the class of a test image."""


class GuardConfig(Section):
    """When steps are skipped, and when the run ends because of them."""

    max_consecutive_skips: Count = 5
    """Number of skipped steps in a row at which the run ends."""
    max_skipped_share: Fraction = 0.01
    """Fraction of the last 1000 steps that may be skipped before the run ends."""
    spike: Literal["off", "skip", "lower", "abort"] = "off"
    """Reaction to a loss spike: none, skip the step, multiply its gradients by 0.1 (lower), or end the run (abort)."""
    spike_deviations: Annotated[float, Field(gt=0), when.Spikes] = 10.0
    """A spike is a loss above the median of the last 200 by this many median absolute deviations."""
