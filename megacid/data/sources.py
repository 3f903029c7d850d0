"""A source of training data: shards with their side tables and a weight; what the sources of a run have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megacid.data.ensemble import TeacherEnsemble, common_views
from megacid.data.index import ShardIndex
from megacid.data.joined import JoinedTable, JoinSources
from megacid.data.side_tables import LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError

_ADOPTED = "adopted:"  # weights in meta.json that are the digest of the embeddings, which every source has of its own


@dataclass(frozen=True)
class Source:
    """Shards that are joined with their side tables.

    Args:
        name: for messages; "" for the only source of a run that has no name.
        weight: the share of a source is its weight divided by the sum of all.
    """

    joined: JoinedTable
    name: str = ""
    weight: float = 1.0

    @property
    def index(self) -> ShardIndex:
        return self.joined.sources.index

    @property
    def teacher(self) -> TeacherTable | TeacherEnsemble | None:
        return self.joined.sources.teacher

    @property
    def labels(self) -> LabelTable | None:
        return self.joined.sources.labels

    def full_name(self, sample: str) -> str:
        """The name of a sample, or a message that begins with it, which no sample of another source has."""
        return f"{self.name}/{sample}" if self.name else sample


def check_sources_agree(sources: Mapping[str, JoinSources]) -> None:
    """Raise UserError unless all sources, by name, have embeddings of the same teachers and labels of one clustering.

    centroids.npy of every directory of labels is read, since another clustering may have as many clusters.
    """
    (first, expected), *others = sources.items()
    for name, found in others:
        for table, other in zip(expected.teachers, found.teachers, strict=True):
            _check_teacher(other, name, table, first)
        if expected.labels is not None and found.labels is not None:
            _check_clusters(found.labels, name, expected.labels, first)


def _check_teacher(found: TeacherTable, name: str, expected: TeacherTable, first: str) -> None:
    adopted = all(str(table.meta.get("weights")).startswith(_ADOPTED) for table in (found, expected))
    fields = ("model", "pretrained", "dim") if adopted else ("model", "weights", "precision", "dim")
    facts = {field: (found.meta.get(field), expected.meta.get(field)) for field in fields}
    facts["embeddings of captions"] = found.has_text, expected.has_text
    for what, (value, other) in facts.items():
        if value != other:
            raise UserError(
                f"{found.directory} of source {name} has another teacher than {expected.directory} of source {first} "
                f"({what} {value!r}, expected {other!r}): run tools/embed.py with one teacher for all sources"
            )
    common_views({expected.directory: expected.views, found.directory: found.views})


def _check_clusters(found: LabelTable, name: str, expected: LabelTable, first: str) -> None:
    if found.num_classes != expected.num_classes:
        difference = f"k is {found.num_classes}, expected {expected.num_classes}"
    elif found.centroids_sha256 != expected.centroids_sha256:
        difference = "centroids.npy has other values"
    else:
        return
    raise UserError(
        f"{found.directory} of source {name} has labels of other clusters than {expected.directory} of source {first} "
        f"({difference}): run tools/cluster.py --assign-only {expected.directory} on the embeddings of {name}"
    )
