"""The figures of the balance stage, from what the offline stages wrote: perceptual and semantic redundancy, how one
cluster is thinned out, cluster sizes before and after (CLIP-CID, Figure 2 a to d).

Legend: n samples with an embedding, k clusters, m samples of one cluster.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megacid.data.index import ShardIndex, ShardReader
from megacid.errors import UserError
from megacid.offline.balance import gallery
from megacid.offline.balance.gallery import COMPONENTS, KEPT, REMOVED, Show, component_colour
from megacid.offline.balance.groups import (
    Group,
    Groups,
    Process,
    perceptual_below,
    process,
    representative_distance,
    sample_cluster,
)
from megacid.offline.balance.report import cluster_sizes, size_facts
from megacid.offline.balance.stage import index_of, labels_digest, tar_rows
from megacid.offline.cluster.results import read_labels
from megacid.offline.rows import EmbeddingRows
from megacid.storage.atomic import write_text, writing
from megacid.storage.metadata import read_meta
from megacid.storage.npy import load_npy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0  # widths in inches: one column of a two-column paper, and both
_STYLE: dict[Any, Any] = {
    "font.size": 7,
    "font.family": "sans-serif",
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # letters stay letters
}


@dataclass(frozen=True)
class Choice:
    """What of the whole is shown. perceptual: distance below which redundancy is called so, None: half the threshold;
    cluster: None: of median size."""

    groups: int = 9
    members: int = 6
    perceptual: float | None = None
    cluster: int | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.members < 2:
            raise UserError(
                f"groups is {self.groups} and members {self.members}, expected at least 1 group and 2 members: the kept one and a removed one"
            )


@dataclass(frozen=True)
class Balanced:
    """Everything the figures are made from, by embedding row. representative: int64 [n]; keep: bool [n]; label: int32 [n], -1 for none;
    shard, row: [n], where each sample lies in the tars."""

    rows: EmbeddingRows
    index: ShardIndex
    report: dict[str, Any]
    label: np.ndarray
    k: int
    representative: np.ndarray
    keep: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @property
    def threshold(self) -> float:
        return float(self.report["threshold"])


def read_balanced(
    balance: Path, clusters: Path | None = None, embeddings: Path | None = None, shards: Path | None = None
) -> Balanced:
    """Read the outputs of the stages; None: where tools/balance.py found them. UserError when they do not belong together."""
    meta = read_meta(balance, expect="balance")
    source = meta["source"]
    clusters, embeddings = Path(clusters or source["clusters"]), Path(embeddings or source["embeddings"])
    rows = EmbeddingRows(embeddings)
    label, score, k = read_labels(clusters, rows)
    index = index_of(shards or source["shards"], rows)
    if meta["shards_digest"] != index.digest or meta["arguments"]["labels"] != labels_digest(label, score):
        raise UserError(
            f"{balance} was made from other clusters than {clusters}: run tools/balance.py again, or name the right ones with --clusters"
        )
    shard, row = tar_rows(index, rows)
    place = index.starts[shard] + row
    of, kept = (
        np.concatenate([_part(balance / kind / f"{name}.npy", int(size)) for name, size in zip(index.names, index.sizes)])
        for kind in ("representative", "keep")
    )  # fmt: skip
    number = np.full(index.num_samples, -1, np.int64)
    number[place] = np.arange(rows.num_rows)
    report = json.loads((balance / "report.json").read_text())
    return Balanced(rows, index, report, label, k, number[of[place]], kept[place], shard, row)


def _part(path: Path, size: int) -> np.ndarray:
    part = load_npy(path, "run tools/balance.py again")
    if part.shape != (size,):
        raise UserError(f"{path} has shape {part.shape}, expected ({size},): run tools/balance.py again")
    return part


def make_figures(found: Balanced, choice: Choice, out: Path) -> list[Path]:
    """Write fig2a .. fig2d as .png and .pdf, and index.html; returns what was written."""
    groups = Groups(found.representative, representative_distance(found.rows, found.representative))
    below = perceptual_below(found.threshold, choice.perceptual)
    before, after = cluster_sizes(found.label, found.keep, found.k)
    cluster = (
        choice.cluster if choice.cluster is not None else sample_cluster(found.label, found.representative, found.k)
    )
    shown = None
    if cluster is not None:
        shown = process(found.rows, found.label, found.representative, found.keep, found.threshold, cluster)
    tight = groups.perceptual(below, choice.groups, choice.members)
    loose = groups.near(found.threshold, below, choice.groups, choice.members)
    reader = ShardReader(found.index)
    show = gallery.pictures(reader, found.shard, found.row)
    written, sections = [], []
    with _style():
        for name, heading, figure, text in (
            ("fig2a_perceptual", "(a) Perceptual redundancy", group_figure(tight, found.keep, show), _text_a(groups, below)),
            ("fig2b_semantic", "(b) Semantic redundancy", group_figure(loose, found.keep, show), _text_b(groups, below, found)),
            ("fig2c_process", "(c) Image semantic balance of one cluster", process_figure(shown, show), _text_c(shown, found, choice)),
            ("fig2d_clusters", "(d) Samples per cluster", size_figure(before, after), _text_d(before, after, found)),
        ):  # fmt: skip
            written += _save(figure, out / name)
            body = f'<p><img style="height:auto;max-width:100%;border:0" src="{name}.png" alt="{html.escape(heading)}"></p><p><a href="{name}.pdf">{name}.pdf</a></p>'
            sections.append((heading, text, body))
    reader.close()
    facts = found.report
    summary = f"{facts['kept']:,} of {facts['total']:,} samples kept ({facts['share_kept']:.2%}), pairs nearer than {found.threshold:.4f} are linked, {len(groups):,} groups of two samples or more"
    write_text(out / "index.html", gallery.page("Image semantic balance", summary, sections))
    return [*written, out / "index.html"]


# ---- captions ---------------------------------------------------------------------------------------------------------


def _text_a(groups: Groups, below: float) -> str:
    return (
        f"{groups.count_perceptual(below):,} of {len(groups):,} groups: every removed picture is nearer than {below:.4f} to the one that is kept. "
        "Shown are groups evenly spaced from the tightest to the loosest of them. Blue frame: kept; below the others: their distance to it."
    )


def _text_b(groups: Groups, below: float, found: Balanced) -> str:
    return (
        f"{len(groups) - groups.count_perceptual(below):,} of {len(groups):,} groups: a removed picture is at {below:.4f} or farther. "
        f"Shown are the groups whose farthest picture is nearest to the threshold of the links, {found.threshold:.4f}."
    )


def _text_c(shown: Process | None, found: Balanced, choice: Choice) -> str:
    if shown is None:
        return "No cluster that can be drawn has two groups."
    chosen = (
        "chosen by number"
        if choice.cluster is not None
        else "the one of median size among those with two groups or more"
    )
    away = int((~shown.kept & ~np.isin(found.representative[shown.rows], shown.rows)).sum())
    return (
        f"Cluster {shown.cluster} of {found.k:,}, {chosen}: {len(shown.rows):,} samples, {len(shown.links):,} pairs nearer than {found.threshold:.4f}, "
        f"{int(shown.kept.sum()):,} kept{f', {away:,} removed for a sample of another cluster' if away else ''}. The embeddings lie along their first two principal components "
        f"({shown.explained:.0%} of the variance), pictures moved apart where they would overlap; one colour is one group (colours repeat after {len(COMPONENTS)}), grey ones are alone, pale ones are removed."
    )  # fmt: skip


def _text_d(before: np.ndarray, after: np.ndarray, found: Balanced) -> str:
    b, a = size_facts(before), size_facts(after)
    factors = [x["imbalance"] if x["imbalance"] is not None else float("nan") for x in (b, a)]
    return (
        f"{int(before.sum()):,} samples in {found.k:,} clusters before, {int(after.sum()):,} after; largest cluster {b['largest']:,} and {a['largest']:,}, "
        f"median {b['median']:,g} and {a['median']:,g}, empty {b['empty']:,} and {a['empty']:,}, imbalance factor {factors[0]:.3f} and {factors[1]:.3f} (1: all of one size)."
    )


# ---- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed, the figures need it: pip install matplotlib") from None
    with matplotlib.rc_context(_STYLE):
        yield


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)


def _save(figure: Figure, stem: Path) -> list[Path]:
    """.png at 300 dots per inch and .pdf, without a date: the same input gives the same bytes."""
    paths = []
    for ending, about in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        paths.append(stem.with_name(f"{stem.name}.{ending}"))
        with writing(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=300, metadata=about)
    return paths


def _picture(
    axes: Axes,
    image: Image.Image,
    x: float,
    y: float,
    side: float,
    colour: str | None,
    width: float,
    alpha: float = 1.0,
) -> None:
    """An image around (x, y), inside a square of that side; with a colour, also a frame along its own edges."""
    from matplotlib.patches import Rectangle

    small = image.copy()
    small.thumbnail((256, 256))
    w, h = (side * edge / max(small.size) for edge in small.size)
    box = (x - w / 2, x + w / 2, y - h / 2, y + h / 2)
    axes.imshow(np.asarray(small), extent=box, interpolation="antialiased", alpha=alpha, zorder=2)
    if colour is not None:
        axes.add_patch(Rectangle(box[::2], w, h, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def _nothing(text: str, width: float) -> Figure:
    figure, axes = _new(width, 1.0)
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center", transform=axes[0, 0].transAxes)
    return figure


def group_figure(groups: list[Group], keep: np.ndarray, show: Show) -> Figure:
    """Every group: the kept picture, then the removed ones with their distances to it; small groups share a line. keep: bool [n]."""
    if not groups:
        return _nothing("there is no group of this kind", COLUMN)
    gap, line_height = 0.4, 1.25
    width = max(7.0, max(len(group.rows) for group in groups) + gap)
    places, x, line = [], 0.0, 0
    for group in groups:
        if x and x + len(group.rows) > width:
            x, line = 0.0, line + 1
        places.append((x, -line_height * line))
        x += len(group.rows) + gap
    figure, axes = _new(COLUMN, COLUMN / width * line_height * (line + 1) + 0.04)
    ax = axes[0, 0]
    for group, (x, y) in zip(groups, places):
        for column, (row, distance) in enumerate(zip(group.rows.tolist(), group.distances.tolist())):
            colour, line_width = (KEPT, 1.6) if keep[row] else (REMOVED, 0.6)
            _picture(ax, show(row)[0], x + column, y, 0.9, colour, line_width)
            text = f"{distance:.3f}" if column else "kept" if keep[row] else "capped"
            ax.text(
                x + column, y - 0.5, text, ha="center", va="top", fontsize=5, color=colour if not column else "#333"
            )
        if group.size > len(group.rows):
            more = f"+{group.size - len(group.rows):,}"
            ax.text(x + len(group.rows) - 0.5, y, more, rotation=90, va="center", fontsize=5, color="#333")
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(-line_height * line - 0.72, 0.5)
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def process_figure(shown: Process | None, show: Show) -> Figure:
    """Three panels: the pictures of a cluster, the links below the threshold with their components, what is kept."""
    from matplotlib.collections import LineCollection

    if shown is None:
        return _nothing("no cluster has two groups", PAGE)
    centre, side = gallery.layout(shown)
    images = [show(int(row))[0] for row in shown.rows]
    colours = [component_colour(c) for c in shown.component.tolist()]
    thick = min(1.8, 22 * side)  # points; small pictures would drown in their frames
    figure, axes = _new(PAGE, PAGE / 3 + 0.2, 3)
    for ax, title in zip(
        axes[0],
        (
            f"before: {len(images):,} samples",
            f"{len(shown.links):,} pairs below the threshold",
            f"after: {int(shown.kept.sum()):,} kept",
        ),
    ):
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(True)
            spine.set_color("#cccccc")
    before, links, after = axes[0]
    links.add_collection(LineCollection(list(centre[shown.links]), colors=[colours[a] for a in shown.links[:, 0]], linewidths=0.9, zorder=1))  # fmt: skip
    for i, image in enumerate(images):
        (x, y), frame = centre[i], thick if shown.component[i] >= 0 else thick / 2
        _picture(before, image, x, y, side, None, 0)
        _picture(
            links, image, x, y, side, colours[i], frame if shown.kept[i] else thick / 3, 1.0 if shown.kept[i] else 0.55
        )
        if shown.kept[i]:
            _picture(after, image, x, y, side, colours[i], frame)
    for ax in axes[0]:
        # imshow has set the limits to those of its picture.
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
    return figure


def size_figure(before: np.ndarray, after: np.ndarray) -> Figure:
    """Cluster sizes by rank before and after, log-log. before, after: int64 [k]."""
    figure, axes = _new(COLUMN, 2.4)
    ax = axes[0, 0]
    for name, sizes, colour, dashes in (("before", before, REMOVED, "--"), ("after", after, KEPT, "-")):
        factor = size_facts(sizes)["imbalance"]
        note = f"{name}: {int(sizes.sum()):,} samples" + (f", imbalance {factor:.2f}" if factor is not None else "")
        ax.plot(*gallery.size_curve(sizes), color=colour, linestyle=dashes, label=note)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("cluster, by size")
    ax.set_ylabel("samples in the cluster")
    ax.grid(which="major", alpha=0.3, linewidth=0.5)
    ax.legend(loc="lower left")
    return figure
