"""An offline page that shows what was removed: groups of perceptual and of semantic redundancy, the process on one
cluster, cluster sizes before and after. One file, no scripts, nothing is loaded from elsewhere.

Legend: n samples with an embedding, k clusters, m samples of one cluster.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from megacid.data.decode import decode_image
from megacid.data.index import ShardReader
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.balance.groups import Group, Process, spread_overlaps

# Colours that people with any colour vision can tell apart (Okabe and Ito, 2008).
KEPT, REMOVED, ALONE = "#0072B2", "#D55E00", "#9a9a9a"
COMPONENTS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2", "#B8A800", "#000000")
Show = Callable[[int], tuple[Image.Image, str, str]]  # row -> (image, key, caption)

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em}figure{display:inline-block;margin:2px;text-align:center;vertical-align:top}"
    "img{height:72px;min-width:48px;object-fit:contain;border:2px solid #ccc}"
    f"img.kept{{border-color:{KEPT}}}img.removed{{border-color:{REMOVED}}}"
    "figcaption{font-size:11px;color:#555}.group{margin:.6em 0;padding:.4em;background:#f6f6f6}.panels{display:flex;flex-wrap:wrap;gap:12px}"
)


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """A data URL of a small JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures(reader: ShardReader, shard: np.ndarray, row: np.ndarray, progress: Progress = no_progress) -> Show:
    """How samples are shown. shard, row: int [n], where each lies; progress: called with 0 for every picture."""

    def show(number: int) -> tuple[Image.Image, str, str]:
        progress(0)
        at = int(shard[number]), int(row[number])
        caption = reader.read(*at, "text").decode("utf-8", "replace")
        return decode_image(reader.read(*at, "image")), reader.index.table(at[0]).keys[at[1]], caption

    return show


def component_colour(component: int) -> str:
    """Of a component's number, -1 for a sample alone; numbers beyond the palette begin it again."""
    return ALONE if component < 0 else COMPONENTS[component % len(COMPONENTS)]


def size_curve(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ranks int64 [points], sizes at them), largest cluster first; empty clusters have no point.

    A million clusters need no million points: at most 300 ranks, spaced evenly on the logarithmic axis.
    """
    curve = np.sort(sizes[sizes > 0])[::-1]
    if not len(curve):
        return np.empty(0, np.int64), curve
    ranks = np.unique(np.geomspace(1, len(curve), min(len(curve), 300)).astype(int))
    return ranks, curve[ranks - 1]


def _ticks(top: float) -> list[int]:
    return [10**power for power in range(int(np.floor(np.log10(max(top, 1)))) + 1)]


def size_plot(before: np.ndarray, after: np.ndarray, width: int = 560, height: int = 340) -> str:
    """SVG: cluster sizes by rank on logarithmic axes, before and after. sizes: int64 [k]."""
    curves = [("before", *size_curve(before), REMOVED), ("after", *size_curve(after), KEPT)]
    most = max(int(ranks.max(initial=1)) for _, ranks, _, _ in curves)
    largest = max(int(sizes.max(initial=1)) for _, _, sizes, _ in curves)
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
    for place, (name, ranks, sizes, colour) in enumerate(curves):
        if not len(ranks):
            continue
        points = " ".join(f"{x(r):.1f},{y(s):.1f}" for r, s in zip(ranks.tolist(), sizes.tolist()))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 90}" y="{30 + 16 * place}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">cluster, by size</text>')
    parts.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">samples</text></svg>'
    )
    return "".join(parts)


def layout(shown: Process) -> tuple[np.ndarray, float]:
    """(centres float [m, 2] in the unit square, side of a picture there) of the pictures of a cluster.

    Each component is stretched to the whole square, so only directions and order along the axes keep their meaning.
    """
    side = 0.5 / max(np.sqrt(len(shown.rows)), 3)  # a quarter of the square, so that links can be seen between them
    stretched = (shown.place - shown.place.min(0)) / np.maximum(np.ptp(shown.place, axis=0), 1e-9)
    return spread_overlaps(side / 2 + (1 - side) * stretched, 1.4 * side), side


def process_plot(shown: Process, show: Show, side: int = 360) -> str:
    """Three SVG panels: the pictures of a cluster; the links below the threshold, components coloured; what is kept."""
    centre, picture = layout(shown)
    middle, edge = 8 + (side - 16) * centre, max((side - 16) * picture, 4)
    middle[:, 1] = side - middle[:, 1]
    name = f"c{shown.cluster}"
    images = "".join(
        f'<image id="{name}-{i}" width="{edge:.1f}" height="{edge:.1f}" href="{thumbnail(show(int(row))[0], 48)}"/>'
        for i, row in enumerate(shown.rows)
    )
    colours = [component_colour(c) for c in shown.component.tolist()]

    def pictures(which: np.ndarray, framed: bool) -> str:
        parts = []
        for i in which.tolist():
            x, y = middle[i] - edge / 2
            pale = ' opacity="0.55"' if framed and not shown.kept[i] else ""
            parts.append(f'<use href="#{name}-{i}" x="{x:.1f}" y="{y:.1f}"{pale}/>')
            if framed:
                width = 3 if shown.kept[i] and shown.component[i] >= 0 else 1
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{edge:.1f}" height="{edge:.1f}" fill="none" stroke="{colours[i]}" stroke-width="{width}"/>'
                )
        return "".join(parts)

    lines = "".join(
        f'<line x1="{middle[a, 0]:.1f}" y1="{middle[a, 1]:.1f}" x2="{middle[b, 0]:.1f}" y2="{middle[b, 1]:.1f}" stroke="{colours[a]}"/>'
        for a, b in shown.links.tolist()
    )
    everyone, kept = np.arange(len(shown.rows)), np.flatnonzero(shown.kept)
    panels = (
        (f"before: {len(everyone):,} samples", pictures(everyone, False)),
        (f"{len(shown.links):,} links below the threshold", lines + pictures(everyone, True)),
        (f"after: {len(kept):,} kept", pictures(kept, True)),
    )
    parts = [f'<svg width="0" height="0" style="position:absolute"><defs>{images}</defs></svg><div class="panels">']
    for title, body in panels:
        parts.append(
            f'<figure><svg viewBox="0 0 {side} {side}" width="{side}" height="{side}" role="img" style="background:#fafafa">{body}</svg><figcaption>{title}</figcaption></figure>'
        )
    return "".join(parts) + "</div>"


def group_rows(groups: list[Group], keep: np.ndarray, show: Show) -> str:
    """The HTML of groups, one below the other. keep: bool [n]."""
    parts = []
    for group in groups:
        more = f", {len(group.rows)} of them shown" if group.size > len(group.rows) else ""
        parts.append(f'<div class="group">{group.size:,} samples{more}, largest distance {group.spread:.4f}<br>')
        for place, (row, distance) in enumerate(zip(group.rows.tolist(), group.distances.tolist())):
            image, key, caption = show(row)
            kind = "kept" if keep[row] else "removed"
            number = f"{distance:.4f}" if place else kind if keep[row] else "removed by the cap"
            parts.append(
                f'<figure><img class="{kind}" src="{thumbnail(image)}" alt="{html.escape(caption, quote=True)}" title="{html.escape(caption, quote=True)}">'
                f"<figcaption>{html.escape(key)}<br>{number}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts)


def page(title: str, summary: str, sections: list[tuple[str, str, str]]) -> str:
    """The HTML of (heading, text, body) sections; heading and text are escaped, the body is HTML."""
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
    ]
    parts += [f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{body}" for heading, text, body in sections]
    return "".join(parts) + "\n"
