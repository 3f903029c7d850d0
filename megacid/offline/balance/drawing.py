"""Draws Figure 2 with matplotlib: groups, one cluster step by step, cluster sizes.

Legend: n samples with an embedding, k clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megacid.offline.balance.cluster_process import ClusterProcess, layout
from megacid.offline.balance.gallery import KEPT, REMOVED, Show
from megacid.offline.balance.groups import Group
from megacid.offline.balance.report import size_statistics
from megacid.offline.figure_style import COLOURS, COLUMN, GREY, PAGE, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def group_colour(component: int) -> str:
    """The colour of a component, -1 for a sample alone. Colours repeat after the palette."""
    return GREY if component < 0 else COLOURS[component % len(COLOURS)]


def size_curve(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster sizes by rank, at most 300 points evenly spaced on a logarithmic axis; empty clusters are left out.

    Returns:
        Ranks from 1, int64 [points], and the sizes at them, largest first.
    """
    curve = np.sort(sizes[sizes > 0])[::-1]
    if not len(curve):
        return np.empty(0, np.int64), curve
    ranks = np.unique(np.geomspace(1, len(curve), min(len(curve), 300)).astype(int))
    return ranks, curve[ranks - 1]


def group_figure(groups: list[Group], keep: np.ndarray, show: Show) -> Figure:
    """Groups: the kept image, then removed ones and their distances; small groups share a line. keep: bool [n]."""
    if not groups:
        return _text_figure("there is no group of this kind", COLUMN)
    gap, line_height = 0.4, 1.25
    width = max(7.0, max(len(group.rows) for group in groups) + gap)
    places, x, line = [], 0.0, 0
    for group in groups:
        if x and x + len(group.rows) > width:
            x, line = 0.0, line + 1
        places.append((x, -line_height * line))
        x += len(group.rows) + gap
    figure, axes = new_figure(COLUMN, COLUMN / width * line_height * (line + 1) + 0.04)
    ax = axes[0, 0]
    for group, (x, y) in zip(groups, places):
        for column, (row, distance) in enumerate(zip(group.rows.tolist(), group.distances.tolist())):
            colour, line_width = (KEPT, 1.6) if keep[row] else (REMOVED, 0.6)
            _image(ax, show(row)[0], (x + column, y), 0.9, colour, line_width)
            text = f"{distance:.3f}" if column else "kept" if keep[row] else "capped"
            below = {"ha": "center", "va": "top", "fontsize": 5, "color": "#333" if column else colour}
            ax.text(x + column, y - 0.5, text, **below)
        if group.size > len(group.rows):
            more = f"+{group.size - len(group.rows):,}"
            ax.text(x + len(group.rows) - 0.5, y, more, rotation=90, va="center", fontsize=5, color="#333")
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(-line_height * line - 0.72, 0.5)
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def process_figure(shown: ClusterProcess | None, show: Show) -> Figure:
    """Three panels of one cluster: all images, the links with their components, the kept images."""
    from matplotlib.collections import LineCollection

    if shown is None:
        return _text_figure("no cluster has two groups", PAGE)
    centre, side = layout(shown)
    images = [show(int(row))[0] for row in shown.rows]
    colours = [group_colour(c) for c in shown.component.tolist()]
    thick = min(1.8, 22 * side)  # points; wide frames would hide small images
    figure, axes = new_figure(PAGE, PAGE / 3 + 0.2, columns=3)
    before, links, after = axes[0]
    before.set_title(f"before: {len(images):,} samples")
    links.set_title(f"{len(shown.links):,} pairs below the threshold")
    after.set_title(f"after: {int(shown.kept.sum()):,} kept")
    lines = [colours[a] for a in shown.links[:, 0]]
    links.add_collection(LineCollection(list(centre[shown.links]), colors=lines, linewidths=0.9, zorder=1))
    for i, image in enumerate(images):
        place, frame = tuple(centre[i]), thick if shown.component[i] >= 0 else thick / 2
        _image(before, image, place, side)
        if shown.kept[i]:
            _image(links, image, place, side, colours[i], frame)
            _image(after, image, place, side, colours[i], frame)
        else:
            _image(links, image, place, side, colours[i], thick / 3, alpha=0.55)
    for ax in axes[0]:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set(visible=True, color="#cccccc")
        # imshow has set the limits to those of its image.
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
    return figure


def size_figure(before: np.ndarray, after: np.ndarray) -> Figure:
    """Cluster sizes by rank before and after, on logarithmic axes. before, after: int64 [k]."""
    figure, axes = new_figure(COLUMN, 2.4)
    ax, lines = axes[0, 0], {}
    for name, sizes, colour, dashes in (("before", before, REMOVED, "--"), ("after", after, KEPT, "-")):
        factor = size_statistics(sizes)["imbalance"]
        note = f"{name}: {int(sizes.sum()):,} samples" + (f", imbalance {factor:.2f}" if factor is not None else "")
        (lines[note],) = ax.plot(*size_curve(sizes), color=colour, linestyle=dashes)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("cluster, by size")
    ax.set_ylabel("samples in the cluster")
    ax.grid(which="major", alpha=0.3, linewidth=0.5)
    add_legend(figure, lines, "upper")
    return figure


def _text_figure(text: str, width: float) -> Figure:
    figure, axes = new_figure(width, 1.0)
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center", transform=axes[0, 0].transAxes)
    return figure


def _image(
    axes: Axes,
    image: Image.Image,
    centre: tuple[float, float],
    side: float,
    colour: str | None = None,
    width: float = 0,
    alpha: float = 1.0,
) -> None:
    """An image inside a square of that side; with a colour, also a frame along its own edges."""
    from matplotlib.patches import Rectangle

    small = image.copy()
    small.thumbnail((256, 256))
    w, h = (side * edge / max(small.size) for edge in small.size)
    box = (centre[0] - w / 2, centre[0] + w / 2, centre[1] - h / 2, centre[1] + h / 2)
    axes.imshow(np.asarray(small), extent=box, interpolation="antialiased", alpha=alpha, zorder=2)
    if colour is not None:
        axes.add_patch(Rectangle(box[::2], w, h, fill=False, edgecolor=colour, linewidth=width, zorder=3))
