"""Synthetic data as pure functions of (seed, sample number): captioned scenes of shapes, and class-labelled features.

There is no state between samples: any number of them needs bounded memory, and each can be generated on its own.
Shapes: m rows, d feature width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance

from megacid.data.order import KeyedPermutation, derive_key, splitmix64
from megacid.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "hexagon")
COLOURS = {
    "red": (205, 45, 45),
    "green": (45, 160, 65),
    "blue": (50, 80, 205),
    "yellow": (225, 205, 50),
    "purple": (135, 60, 170),
    "orange": (235, 135, 35),
    "cyan": (60, 190, 205),
    "pink": (235, 140, 185),
}
SIZES = {"small": 0.13, "medium": 0.2, "large": 0.28}  # radius as a share of the side
PLACES = {
    "at the top left": (0.32, 0.32),
    "at the top": (0.5, 0.32),
    "at the top right": (0.68, 0.32),
    "on the left": (0.32, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.68, 0.5),
    "at the bottom left": (0.32, 0.68),
    "at the bottom": (0.5, 0.68),
    "at the bottom right": (0.68, 0.68),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (18, 18, 18),
    "grey": (128, 128, 128),
    "sand": (220, 200, 160),
    "navy": (22, 28, 72),
    "mint": (190, 230, 205),
}
_PARTS = (len(SIZES), len(COLOURS), len(SHAPES), len(PLACES), len(BACKGROUNDS))
MAX_CLUSTERS = math.prod(_PARTS)
SCENE_CAPTIONS = (
    "a {size} {colour} {shape} {place} on a {background} background.",
    "a picture of a {size} {colour} {shape} {place}, {background} background",
    "{background} background with a {size} {shape} in {colour} {place}",
    "{place}: one {size} {colour} {shape}, drawn on {background}",
)


class Scene(NamedTuple):
    """The attributes of a cluster, as words."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def phrase(self) -> str:
        return f"{self.size} {self.colour} {self.shape} {self.place} on a {self.background} background"


class SceneMaker:
    """Generates captioned scenes.

    Args:
        clusters: number of kinds of scenes.
        duplicates: probability that a pair is a copy of an earlier one.
        side: side of the images in pixels.
        seed: determines everything.
        stream: number of a set that shares no image with other sets (0: training, 1: test).

    Raises:
        UserError: more clusters than there are kinds of scenes.
    """

    def __init__(self, clusters: int, duplicates: float, side: int, seed: int, stream: int = 0) -> None:
        if not 1 <= clusters <= MAX_CLUSTERS:
            raise UserError(
                f"--clusters is {clusters}, expected 1 .. {MAX_CLUSTERS}, the number of different scenes: choose fewer"
            )
        self.clusters, self.duplicates, self.side, self.seed, self.stream = clusters, duplicates, side, seed, stream
        self._kinds = KeyedPermutation(MAX_CLUSTERS, derive_key(seed, 11))

    def scene(self, cluster: int) -> Scene:
        choice = np.unravel_index(self._kinds(cluster), _PARTS)
        parts = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES), tuple(BACKGROUNDS))
        return Scene(*(names[int(i)] for names, i in zip(parts, choice)))

    def _rng(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.stream, purpose, number])

    def origin(self, number: int) -> int:
        """Number of the original that pair `number` is a copy of (or of a copy of); its own number for an original."""
        while number > 0:
            rng = self._rng(number, 0)
            if rng.random() >= self.duplicates:
                return number
            number = int(rng.integers(number))
        return 0

    def cluster(self, number: int) -> int:
        """Cluster of an original: every cluster occurs once in `clusters` consecutive numbers."""
        run, i = divmod(number, self.clusters)
        return KeyedPermutation(self.clusters, derive_key(self.seed, self.stream, run))(i)

    def caption(self, number: int) -> str:
        rng = self._rng(number, 1)
        template = SCENE_CAPTIONS[int(rng.integers(len(SCENE_CAPTIONS)))]
        return template.format(**self.scene(self.cluster(self.origin(number)))._asdict())

    def image(self, number: int) -> Image.Image:
        """Draw an original: RGB, side x side, with random place, size, angle and colour within its cluster."""
        rng = self._rng(number, 2)
        scene = self.scene(self.cluster(number))
        scale = 2  # drawn larger and scaled down, for smooth edges
        side = self.side * scale
        tint = rng.integers(-14, 15, 6)
        ground, ink = (
            tuple(int(v) for v in np.clip(np.add(colour, shift), 0, 255))
            for colour, shift in ((BACKGROUNDS[scene.background], tint[:3]), (COLOURS[scene.colour], tint[3:]))
        )
        image = Image.new("RGB", (side, side), ground)
        x, y = (np.array(PLACES[scene.place]) + rng.uniform(-0.05, 0.05, 2)) * side
        radius = SIZES[scene.size] * rng.uniform(0.88, 1.12) * side
        draw_shape(ImageDraw.Draw(image), scene.shape, float(x), float(y), float(radius), rng.uniform(-0.25, 0.25), ink)
        return image.resize((self.side, self.side), Image.Resampling.BOX)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, angle: float, ink: tuple[int, ...]
) -> None:
    """Draw one of SHAPES around (x, y) in pixels, rotated by `angle` radians."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=ink)
        return
    if shape == "ring":
        draw.ellipse(box, outline=ink, width=max(2, round(radius * 0.35)))
        return
    narrow = 0.3
    corners: list[tuple[float, float]]  # (radius share, angle in turns)
    if shape == "star":
        corners = [(1.0 if i % 2 == 0 else 0.42, i / 10 - 0.25) for i in range(10)]
    elif shape == "cross":
        long, turn = math.hypot(1, narrow), math.atan2(narrow, 1) / math.tau
        inner = math.hypot(narrow, narrow)
        corners = [c for q in range(4) for c in ((long, q / 4 - turn), (long, q / 4 + turn), (inner, q / 4 + 1 / 8))]
    elif shape == "diamond":
        corners = [(1.0 if i % 2 == 0 else 0.6, i / 4 - 0.25) for i in range(4)]
    else:
        n = {"triangle": 3, "square": 4, "hexagon": 6}[shape]
        corners = [(1.0, (i + (0.5 if n == 4 else 0)) / n - 0.25) for i in range(n)]
    draw.polygon(
        [
            (x + r * radius * math.cos(t * math.tau + angle), y + r * radius * math.sin(t * math.tau + angle))
            for r, t in corners
        ],
        fill=ink,
    )


def altered(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int, str]:
    """A near duplicate as found on the web: recompressed, shifted by a pixel, or slightly brighter or darker.

    Returns:
        The image, the JPEG quality to save it with, and a description of the change.
    """
    kind = int(rng.integers(3))
    if kind == 0:
        quality = int(rng.integers(40, 80))
        return image, quality, f"jpeg quality {quality}"
    if kind == 1:
        dx, dy = ((1, 0), (-1, 0), (0, 1), (0, -1))[int(rng.integers(4))]
        return ImageChops.offset(image, dx, dy), 92, f"shift {dx} {dy}"
    factor = round(float(rng.uniform(0.88, 0.95) if rng.random() < 0.5 else rng.uniform(1.05, 1.12)), 3)
    return ImageEnhance.Brightness(image).enhance(factor), 92, f"brightness {factor}"


def hashed_normals(rows_m: np.ndarray, width: int, key: int) -> np.ndarray:
    """float32 [m, width] standard normals, a pure function of (row number, column, key): a counter-based generator.

    One SplitMix64 hash per pair of columns gives two 32-bit uniforms for a Box-Muller transform, so every row can be
    computed on its own.
    """
    half = (width + 1) // 2
    base = splitmix64(np.asarray(rows_m, np.uint64) ^ np.uint64(key))
    bits = splitmix64(base[:, None] ^ splitmix64(np.arange(half, dtype=np.uint64))[None, :])
    first = ((bits >> np.uint64(32)).astype(np.float32) + 0.5) * np.float32(2**-32)  # in (0, 1]: log is finite
    second = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2**-32 * math.tau)
    radius = np.sqrt(-2 * np.log(first))
    return np.concatenate([radius * np.cos(second), radius * np.sin(second)], axis=1)[:, :width]


def class_features(
    class_m: np.ndarray, sample_m: np.ndarray, dim: int, noise: float, seed: int, nuisance: float = 0.0
) -> np.ndarray:
    """float32 [m, d], L2-normalised: unit centre of the class plus noise of expected length `noise`.

    Args:
        class_m: int64 class of each row.
        sample_m: int64 number of each row, different for every sample of train and test.
        nuisance: expected length of a second noise in a fixed subspace of a quarter of the dimensions, the same for all
            classes: a trained tower can learn to ignore it, like the lighting or background of a picture.
    """
    centre = hashed_normals(class_m, dim, derive_key(seed, 21))
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    rows = centre + np.float32(noise / math.sqrt(dim)) * hashed_normals(sample_m, dim, derive_key(seed, 22))
    if nuisance > 0:
        directions = max(1, dim // 4)
        basis, _ = np.linalg.qr(hashed_normals(np.arange(directions), dim, derive_key(seed, 24)).T)
        along = np.float32(nuisance / math.sqrt(directions)) * hashed_normals(
            sample_m, directions, derive_key(seed, 25)
        )
        # Not one matrix product: its rounding would depend on the number of rows.
        for weight_m, direction_d in zip(along.T, basis.T.astype(np.float32)):
            rows += weight_m[:, None] * direction_d
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
