"""Seeded random transforms, and views: random crops that the teacher has embedded and the student sees again.

View v of a sample is a pure function of a seed, the sample's key and v, so the output of `tools/embed.py` records only
the seed and the number of views.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megacid.data.order import derive_key
from megacid.errors import UserError

_VIEW, _CAPTION = 2, 3  # separate these draws of a sample from its others


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python and of torch's CPU; `generators_restored` restores them."""
    # torch.manual_seed would also reset the generators of the devices.
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the global generators of Python and of torch's CPU at the end of the block."""
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)


def drawn_caption(seed: int, epoch: int, number: int, count: int) -> int:
    """Which of `count` captions a run with this seed reads in an epoch. number: of the sample in the index."""
    return derive_key(seed, epoch, number, _CAPTION) % count


@dataclass(frozen=True)
class Views:
    """The views of every image, as the settings and meta.json of embeddings record them.

    Attributes:
        count: views per image.
        seed: seed of all views.
        crops: digest of example crops (`crops_digest` of models/clip.py). Transforms with the same digest cut the same
            crops out of an image.
    """

    count: int
    seed: int
    crops: str

    def seed_of(self, key: str, view: int) -> int:
        """Seed of the generators before the random crop of one view. key: of the sample."""
        text = f"{self.seed} {view} {key}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def drawn(self, seed: int, epoch: int, number: int) -> int:
        """The view on which a run with this seed trains in an epoch. number: of the sample in the index."""
        return derive_key(seed, epoch, number, _VIEW) % self.count

    @property
    def setting(self) -> dict[str, Any]:
        """For the settings and meta.json of embeddings."""
        return {"views": asdict(self)}


def recorded_views(meta: dict[str, Any], directory: object) -> Views | None:
    """The views in the meta.json of embeddings; None without any. Raises UserError for a damaged entry."""
    if (stored := meta.get("views")) is None:
        return None
    kinds = {"count": int, "seed": int, "crops": str}
    valid = isinstance(stored, dict) and {name: type(value) for name, value in stored.items()} == kinds
    if not valid or stored["count"] < 1:
        raise UserError(
            f"{directory}/meta.json has views {str(stored)[:80]!r}, expected count (1 or more), seed and crops: run "
            "tools/embed.py again"
        )
    return Views(**stored)
