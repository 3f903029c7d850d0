"""Figure 5 of the CLIP-CID paper: the first three principal components of patch features, as red, green and blue.

The features are those after the last block and the final norm of the image tower. The components are fitted for each
model over the patches of all pictures, so colours compare within a row of the figure. Writes fig5_patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from argtypes import positive
from figure_kinds.labels import source
from figure_kinds.towers import SPEC, of_models, patch_features
from megacid.data.decode import BadSample, decode_image
from megacid.data.tar_bytes import TarBytes
from megacid.data.tar_headers import TarDamage, members
from megacid.data.tar_samples import IMAGE_EXTENSIONS
from megacid.errors import UserError
from megacid.models.clip import LoadedClip
from megacid.offline.figure_style import PAGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMPONENTS = 3
_TAILS = (1.0, 99.0)  # percentiles that become 0 and 1, so that single patches do not take all of the colours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", type=source, nargs="+", metavar="[LABEL=]MODEL", help=SPEC)
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="FILE", help="pictures, or tars whose pictures to take"
    )
    parser.add_argument(
        "--count", type=positive, default=6, metavar="N", help="pictures shown, the first ones (default 6)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )


def read_pictures(paths: Sequence[Path], count: int) -> list[Image.Image]:
    """The first pictures of the files and tars, in their order. Raises UserError for one that cannot be read."""
    pictures: list[Image.Image] = []
    for path in paths:
        left = count - len(pictures)
        try:
            if path.suffix == ".tar":
                pictures += _of_tar(path, left)
            elif left:
                pictures.append(decode_image(path.read_bytes(), shard=str(path.parent), key=path.name))
        except (OSError, BadSample, TarDamage) as error:
            raise UserError(f"{path} cannot be read ({error}): pass another picture or tar") from None
    if not pictures:
        raise UserError(
            f"{', '.join(map(str, paths))} has no picture, expected one with the ending {', '.join(IMAGE_EXTENSIONS)}: "
            "pass another tar"
        )
    return pictures


def _of_tar(path: Path, count: int) -> list[Image.Image]:
    with TarBytes(path) as tar:
        entries = members(tar)
        shown = (one for one in entries if one.regular and one.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
        chosen = list(islice(shown, count))
        data = [tar.read(one.offset, one.size) for one in chosen]
    return [decode_image(encoded, shard=path.name, key=one.name) for encoded, one in zip(data, chosen)]


def principal_components(features_NC: np.ndarray) -> np.ndarray:
    """The first three principal components of rows, largest first: scores, float64 [N, 3].

    Of each axis, the coordinate with the largest absolute value is positive. Raises UserError for too few rows.
    """
    if min(features_NC.shape) < _COMPONENTS + 1:
        raise UserError(
            f"{features_NC.shape[0]} patches of width {features_NC.shape[1]}, expected at least {_COMPONENTS + 1} of "
            f"width {_COMPONENTS + 1}: pass more pictures, or a model with smaller patches"
        )
    centred = features_NC.astype(np.float64)
    centred -= centred.mean(0)
    # By the C x C products: a singular value decomposition of many rows takes longer.
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes_C3 = vectors[:, ::-1][:, :_COMPONENTS]
    largest = np.abs(axes_C3).argmax(0)
    return centred @ (axes_C3 * np.sign(axes_C3[largest, np.arange(_COMPONENTS)]))


def component_colours(features_BHWC: np.ndarray) -> np.ndarray:
    """The components as colours from 0 to 1, scaled over all pictures, float64 [B, H, W, 3]."""
    scores = principal_components(features_BHWC.reshape(-1, features_BHWC.shape[-1]))
    low, high = np.percentile(scores, _TAILS, axis=0)
    scaled = (scores - low) / np.maximum(high - low, np.finfo(np.float64).tiny)
    return scaled.clip(0, 1).reshape(*features_BHWC.shape[:-1], _COMPONENTS)


def model_view(clip: LoadedClip, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """What a model sees and what it makes of it: uint8 [B, height, width, 3], colours [B, H, W, 3]."""
    images = torch.stack([clip.preprocess_eval(picture) for picture in pictures])
    features = torch.cat([patch_features(clip, image[None]) for image in images])
    return images.permute(0, 2, 3, 1).numpy(), component_colours(features.numpy())


def patches_figure(pictures: np.ndarray, colours: dict[str, np.ndarray]) -> Figure:
    """A row of pictures, uint8 [B, height, width, 3], and below it a row for each model, [B, H, W, 3]."""
    columns, rows = len(pictures), {"picture": pictures, **colours}
    side = min(1.2, (PAGE - 0.3) / columns)
    figure, axes = new_figure(columns * side + 0.3, len(rows) * side + 0.05, len(rows), columns)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for line, (label, images) in zip(axes, rows.items()):
        for ax, image in zip(line, images):
            # The same extent for all: a grid of patches covers the picture.
            ax.imshow(image, interpolation="nearest", extent=(0, 1, 0, 1))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(label)
    return figure


def draw(args: argparse.Namespace) -> list[Path]:
    pictures = read_pictures(args.images, args.count)
    views = of_models(args.models, args.device, lambda clip: model_view(clip, pictures))
    seen = max((images for images, _ in views.values()), key=lambda images: images.shape[1])  # with most pixels
    colours = {label: colours for label, (_, colours) in views.items()}
    return save_figure(patches_figure(seen, colours), args.out / "fig5_patches")
