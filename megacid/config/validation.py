"""Checks of the run file's values, each alone and together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from megacid.config.schema import DataConfig, LossConfig, MegacidConfig
from megacid.errors import UserError

_POSITIVE = """
    run.total_steps run.save_every run.log_every run.timeout_s run.save_timeout_s student.hidden data.labels_per_sample
    data.worker_timeout_s data.block_shards data.max_image_pixels loss.cluster_temperature classifier.scale
    classifier.sample_rate classifier.feature_rate guard.max_consecutive_skips guard.spike_deviations
""".split()
_NOT_NEGATIVE = """
    run.seed run.check_every student.layers data.workers data.error_budget loss.contrastive loss.instance loss.cluster
    loss.mse loss.alpha loss.beta loss.gamma classifier.m2 classifier.m3 classifier.weight_decay schedule.warmup_steps
    schedule.final_share guard.max_skipped_share
""".split()
_AT_MOST_ONE = """
    data.error_budget classifier.sample_rate classifier.feature_rate schedule.final_share guard.max_skipped_share
""".split()
_RANGES: tuple[tuple[list[str], Callable[[float], bool], str], ...] = (
    (_POSITIVE, lambda v: v > 0, "> 0"),
    (_NOT_NEGATIVE, lambda v: v >= 0, ">= 0"),
    (_AT_MOST_ONE, lambda v: v <= 1, "<= 1"),
)
_LARGEST = {
    **dict.fromkeys(
        "run.total_steps run.save_every run.log_every run.check_every schedule.warmup_steps".split(), 10**12
    ),
    **dict.fromkeys("run.timeout_s run.save_timeout_s data.worker_timeout_s".split(), 10_000_000),
    **dict.fromkeys("student.hidden student.embed_dim student.context_length data.labels_per_sample".split(), 65_536),
    **dict.fromkeys("run.keep_last data.block_shards guard.max_consecutive_skips".split(), 10**9),
    "student.image_size": 16_384,
    "student.layers": 1024,
    "data.workers": 1024,
}
_LARGEST_NUMBER = 3.4e38  # of fp32
_DECODER_PIXELS = 89_478_485  # above this PIL warns of a decompression bomb


def check(block: MegacidConfig, defaults: dict[str, dict[str, Any]]) -> None:
    """Check the values of the "megacid" block, each alone and together.

    Args:
        defaults: section -> field -> default.

    Raises:
        UserError: a value is out of range, or values contradict each other.
    """
    for paths, in_range, expected in _RANGES:
        for path in paths:
            value = _value(block, path)
            if not in_range(value):
                raise UserError(f'"megacid.{path}" is {value}, expected {expected}')
    for path, largest in _LARGEST.items():
        value = _value(block, path)
        if value is not None and value > largest:
            raise UserError(f'"megacid.{path}" is {value}, expected <= {largest}')
    loss, data, run = block.loss, block.data, block.run
    _check_name(run.name)
    if data.max_image_pixels > _DECODER_PIXELS:
        raise UserError(
            f'"megacid.data.max_image_pixels" is {data.max_image_pixels}, expected <= {_DECODER_PIXELS}: the decoder '
            "refuses larger images"
        )
    if run.keep_last < 2:
        raise UserError(
            f'"megacid.run.keep_last" is {run.keep_last}, expected >= 2: a crash may damage the newest checkpoint'
        )
    if block.schedule.warmup_steps >= run.total_steps:
        raise UserError(
            f'"megacid.schedule.warmup_steps" is {block.schedule.warmup_steps}, expected fewer than run.total_steps, '
            f"{run.total_steps}"
        )
    if loss.temperature is not None and loss.temperature < 0.01:
        raise UserError(f'"megacid.loss.temperature" is {loss.temperature}, expected >= 0.01, or null (learned)')
    _check_source(block, defaults)
    _check_terms(loss, data)


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable() or len(name.encode()) > 200:
        raise UserError(
            f'"megacid.run.name" is {name[:200]!r}, expected the name of one directory, at most 200 bytes without '
            '"/": name its parent in run.dir'
        )


def _value(block: MegacidConfig, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(block, section), name)


def _check_terms(loss: LossConfig, data: DataConfig) -> None:
    """At least one loss term, and the inputs of every term."""
    if not (loss.contrastive or loss.instance or loss.cluster or loss.mse):
        raise UserError(
            'every weight in "megacid.loss" is 0: set at least one of contrastive, instance, cluster and mse above 0'
        )
    if loss.cluster and not (loss.alpha or loss.beta or loss.gamma):
        raise UserError(
            f'"megacid.loss.cluster" is {loss.cluster} but alpha, beta and gamma are all 0: set one of them above 0, '
            "or cluster to 0"
        )
    if loss.cluster and loss.gamma and data.labels_per_sample > 1:
        raise UserError(
            f'"megacid.data.labels_per_sample" is {data.labels_per_sample} and "megacid.loss.gamma" is {loss.gamma}, '
            "expected one label for the KL: set labels_per_sample to 1, or gamma to 0"
        )
    terms = {
        "instance": loss.instance,
        "mse": loss.mse,
        "cluster (beta, gamma)": loss.cluster and (loss.beta or loss.gamma),
    }
    needs_teacher = [name for name, weight in terms.items() if weight]
    if needs_teacher and data.teacher is None:
        raise UserError(
            f'"megacid.data.teacher" is null but the term {needs_teacher[0]} needs teacher embeddings: name the output '
            "of tools/embed.py"
        )
    if loss.cluster and data.labels is None and data.features is None:
        raise UserError(
            '"megacid.data.labels" is null but the term cluster needs labels: name the output of tools/cluster.py'
        )


FEATURE_TOWER = "feature-mlp"
_FOR_PAIRS = """
    student.image_size student.context_length student.pretrained student.grad_checkpointing data.teacher data.labels
    data.labels_per_sample data.keep data.augment data.workers data.worker_timeout_s data.error_budget
    data.max_image_pixels loss.contrastive loss.instance loss.mse loss.beta loss.gamma
""".split()
_FOR_FEATURES = ["student.hidden", "student.layers"]


def _check_source(block: MegacidConfig, defaults: dict[str, dict[str, Any]]) -> None:
    """Shards with a CLIP student, or features with a feature tower; no key that has no effect on the one chosen."""
    data, student = block.data, block.student
    if (data.shards is None) == (data.features is None):
        both = "both null" if data.shards is None else f"both set ({data.shards!r}, {data.features!r})"
        raise UserError(
            f'"megacid.data.shards" and "megacid.data.features" are {both}, expected exactly one: name the directory '
            "of the shards or of the feature vectors, and write null for the other"
        )
    source = "shards" if data.features is None else "features"
    if (source == "features") != (student.model == FEATURE_TOWER):
        remedy = f'"{FEATURE_TOWER}"' if source == "features" else "an open_clip model, or set data.features"
        raise UserError(f'"megacid.student.model" is {student.model!r} but the data are {source}: write {remedy}')
    for path in _FOR_FEATURES if source == "shards" else _FOR_PAIRS:
        section, name = path.split(".")
        value, default = _value(block, path), defaults[section][name]
        if value != default:
            raise UserError(
                f'"megacid.{path}" is {value!r}, which has no effect with data.{source}: write {json.dumps(default)}, '
                "or remove it"
            )
    if source == "shards":
        return
    if student.embed_dim is None:
        raise UserError(
            f'"megacid.student.embed_dim" is null, expected the width of {FEATURE_TOWER}: write for example 512'
        )
    if not block.loss.cluster:
        raise UserError(
            f'"megacid.loss.cluster" is {block.loss.cluster}, expected > 0: features train no other term than cluster'
        )
    if block.classifier.init == "centroids":
        raise UserError(
            '"megacid.classifier.init" is "centroids" but data.features has none: write "random", or the path of a '
            ".npy file"
        )


def check_numbers(tree: dict[str, Any]) -> None:
    """Raise UserError for NaN, infinity and integers beyond 64 bits, which the JSON reader accepts."""
    left: list[tuple[str, Any]] = [("", tree)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{where}.{key}" if where else str(key), inner) for key, inner in items]
        elif isinstance(value, float) and not abs(value) <= _LARGEST_NUMBER:
            expected = "a number that fp32 can hold" if math.isfinite(value) else "a finite number"
            raise UserError(f'"{where}" is {value:.3g}, expected {expected}')
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f'"{where}" is an integer of {value.bit_length()} bits, expected one below 2^63')
