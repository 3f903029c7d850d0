"""An offline page that shows what was removed: groups of redundant images by tightness, and cluster sizes before and after."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:70em}figure{display:inline-block;margin:2px;text-align:center}"
    "img{height:72px;min-width:48px;object-fit:contain;border:2px solid #ccc}img.kept{border-color:#2a7}"
    "figcaption{font-size:11px;color:#555}.group{margin:.6em 0;padding:.4em;background:#f6f6f6}"
)


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """A data URL of a small JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ticks(top: float) -> list[int]:
    return [10**power for power in range(int(np.floor(np.log10(max(top, 1)))) + 1)]


def size_plot(before: np.ndarray, after: np.ndarray, width: int = 560, height: int = 340) -> str:
    """SVG: cluster sizes by rank on logarithmic axes, before and after. Empty clusters have no point."""
    curves = [
        (name, np.sort(sizes[sizes > 0])[::-1], colour)
        for name, sizes, colour in (("before", before, "#c33"), ("after", after, "#2a7"))
    ]
    most, largest = max(len(curve) for _, curve, _ in curves), max(int(curve.max(initial=1)) for _, curve, _ in curves)
    left, bottom = 60, height - 40
    span_x, span_y = np.log10(max(most, 2)), np.log10(max(largest, 2))

    def x(number: float) -> float:
        return float(left + (width - left - 20) * np.log10(number) / span_x)

    def y(size: float) -> float:
        return float(bottom - (bottom - 20) * np.log10(size) / span_y)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="11">']
    parts.append(f'<path d="M{left} 20V{bottom}H{width - 20}" fill="none" stroke="#333"/>')
    parts += [f'<text x="{x(t):.0f}" y="{bottom + 14}" text-anchor="middle">{t:,}</text>' for t in _ticks(most)]
    parts += [f'<text x="{left - 6}" y="{y(t) + 4:.0f}" text-anchor="end">{t:,}</text>' for t in _ticks(largest)]
    for place, (name, curve, colour) in enumerate(curves):
        if not len(curve):
            continue
        # A million clusters need no million points: ranks are spaced evenly on the logarithmic axis.
        ranks = np.unique(np.geomspace(1, len(curve), min(len(curve), 300)).astype(int))
        points = " ".join(f"{x(r):.1f},{y(curve[r - 1]):.1f}" for r in ranks)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 90}" y="{30 + 16 * place}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">cluster, by size</text>')
    parts.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">samples</text></svg>'
    )
    return "".join(parts)


def pick_groups(owner: np.ndarray, distance: np.ndarray, count: int, members: int) -> list[tuple[float, np.ndarray]]:
    """(largest distance, rows: the kept one first) of `count` groups, evenly spaced from the tightest to the loosest.

    owner: int64 [n]; distance: float [n], of each sample to its owner. At most `members` rows per group are returned.
    """
    linked = np.flatnonzero(owner != np.arange(len(owner)))
    if not len(linked):
        return []
    roots, inverse = np.unique(owner[linked], return_inverse=True)
    spread = np.zeros(len(roots))
    np.maximum.at(spread, inverse, distance[linked])
    by_group = linked[np.argsort(inverse, kind="stable")]
    ends = np.cumsum(np.bincount(inverse))
    ranked = np.argsort(spread, kind="stable")
    shown = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).astype(int))]
    starts = ends - np.bincount(inverse)
    return [
        (float(spread[g]), np.concatenate([[roots[g]], by_group[starts[g] : ends[g]][: members - 1]])) for g in shown
    ]


def page(
    groups: list[tuple[float, np.ndarray]],
    distance: np.ndarray,
    show: Callable[[int], tuple[Image.Image, str, str]],
    plot: str,
    summary: str,
) -> str:
    """The HTML. `show(row)` gives (image, key, caption). Groups come tightest first: perceptual copies, then semantic ones."""
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>Redundant images</title><style>{_STYLE}</style><h1>Redundant images</h1>'
    ]
    parts.append(f"<p>{html.escape(summary)}</p><h2>Cluster sizes</h2>{plot}<h2>Groups, tightest first</h2>")
    parts.append(
        "<p>The green frame is the one that is kept. Small distances are copies of one picture (perceptual), large ones are the same thing seen again (semantic).</p>"
    )
    for spread, rows in groups:
        parts.append(f'<div class="group">largest distance {spread:.4f}<br>')
        for place, row in enumerate(rows):
            image, key, caption = show(int(row))
            kind = "kept" if place == 0 else "removed"
            parts.append(
                f'<figure><img class="{kind}" src="{thumbnail(image)}" alt="{html.escape(caption, quote=True)}" title="{html.escape(caption, quote=True)}">'
                f"<figcaption>{html.escape(key)}<br>{'kept' if place == 0 else f'{distance[row]:.4f}'}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts) + "\n"
