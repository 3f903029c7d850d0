"""Figure 4 of the CLIP-CID paper: weights of the last fully connected layer in the middle and the last block.

The layer is the second one of the MLP, the blocks are those of the image tower. Writes fig4_weights: for each block a
histogram per model and the standard deviation of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figure_kinds.labels import source
from figure_kinds.towers import SPEC, blocks_of, last_linear, of_models
from megacid.errors import UserError
from megacid.models.clip import LoadedClip
from megacid.offline.figure_style import COLOURS, PAGE, add_legend, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS_PER_DEVIATION, _MOST_BINS = 10, 20_000
_SHOWN = 4  # standard deviations to each side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", type=source, nargs="+", metavar="[LABEL=]MODEL", help=SPEC)


class LayerWeights(NamedTuple):
    """The weights of a layer, float64 [n], in block `block` (from 1) of `blocks`."""

    block: int
    blocks: int
    values: np.ndarray


def layer_weights(clip: LoadedClip) -> tuple[LayerWeights, LayerWeights]:
    """Those of the middle block, the earlier one of two, and of the last. Raises UserError for other towers."""
    blocks = blocks_of(clip)
    layers = []
    for number in ((len(blocks) - 1) // 2, len(blocks) - 1):
        values = last_linear(blocks[number], clip).weight.detach().double().cpu().numpy().ravel()
        if not np.isfinite(values).all() or values.std() == 0:
            raise UserError(
                f"the weights of {clip.name}, {clip.pretrained} in block {number + 1} are all equal or not finite, "
                "expected trained ones: check the model"
            )
        layers.append(LayerWeights(number + 1, len(blocks), values))
    return layers[0], layers[1]


def bin_edges(layers: list[np.ndarray]) -> np.ndarray:
    """Edges of equal bins for all layers, symmetric, which hold every weight."""
    most = max(float(np.abs(values).max()) for values in layers)
    width = min(float(values.std()) for values in layers) / _BINS_PER_DEVIATION
    half = min(int(np.ceil(most / width)) + 1, _MOST_BINS // 2)
    return np.linspace(-1, 1, 2 * half + 1) * max(most, half * width)


def weights_figure(models: dict[str, tuple[LayerWeights, LayerWeights]]) -> Figure:
    """Two panels, the middle and the last block, with the standard deviations in the order of the legend."""
    figure, axes = new_figure(PAGE, 2.3, columns=2)
    lines = {}
    for place, (ax, name) in enumerate(zip(axes[0], ("middle block", "last block"))):
        layers = {label: both[place] for label, both in models.items()}
        edges = bin_edges([layer.values for layer in layers.values()])
        for number, (label, layer) in enumerate(layers.items()):
            density, _ = np.histogram(layer.values, edges, density=True)
            colour = COLOURS[number % len(COLOURS)]
            ax.stairs(density, edges, color=colour, alpha=0.15, fill=True)
            lines[label] = ax.stairs(density, edges, color=colour, linewidth=1.2)
            style = {"color": colour, "fontsize": 7, "va": "top", "transform": ax.transAxes}
            ax.text(0.02, 0.98 - 0.09 * number, f"σ = {layer.values.std():.4f}", **style)
        wide = _SHOWN * max(float(layer.values.std()) for layer in layers.values())
        ax.set_xlim(-wide, wide)
        ax.set_ylim(0)
        numbers = dict.fromkeys(f"{layer.block} of {layer.blocks}" for layer in layers.values())
        ax.set_title(f"{name} ({', '.join(numbers)})")
        ax.set_xlabel("weight")
        ax.set_ylabel("density")
    add_legend(figure, lines, "lower")
    return figure


def draw(args: argparse.Namespace) -> list[Path]:
    models = of_models(args.models, "cpu", layer_weights)
    return save_figure(weights_figure(models), args.out / "fig4_weights")
