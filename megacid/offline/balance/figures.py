"""Figure 2 of the CLIP-CID paper for a finished balance stage: reads its outputs, writes figures and captions.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacid.errors import UserError
from megacid.offline.balance import drawing
from megacid.offline.balance.cluster_process import ClusterProcess, choose_cluster, cluster_process
from megacid.offline.balance.gallery import image_reader, page
from megacid.offline.balance.groups import Groups, perceptual_distance, sample_groups
from megacid.offline.balance.inputs import CELLS, BalanceInputs, SampleLocations, damaged_cells, read_inputs
from megacid.offline.balance.report import cluster_sizes, size_statistics
from megacid.offline.figure_style import COLOURS, figure_style, save_figure
from megacid.offline.row_numbers import all_rows, row_dtype
from megacid.offline.rows import EmbeddingRows
from megacid.storage.atomic import write_text
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy


@dataclass(frozen=True)
class Choice:
    """What is shown."""

    groups: int = 9  # in (a) and in (b)
    members: int = 6  # images per group, at most
    perceptual: float | None = None  # spread below which a group is perceptual; None: half the threshold
    cluster: int | None = None  # of (c); None: one of median size

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UserError(f"--groups is {self.groups}, expected at least 1")
        if self.members < 2:
            raise UserError(f"--members is {self.members}, expected at least 2: the kept image and a removed one")


@dataclass(frozen=True)
class Balanced:
    """A finished stage, by embedding row. representative: int [n]; keep: bool [n]; report: report.json."""

    inputs: BalanceInputs
    locations: SampleLocations
    report: dict[str, Any]
    representative: np.ndarray
    keep: np.ndarray

    @property
    def threshold(self) -> float:
        return float(self.report["threshold"])


def read_balanced(
    balance: Path, clusters: Path | None = None, embeddings: Path | None = None, shards: Path | None = None
) -> Balanced:
    """Reads the outputs of the stages. clusters, embeddings, shards: None: those that tools/balance.py used.

    Raises:
        UserError: a file is missing or damaged, or the folders do not belong together.
    """
    meta = read_meta(balance, expect="balance")
    source = meta["source"]
    embeddings = Path(embeddings or source["embeddings"])
    cells = meta.get("arguments", {}).get("cells")
    if clusters is None and cells is not None and (bad := damaged_cells(balance, cells, EmbeddingRows(embeddings))):
        raise UserError(f"{bad} is damaged or missing: run tools/balance.py again with the same arguments")
    clusters = Path(clusters or source.get("clusters", balance / CELLS))
    inputs = read_inputs(embeddings, clusters, shards or Path(source["shards"]))
    index = inputs.index
    if meta["shards_digest"] != index.digest or meta["arguments"]["labels"] != inputs.labels_digest:
        raise UserError(
            f"{balance} was made from other clusters than {clusters}: run tools/balance.py again, or give the right "
            "ones with --clusters"
        )
    locations = SampleLocations(index, inputs.locate(range(len(inputs.rows.stems))))
    at = locations.number

    def read(kind: str, dtype: np.dtype) -> np.ndarray:
        files = [balance / kind / f"{name}.npy" for name in index.names]
        parts = [_read_array(path, size).astype(dtype) for path, size in zip(files, index.sizes.tolist())]
        return np.concatenate(parts)[at]

    row = np.full(index.num_samples, -1, row_dtype(inputs.rows.num_rows))
    row[at] = all_rows(inputs.rows.num_rows)
    report = json.loads((balance / "report.json").read_text())
    return Balanced(inputs, locations, report, row[read("representative", at.dtype)], read("keep", np.dtype(bool)))


def _read_array(path: Path, size: int) -> np.ndarray:
    array = load_npy(path, "run tools/balance.py again")
    if array.shape != (size,):
        raise UserError(f"{path} has shape {array.shape}, expected ({size},): run tools/balance.py again")
    return array


def make_figures(balanced: Balanced, choice: Choice, out: Path) -> list[Path]:
    """Writes fig2a to fig2d as .png, .svg and .pdf, and index.html. Returns the paths."""
    inputs, keep, representative = balanced.inputs, balanced.keep, balanced.representative
    groups = sample_groups(inputs.rows, representative)
    limit = perceptual_distance(balanced.threshold, choice.perceptual)
    before, after = cluster_sizes(inputs.label, keep, inputs.k)
    cluster = choice.cluster
    if cluster is None:
        cluster = choose_cluster(inputs.label, representative, inputs.k)
    shown = None
    if cluster is not None:
        shown = cluster_process(inputs.rows, inputs.label, representative, keep, balanced.threshold, cluster)
    perceptual = groups.perceptual(limit, choice.groups, choice.members)
    semantic = groups.near(balanced.threshold, limit, choice.groups, choice.members)
    paths, sections = [], []
    with figure_style(), image_reader(balanced.locations) as show:
        a, b = (drawing.group_figure(part, keep, show) for part in (perceptual, semantic))
        c, d = drawing.process_figure(shown, show), drawing.size_figure(before, after)
        for name, heading, figure, caption in (
            ("fig2a_perceptual", "(a) Perceptual redundancy", a, _caption_a(groups, limit)),
            ("fig2b_semantic", "(b) Semantic redundancy", b, _caption_b(groups, limit, balanced.threshold)),
            ("fig2c_process", "(c) Semantic balance of one cluster", c, _caption_c(shown, balanced, choice)),
            ("fig2d_clusters", "(d) Samples per cluster", d, _caption_d(before, after)),
        ):
            paths += save_figure(figure, out / name)
            image = f'<img style="height:auto;max-width:100%;border:0" src="{name}.png" alt="{html.escape(heading)}">'
            sections.append((heading, caption, f'<p>{image}</p><p><a href="{name}.pdf">{name}.pdf</a></p>'))
    report = balanced.report
    summary = (
        f"{report['kept']:,} of {report['total']:,} samples kept ({report['share_kept']:.2%}); pairs nearer than "
        f"{balanced.threshold:.4f} are linked; {len(groups):,} groups of at least two samples{groups.note}"
    )
    write_text(out / "index.html", page("Image semantic balance", summary, sections))
    return [*paths, out / "index.html"]


def _caption_a(groups: Groups, limit: float) -> str:
    return (
        f"{groups.count_perceptual(limit):,} of {len(groups):,} groups{groups.note}: every removed image is nearer "
        f"than {limit:.4f} to the kept one. The groups shown are evenly spaced from the tightest to the loosest. A "
        "blue frame marks the kept image; the number below another image is its distance to the kept one."
    )


def _caption_b(groups: Groups, limit: float, threshold: float) -> str:
    return (
        f"{len(groups) - groups.count_perceptual(limit):,} of {len(groups):,} groups{groups.note}: at least one "
        f"removed image is at a distance of {limit:.4f} or more. The groups shown are those whose largest distance is "
        f"nearest to the threshold, {threshold:.4f}."
    )


def _caption_c(shown: ClusterProcess | None, balanced: Balanced, choice: Choice) -> str:
    if shown is None:
        return "No cluster that is small enough to be drawn has two groups."
    chosen = "chosen by --cluster"
    if choice.cluster is None:
        chosen = "of median size among the clusters with at least two groups"
    removed = balanced.representative[shown.rows[~shown.kept]]
    elsewhere = int((~np.isin(removed, shown.rows)).sum())
    across = f", {elsewhere:,} removed for a sample of another cluster" if elsewhere else ""
    return (
        f"Cluster {shown.cluster} of {balanced.inputs.k:,}, {chosen}: {len(shown.rows):,} samples, "
        f"{len(shown.links):,} pairs nearer than {balanced.threshold:.4f}, {int(shown.kept.sum()):,} kept{across}. "
        f"Images are placed by the first two principal components of their embeddings ({shown.explained:.0%} of the "
        "variance) and moved where they would overlap. Each colour is one group (colours repeat after "
        f"{len(COLOURS)}), grey is a sample without a group, and removed images are pale."
    )


def _caption_d(before: np.ndarray, after: np.ndarray) -> str:
    b, a = size_statistics(before), size_statistics(after)
    factors = [float("nan") if s["imbalance"] is None else s["imbalance"] for s in (b, a)]
    return (
        f"{len(before):,} clusters, before and after: {int(before.sum()):,} and {int(after.sum()):,} samples, largest "
        f"cluster {b['largest']:,} and {a['largest']:,}, median {b['median']:,g} and {a['median']:,g}, empty "
        f"{b['empty']:,} and {a['empty']:,}, imbalance factor {factors[0]:.3f} and {factors[1]:.3f} (1: equal sizes)."
    )
