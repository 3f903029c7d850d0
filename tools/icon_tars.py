"""Renders icons and writes them to tars, in several processes; a tar that exists is read instead."""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from icon_packages import Icon
from megacid.distributed.parent_process import set_parent_death_signal
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError, one_line
from megacid.failpoints import failpoint
from megacid.storage.atomic import writing
from sample_tars import add_member

THUMBNAIL = 16  # pixels, side of the grey pictures that near-duplicates are looked for in


class NotRendered(Exception):  # noqa: N818  a fault of an icon that is counted
    """An icon that gives no picture; the message is the reason."""


class TarJob(NamedTuple):
    """A tar to write: its pairs (key, caption, icon)."""

    path: Path
    pairs: list[tuple[str, str, Icon]]


class TarContent(NamedTuple):
    """What a tar holds, n samples, and why icons are not in it.

    keys: n keys. digests: n hashes of the PNG files. thumbnails: uint8 [n, THUMBNAIL * THUMBNAIL], white is 0.
    failures: reason by `set:name`.
    """

    keys: list[str]
    digests: list[bytes]
    thumbnails: np.ndarray
    failures: dict[str, str]


class Renderer:
    """Draws icons in black or their colours on white, as PNG files of side x side pixels."""

    def __init__(self, side: int, fonts: dict[str, bytes]) -> None:
        """fonts: the font file of each set that has one, by prefix."""
        self.side, self.fonts = side, fonts

    def __call__(self, icon: Icon) -> bytes:
        """Raises NotRendered for an icon that cannot be drawn, and for one that leaves the picture in one colour."""
        data = self._glyph(icon) if icon.prefix in self.fonts else self._svg(icon)
        grey = Image.open(io.BytesIO(data)).convert("L")
        low, high = grey.getextrema()
        if low == high:
            raise NotRendered("blank picture")
        return data

    def _svg(self, icon: Icon) -> bytes:
        svg_to_bytes = _resvg()
        try:
            png = svg_to_bytes(
                svg_string=icon.drawing, background="white", width=self.side, height=self.side, skip_system_fonts=True
            )
        except ValueError as error:
            raise NotRendered(one_line(error, 100)) from None
        return bytes(png)

    def _glyph(self, icon: Icon) -> bytes:
        """The glyph in the middle, at the font's size for that side, or smaller where it is wider or higher."""
        font = self._font(icon.prefix, self.side)
        if bytes(font.getmask(icon.drawing)) == bytes(font.getmask("\uffff")):
            raise NotRendered("the font has no such glyph")
        left, top, right, bottom = font.getbbox(icon.drawing)
        if (extent := max(right - left, bottom - top)) > self.side:
            font = self._font(icon.prefix, int(self.side * self.side / extent))
            left, top, right, bottom = font.getbbox(icon.drawing)
        picture = Image.new("L", (self.side, self.side), 255)
        corner = (self.side - right - left) // 2, (self.side - bottom - top) // 2
        ImageDraw.Draw(picture).text(corner, icon.drawing, fill=0, font=font)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    @functools.lru_cache(maxsize=64)  # noqa: B019  one renderer per process
    def _font(self, prefix: str, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(io.BytesIO(self.fonts[prefix]), size, layout_engine=ImageFont.Layout.BASIC)


def _resvg() -> Any:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("SVG icons need the package resvg-py: pip install 'megacid[corpus]'") from None
    return svg_to_bytes


def make_tars(jobs: list[TarJob], renderer: Renderer, workers: int) -> list[TarContent]:
    """Write the tars that are missing, read the others; the contents in the order of `jobs`.

    Raises:
        UserError: a tar cannot be written, or a worker process was killed.
    """
    if workers == 1:
        return list(_reported(jobs, (make_tar(job, renderer) for job in jobs)))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(renderer, os.getpid())
    )
    try:
        futures = [pool.submit(_make_tar_in_worker, job) for job in jobs]
        for _ in _reported(jobs, _as_completed(futures)):
            pass
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of {workers} was killed, perhaps for want of memory: run the same command again with "
            "fewer --workers; finished tars are kept"
        ) from None
    except BaseException:  # a request to stop: what a worker is writing has a temporary name
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _as_completed(futures: list[Future[TarContent]]) -> Iterator[TarContent]:
    """The results as they come. A signal is noticed within a second."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _reported(jobs: list[TarJob], contents: Iterator[TarContent]) -> Iterator[TarContent]:
    with progress_bar("render", "pair", sum(len(job.pairs) for job in jobs)) as bar:
        for number, content in enumerate(contents, 1):
            bar.update(len(content.keys) + len(content.failures))
            failpoint("icons:tar", number=number)
            yield content


_renderer: Renderer | None = None  # of a worker process


def _start_worker(renderer: Renderer, parent: int) -> None:
    global _renderer
    _renderer = renderer
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent cancels


def _make_tar_in_worker(job: TarJob) -> TarContent:
    assert _renderer is not None
    return make_tar(job, _renderer)


def make_tar(job: TarJob, renderer: Renderer) -> TarContent:
    """Write one tar, unless a complete one exists."""
    pictures = _read_pictures(job.path)
    failures: dict[str, str] = {}
    drawn: dict[str, bytes] = {}
    for key, _, icon in job.pairs:
        try:
            drawn[key] = pictures[key] if key in pictures else renderer(icon)
        except NotRendered as error:
            failures[f"{icon.prefix}:{icon.name}"] = str(error)
    if list(pictures) != list(drawn):
        with writing(job.path) as temporary, tarfile.open(temporary, "w") as tar:
            for key, caption, _ in job.pairs:
                if key in drawn:
                    add_member(tar, f"{key}.png", drawn[key])
                    add_member(tar, f"{key}.txt", caption.encode())
    thumbnails = (
        np.stack([thumbnail(png) for png in drawn.values()]) if drawn else np.empty((0, THUMBNAIL**2), np.uint8)
    )
    return TarContent(list(drawn), [hashlib.sha256(png).digest() for png in drawn.values()], thumbnails, failures)


def _read_pictures(path: Path) -> dict[str, bytes]:
    """The PNG files of a tar by key; none where the tar is missing or damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                member.name.removesuffix(".png"): tar.extractfile(member).read()  # type: ignore[union-attr]
                for member in tar
                if member.name.endswith(".png")
            }
    except (OSError, tarfile.TarError):
        return {}


def thumbnail(png: bytes) -> np.ndarray:
    """uint8 [THUMBNAIL * THUMBNAIL]: how dark the picture is, from 0 for white."""
    grey = Image.open(io.BytesIO(png)).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return 255 - np.asarray(grey, np.uint8).ravel()
