"""Which values of a run file are good, alone and together."""

from __future__ import annotations

import json
import math
from typing import Any

from megacid.config.schema import MegacidConfig
from megacid.errors import UserError

_POSITIVE = ("run.total_steps run.save_every run.log_every run.timeout_s run.save_timeout_s data.worker_timeout_s guard.spike_deviations data.labels_per_sample data.block_shards data.max_image_pixels "
             "student.hidden loss.cluster_temperature classifier.scale classifier.sample_rate classifier.feature_rate guard.max_consecutive_skips").split()  # fmt: skip
_NOT_NEGATIVE = ("run.seed run.check_every guard.max_skipped_share student.layers data.workers data.error_budget loss.contrastive loss.instance loss.cluster loss.mse loss.alpha loss.beta loss.gamma "
                 "classifier.m2 classifier.m3 classifier.weight_decay schedule.warmup_steps schedule.final_share").split()  # fmt: skip
_DECODER_PIXELS = 89_478_485  # PIL's own limit, a warning there and an error here
_AT_MOST_ONE = "classifier.sample_rate classifier.feature_rate data.error_budget schedule.final_share guard.max_skipped_share".split()


def check(block: MegacidConfig, defaults: dict[str, dict[str, Any]]) -> None:
    """UserError for a value out of range, and for values that contradict each other. defaults: section -> field -> default."""

    def value(path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(block, section), name)

    for paths, ok, wish in (
        (_POSITIVE, lambda v: v > 0, "above 0"),
        (_NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
        (_AT_MOST_ONE, lambda v: v <= 1, "1 at most"),
    ):
        for path in paths:
            if not ok(value(path)):
                raise UserError(f'"megacid.{path}" is {value(path)}, expected {wish}')
    loss, data, run = block.loss, block.data, block.run
    if data.max_image_pixels > _DECODER_PIXELS:
        raise UserError(
            f'"megacid.data.max_image_pixels" is {data.max_image_pixels}, expected {_DECODER_PIXELS} at most: the decoder itself refuses larger images'
        )
    if run.keep_last < 2:
        raise UserError(
            f'"megacid.run.keep_last" is {run.keep_last}, expected 2 or more: the newest checkpoint may be the damaged one'
        )
    if block.schedule.warmup_steps >= run.total_steps:
        raise UserError(
            f'"megacid.schedule.warmup_steps" is {block.schedule.warmup_steps}, expected fewer than run.total_steps = {run.total_steps}'
        )
    if not (loss.contrastive or loss.instance or loss.cluster or loss.mse):
        raise UserError(
            'every weight in "megacid.loss" is 0, expected at least one of contrastive, instance, cluster, mse above 0'
        )
    if loss.cluster and not (loss.alpha or loss.beta or loss.gamma):
        raise UserError(
            '"megacid.loss.cluster" is on but alpha, beta and gamma are all 0: set one of them, or cluster to 0'
        )
    if loss.cluster and loss.gamma and data.labels_per_sample > 1:
        raise UserError(
            f'"megacid.data.labels_per_sample" is {data.labels_per_sample} and "megacid.loss.gamma" is {loss.gamma}, expected one label for the KL: set one of them to 1 or 0'
        )
    _check_source(block, defaults)
    needs_teacher = [
        name
        for name, on in (
            ("instance", loss.instance),
            ("mse", loss.mse),
            ("cluster (beta, gamma)", loss.cluster and (loss.beta or loss.gamma)),
        )
        if on
    ]
    if needs_teacher and data.teacher is None:
        raise UserError(
            f'"megacid.data.teacher" is null but the term {needs_teacher[0]} needs teacher embeddings: name the output of tools/embed.py'
        )
    if loss.cluster and data.labels is None and data.features is None:
        raise UserError(
            '"megacid.data.labels" is null but the term cluster needs labels: name the output of tools/cluster.py'
        )
    if loss.temperature is not None and loss.temperature < 0.01:
        raise UserError(f'"megacid.loss.temperature" is {loss.temperature}, expected 0.01 or more (null: learned)')


FEATURE_TOWER = "feature-mlp"
_FOR_PAIRS = """data.teacher data.labels data.labels_per_sample data.keep data.augment data.workers data.worker_timeout_s data.error_budget data.max_image_pixels
 student.image_size student.context_length student.pretrained student.grad_checkpointing loss.contrastive loss.instance loss.mse loss.beta loss.gamma""".split()
_FOR_FEATURES = "student.hidden student.layers".split()


def _check_source(block: MegacidConfig, defaults: dict[str, dict[str, Any]]) -> None:
    """Shards with a CLIP student, or features with a feature tower; no key that the choice gives no effect."""
    data, student = block.data, block.student
    if (data.shards is None) == (data.features is None):
        found = "both null" if data.shards is None else f"both given ({data.shards!r}, {data.features!r})"
        raise UserError(f'"megacid.data.shards" and "megacid.data.features" are {found}, expected exactly one: '
                        "write the directory of the shards, or that of the feature vectors, and null for the other")  # fmt: skip
    if (data.features is not None) != (student.model == FEATURE_TOWER):
        wish = f'"{FEATURE_TOWER}"' if data.features is not None else "an open_clip model, or data.features"
        raise UserError(
            f'"megacid.student.model" is {student.model!r} but the data are {"features" if data.features is not None else "shards"}: write {wish}'
        )
    for path in _FOR_PAIRS if data.features is not None else _FOR_FEATURES:
        section, name = path.split(".")
        found = getattr(getattr(block, section), name)
        default = defaults[section][name]
        if found != default:
            why = "data.features" if data.features is not None else "data.shards"
            raise UserError(
                f'"megacid.{path}" is {found!r}, which has no meaning with {why}: write {json.dumps(default)}, or leave it out'
            )
    if data.features is None:
        return
    if student.embed_dim is None:
        raise UserError(
            f'"megacid.student.embed_dim" is null, expected the embedding width of {FEATURE_TOWER}: write it, 512 say'
        )
    if not block.loss.cluster:
        raise UserError(
            f'"megacid.loss.cluster" is {block.loss.cluster}, expected a weight above 0: it is the only term that features can have'
        )
    if block.classifier.init == "centroids":
        raise UserError(
            '"megacid.classifier.init" is "centroids" but data.features has none: write "random", or the path of a .npy file'
        )


def check_numbers(tree: dict[str, Any]) -> None:
    """UserError for NaN, infinity and whole numbers beyond 64 bits anywhere in the run file: JSON's reader lets them pass."""
    left: list[tuple[str, Any]] = [("", tree)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{where}.{key}" if where else str(key), inner) for key, inner in items]
        elif (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, int) and abs(value) >= 2**63
        ):
            raise UserError(f'"{where}" is {value:.3g}, expected a finite number below 2^63' if isinstance(value, float) else
                            f'"{where}" is a number of {value.bit_length()} bits, expected one below 2^63')  # fmt: skip
