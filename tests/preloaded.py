"""What every training run on forked ranks would import, read and count again at its start, done once here."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.module_inject.auto_ep_layer
import deepspeed.moe.ep_repack
import deepspeed.ops.triton_ops
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy.ma  # noqa: F401
import torch._dynamo  # noqa: F401

import megacid.distributed.engine  # noqa: F401
from megacid.config.deepspeed_keys import refused_keys, strict_model
from megacid.models import towers
from megacid.models.feature_tower import FeatureTower
from megacid.models.student import Student
from megacid.storage.metadata import versions
from megacid.training import flops

# Cached for all ranks that are forked from this process.
versions()
strict_model("AdamW")
refused_keys()

_results = tempfile.TemporaryDirectory(prefix="megacid-forked-ranks-")


def share_results() -> None:
    """In a forked rank: take widths and arithmetic of a student from an earlier rank that worked them out.

    They depend on the architecture alone, and take half of the CPU time of a run of six steps. An error is not shared.
    """
    towers._widths = _shared(towers._widths, lambda model, clip, config: (model, config))
    flops.student_flops = _shared(flops.student_flops, _student)


def _student(student: Student | FeatureTower, *, recomputes: bool = False) -> Any:
    trained = [(name, p.shape, p.requires_grad) for name, p in student.named_parameters()]
    kind = (student.spec, student.model_config) if isinstance(student, Student) else str(student)
    return kind, trained, student.training, recomputes


def _shared(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        name = hashlib.sha256(repr((function.__name__, key(*args, **options))).encode()).hexdigest()
        path = Path(_results.name, name)
        if path.exists():
            return json.loads(path.read_text())
        result = function(*args, **options)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(result))
        part.replace(path)
        return result

    return call
