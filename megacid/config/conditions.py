"""Conditions under which a setting has an effect. `sections.py` annotates its fields with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megacid.config.fields import block_of, is_named
from megacid.errors import UserError


class Needs:
    """Annotates a field, or a section, that has no effect unless a condition on other settings holds.

    Args:
        condition: for messages and documentation, such as "loss.cluster > 0".
        holds: the same as a function of the "megacid" block.
    """

    def __init__(self, condition: str, holds: Callable[[Any], Any]) -> None:
        self.condition, self.holds = condition, holds


def terms_with_teacher(loss: Any) -> list[str]:
    """Names of the terms that read teacher embeddings, for a "loss" block."""
    terms = {
        "instance": loss.instance,
        "mse": loss.mse,
        "affinity": loss.affinity,
        "cluster (beta, gamma)": loss.cluster and (loss.beta or loss.gamma),
    }
    return [name for name, weight in terms.items() if weight]


def compares_with_teacher(loss: Any) -> bool:
    """Whether a term compares embeddings of the student with the teacher's, which need one width."""
    return any(name != "affinity" for name in terms_with_teacher(loss))


def is_mean_over_samples(loss: Any) -> bool:
    """Whether the objective is computed by micro-batch, as `Objective.is_mean_over_samples` says."""
    return not (loss.instance or loss.contrastive or loss.affinity or loss.cluster)


def _are_pipes(block: Any) -> bool:
    return (block.data.shards or "").startswith("pipe:")


def _sources(block: Any) -> list[Any]:
    """What has shards and side tables: the "data" block itself, or its sources."""
    return [block.data] if block.data.shards else list((block.data.sources or {}).values())


def _has_url(block: Any) -> bool:
    values = [value for one in _sources(block) for value in (one.shards, one.teacher, one.labels, one.keep) if value]
    paths = [path for value in values for path in ([value] if isinstance(value, str) else value)]
    return any("://" in path for path in paths) and not _are_pipes(block)


Shards = Needs("data.shards (or sources)", _sources)
OneSource = Needs("data.shards", lambda block: block.data.shards is not None)
Pipes = Needs("pipe: in data.shards", _are_pipes)
NoPipes = Needs("data.shards without pipe:, or data.features", lambda block: not _are_pipes(block))
RemoteFiles = Needs("a URL in data.shards, teacher, labels or keep (or sources)", _has_url)
CacheDirectory = Needs("data.cache_dir", lambda block: block.data.cache_dir is not None)
Features = Needs("data.features", lambda block: block.data.features is not None)
HiddenLayers = Needs("student.layers > 0", lambda block: block.student.layers)
Workers = Needs("data.workers > 0", lambda block: block.data.workers)
TeacherTerm = Needs(
    "a term that reads it (loss.instance, loss.mse, loss.affinity, or loss.cluster with beta or gamma)",
    lambda block: terms_with_teacher(block.loss),
)
SimilarityTerm = Needs(
    "loss.contrastive or loss.instance or loss.affinity > 0",
    lambda block: block.loss.contrastive or block.loss.instance or block.loss.affinity,
)
ContrastiveTerm = Needs(
    "loss.contrastive or loss.instance > 0", lambda block: block.loss.contrastive or block.loss.instance
)
AffinityTerm = Needs("loss.affinity > 0", lambda block: block.loss.affinity)
ClusterTerm = Needs("loss.cluster > 0", lambda block: block.loss.cluster)
KL = Needs("loss.gamma > 0", lambda block: block.loss.gamma)
SeveralLabels = Needs("data.labels_per_sample > 1", lambda block: block.data.labels_per_sample > 1)
StudentLogits = Needs("loss.alpha or loss.gamma > 0", lambda block: block.loss.alpha or block.loss.gamma)
AngularMargin = Needs(
    "classifier.m1 > 1 or classifier.m2 > 0", lambda block: block.classifier.m1 > 1 or block.classifier.m2
)
Sampling = Needs("classifier.sample_rate < 1", lambda block: block.classifier.sample_rate < 1)
TritonKernels = Needs('a classifier.impl other than "torch"', lambda block: block.classifier.impl != "torch")
AdamW = Needs('classifier.optimizer "adamw"', lambda block: block.classifier.optimizer == "adamw")
SGD = Needs('classifier.optimizer "sgd"', lambda block: block.classifier.optimizer == "sgd")
Decay = Needs('schedule.kind "cosine" or "wsd"', lambda block: block.schedule.kind != "constant")
WSD = Needs('schedule.kind "wsd"', lambda block: block.schedule.kind == "wsd")
EvalSets = Needs("eval.datasets", lambda block: block.eval.datasets)
NearestNeighbors = Needs("knn in eval.tasks", lambda block: "knn" in block.eval.tasks)
Spikes = Needs('a guard.spike other than "off"', lambda block: block.guard.spike != "off")


class Ineffective(NamedTuple):
    """A setting without effect; `path` and, to remove, `remove` are dotted paths of keys or sections."""

    path: str
    remove: str
    condition: str
    value: Any
    default: Any


def ineffective(model: type[BaseModel], block: Any) -> list[Ineffective]:
    """Settings that differ from their defaults and have no effect with the other settings of the block.

    Args:
        model: of the "megacid" block.
        block: the block, or any object with its attributes.
    """
    found = []
    for section, outer in model.model_fields.items():
        for path, fields, values in _blocks(section, outer.annotation, getattr(block, section)):
            for key, field in fields.items():
                if field.is_required() or (value := getattr(values, key)) == field.default:
                    continue
                needs = [(section, need) for need in outer.metadata] + [(f"{path}.{key}", n) for n in field.metadata]
                missing = [pair for pair in needs if isinstance(pair[1], Needs) and not pair[1].holds(block)]
                if missing:
                    remove, need = missing[0]
                    found.append(Ineffective(f"{path}.{key}", remove, need.condition, value, field.default))
    return found


def _blocks(path: str, annotation: Any, values: Any) -> Iterator[tuple[str, dict[str, FieldInfo], Any]]:
    """(Dotted path, fields, values) of a section and of the named blocks in it."""
    model = block_of(annotation)
    assert model is not None
    yield path, model.model_fields, values
    for key, field in model.model_fields.items():
        for name, block in (getattr(values, key) or {}).items() if is_named(field.annotation) else ():
            yield from _blocks(f"{path}.{key}.{name}", field.annotation, block)


def check_effects(block: BaseModel) -> None:
    """Raise UserError when a setting of the "megacid" block has no effect; it names all of them."""
    found = ineffective(type(block), block)
    if not found:
        return
    first = found[0]
    remove = list(dict.fromkeys(setting.remove for setting in found))
    rest = f" (the same holds for {', '.join(remove[1:])})" if remove[1:] else ""
    raise UserError(
        f'"megacid.{first.path}" is {repr(first.value)[:200]}, which has no effect without {first.condition}{rest}: '
        f"remove {'them' if rest else 'it'}, or pass {' '.join(f'--set {path}=null' for path in remove)}"
    )
