"""gallery.html: groups of perceptual and of semantic redundancy, as one page without scripts or external files."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from megacid.data.decode import BadSample, decode_image
from megacid.data.index import ShardReader
from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import printable
from megacid.offline.balance.deduplicate import Decision
from megacid.offline.balance.groups import PERCEPTUAL_SHARE, Group, Groups, perceptual_distance
from megacid.offline.balance.inputs import SampleLocations

log = logging.getLogger(__name__)

KEPT, REMOVED = "#0072B2", "#D55E00"  # safe for colour-blind readers (Okabe and Ito, 2008)
Show = Callable[[int], tuple[Image.Image, str, str]]  # embedding row -> (image, key, caption)
_MEMBERS = 9  # images shown per group, at most
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em}"
    "figure{display:inline-block;margin:2px;text-align:center;vertical-align:top}"
    "img{height:72px;min-width:48px;object-fit:contain;border:2px solid #ccc}"
    f"img.kept{{border-color:{KEPT}}}img.removed{{border-color:{REMOVED}}}"
    "figcaption{font-size:11px;color:#555}.group{margin:.6em 0;padding:.4em;background:#f6f6f6}"
)


@contextmanager
def image_reader(locations: SampleLocations, progress: Progress = no_progress) -> Iterator[Show]:
    """Yields a function that reads a sample, with a placeholder for an image that cannot be read.

    One warning at the end counts them and names the first. progress: called with 0 for every image.
    """
    bad: dict[int, BadSample] = {}
    with closing(ShardReader(locations.index)) as reader:

        def show(number: int) -> tuple[Image.Image, str, str]:
            progress(0)
            shard, row = locations.place(number)
            name, key = reader.index.names[shard], reader.index.table(shard).keys[row]
            image, caption = _placeholder(), ""
            try:
                image = decode_image(reader.read(shard, row, "image"), shard=name, key=key)
                caption = reader.caption(shard, row)
            except BadSample as error:
                bad[number] = error
            return image, key, caption

        yield show
    if bad:
        first = next(iter(bad.values()))
        log.warning(
            "%d samples that were embedded cannot be read now and are shown as grey squares; the first is %s: compare "
            "the tars with tools/index_shards.py --verify %s, or fetch them again",
            len(bad),
            first,
            locations.index.root,
        )


def _placeholder() -> Image.Image:
    """A grey square with a cross."""
    image = Image.new("RGB", (96, 96), "#dddddd")
    draw = ImageDraw.Draw(image)
    draw.line((8, 8, 88, 88), fill="#999999", width=3)
    draw.line((8, 88, 88, 8), fill="#999999", width=3)
    return image


def gallery_page(groups: Groups, decision: Decision, report: dict[str, Any], count: int, show: Show) -> str:
    """The HTML of gallery.html. report: report.json; count: groups shown, half of them of each kind."""
    limit = perceptual_distance(decision.threshold)
    perceptual = groups.count_perceptual(limit)
    sections = [
        (
            "Perceptual redundancy",
            f"{perceptual:,} groups{groups.note} in which every removed image is nearer than {limit:.4f}, "
            f"{PERCEPTUAL_SHARE:.0%} of the threshold, to the kept one (blue frame).",
            group_rows(groups.perceptual(limit, -(-count // 2), _MEMBERS), decision.keep, show),
        ),
        (
            "Semantic redundancy",
            f"{len(groups) - perceptual:,} groups{groups.note} with a removed image at a larger distance from "
            "the kept one.",
            group_rows(groups.semantic(limit, count // 2, _MEMBERS), decision.keep, show),
        ),
    ]
    summary = (
        f"{report['kept']:,} of {report['total']:,} samples kept ({report['share_kept']:.2%}); pairs nearer than "
        f"{decision.threshold:.5f} were linked. tools/figures.py draws one cluster and the sizes of all clusters."
    )
    return page("Redundant images", summary, sections)


def group_rows(groups: list[Group], keep: np.ndarray, show: Show) -> str:
    """The HTML of groups, one below the other. keep: bool [n]."""
    parts = []
    for group in groups:
        more = f", {len(group.rows)} of them shown" if group.size > len(group.rows) else ""
        parts.append(f'<div class="group">{group.size:,} samples{more}, largest distance {group.spread:.4f}<br>')
        for place, (row, distance) in enumerate(zip(group.rows.tolist(), group.distances.tolist())):
            image, key, caption = show(row)
            kind = "kept" if keep[row] else "removed"
            note = f"{distance:.4f}" if place else kind if keep[row] else "removed by the cap"
            text = html.escape(printable(caption), quote=True)
            parts.append(
                f'<figure><img class="{kind}" src="{_thumbnail(image)}" alt="{text}" title="{text}">'
                f"<figcaption>{html.escape(printable(key))}<br>{note}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts)


def _thumbnail(image: Image.Image, side: int = 96) -> str:
    """A data URL of a small JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(title: str, summary: str, sections: list[tuple[str, str, str]]) -> str:
    """The HTML of (heading, text, body) sections; heading and text are escaped, the body is HTML."""
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
    ]
    parts += [f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{body}" for heading, text, body in sections]
    return "".join(parts) + "\n"
