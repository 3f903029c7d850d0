"""The tiles of the products by device, dtype and width: a table that is looked up, never tuned at run time.

Autotuning would spoil the data of in-place kernels, let ranks choose differently, and change bits between runs.

MEGACID_KERNEL_TABLE names a JSON file whose entries take precedence over the table here (`tools/tune.py` measures one):

    [{"architecture": "sm_90", "dtype": "float16", "width": 512, "matrix": "fused",
      "forward": {"rows": 128, "columns": 128, "depth": 64, "warps": 4, "stages": 3, "group": 8, "descriptors": true},
      "nearest": {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 4, "group": 64}}]

An entry serves widths up to its own and above the next smaller entry of its architecture and dtype; the largest also
serves all wider ones.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megacid_kernels.fused.launch import INTERPRET
from megacid_kernels.fused.product import PRODUCT_DTYPES, ProductTile

TABLE_VARIABLE = "MEGACID_KERNEL_TABLE"
MatrixBy = Literal["fused", "in-place"]
Key = tuple[str, str, int]  # architecture such as "sm_90", dtype such as "float16", largest width


@dataclass(frozen=True)
class Tiles:
    """Tiles of the products of one device, dtype and range of widths."""

    forward: ProductTile
    nearest: ProductTile
    matrix: MatrixBy  # exponentials "fused" into the product, or "in-place" over a cuBLAS product

    def __post_init__(self) -> None:
        if self.nearest.descriptors:
            raise ValueError('"nearest" has descriptors true, expected false: its kernel reads through pointers only')


def _entry(forward: tuple[Any, ...], nearest: tuple[Any, ...], matrix: MatrixBy) -> Tiles:
    return Tiles(ProductTile(*forward), ProductTile(*nearest), matrix)


# rows, columns, depth, warps, stages, group, descriptors. Measured on an H100. Two programs of four warps share a
# multiprocessor: one makes exponentials while the other keeps the tensor cores busy.
_DESCRIPTORS_90 = _entry((128, 128, 64, 4, 3, 16, True), (128, 256, 64, 8, 3, 64), "fused")
# Both kernels would spill on sm_100 with 256 columns.
_WIDE_100 = _entry((128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 64), "in-place")
_SHORT_100 = _entry((128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 64), "fused")
# Triton's mma.sync is close to cuBLAS, so fused at any width. With 256 columns both kernels would spill on sm_80. The
# 64 KiB fit sm_120, too.
_MMA = _entry((128, 128, 32, 8, 4, 8), (128, 128, 32, 8, 4, 64), "fused")
# 99 KiB (sm_86, sm_89) and unknown devices: a tile that fits everywhere.
_ELSEWHERE = _entry((64, 128, 32, 4, 3, 8), (64, 128, 32, 4, 3, 64), "fused")
# No tensor core has the precision of fp32: small tiles, and cuBLAS for the matrix.
_FLOAT32 = _entry((64, 128, 16, 8, 2, 8), (64, 128, 16, 8, 2, 64), "in-place")
# The interpreter's time depends on the number of operations, not on their size.
_INTERPRETED = _entry((128, 256, 512, 8, 1, 8), (128, 256, 512, 8, 1, 8), "fused")

_HALVES = ("float16", "bfloat16")
TABLE: dict[Key, Tiles] = {
    **{("sm_80", dtype, 512): _MMA for dtype in _HALVES},
    **{("sm_90", dtype, 512): _DESCRIPTORS_90 for dtype in _HALVES},
    **{("sm_100", dtype, 512): _SHORT_100 for dtype in _HALVES},
    **{("sm_100", dtype, 768): _WIDE_100 for dtype in _HALVES},
    **{("sm_120", dtype, 512): _MMA for dtype in _HALVES},
}


def tiles_for(device: torch.device, dtype: torch.dtype, width: int) -> Tiles:
    """The tiles for rows of this dtype and width.

    Raises:
        ValueError: a dtype without kernels; the table that MEGACID_KERNEL_TABLE names is invalid or of other devices.
    """
    if dtype not in PRODUCT_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {PRODUCT_DTYPES}")
    name = str(dtype).removeprefix("torch.")
    tiles = None
    if device.type == "cuda" or INTERPRET:
        architecture = architecture_of(device)
        _check_architecture(architecture)
        tiles = lookup(architecture, name, width)
    return tiles or (_INTERPRETED if INTERPRET else _FLOAT32 if dtype == torch.float32 else _ELSEWHERE)


def architecture_of(device: torch.device) -> str:
    """The architecture of the table's entries for a device: "sm_90", or "interpreter" for a CPU."""
    return "interpreter" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _check_architecture(architecture: str) -> None:
    path = os.environ.get(TABLE_VARIABLE)
    known = {name for name, _, _ in read_table(path)} if path else {architecture}
    if architecture not in known:
        raise ValueError(
            f"{TABLE_VARIABLE} is {path!r} with tiles for {', '.join(sorted(known)) or 'nothing'}, expected some for "
            f"{architecture}, this device: measure them with tools/tune.py, or unset it"
        )


def lookup(architecture: str, dtype: str, width: int) -> Tiles | None:
    """The entry of the file that MEGACID_KERNEL_TABLE names, else of the table here, else None."""
    path = os.environ.get(TABLE_VARIABLE)
    for table in (read_table(path) if path else {}, TABLE):
        widths = sorted(w for arch, kind, w in table if (arch, kind) == (architecture, dtype))
        if widths:
            return table[architecture, dtype, next((w for w in widths if width <= w), widths[-1])]
    return None


@lru_cache
def read_table(path: str) -> dict[Key, Tiles]:
    """The table in a JSON file, read once per process. Raises ValueError that names the file."""
    try:
        entries = json.loads(Path(path).read_text())
        table = dict(_parsed(entry) for entry in entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{TABLE_VARIABLE} is {path!r}, expected a JSON table as tools/tune.py writes it, or unset it: "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(table) != len(entries):
        raise ValueError(f"{TABLE_VARIABLE} is {path!r}, expected one entry per architecture, dtype and width")
    return table


def _parsed(entry: dict[str, Any]) -> tuple[Key, Tiles]:
    expected = {"architecture", "dtype", "width", "matrix", "forward", "nearest"}
    if set(entry) != expected:
        raise ValueError(f"an entry has {sorted(entry)}, expected {sorted(expected)}")
    if entry["matrix"] not in get_args(MatrixBy):
        raise ValueError(f"matrix is {entry['matrix']!r}, expected one of {get_args(MatrixBy)}")
    forward, nearest = ProductTile(**entry["forward"]), ProductTile(**entry["nearest"])
    key = (str(entry["architecture"]), str(entry["dtype"]), int(entry["width"]))
    return key, Tiles(forward, nearest, entry["matrix"])


def as_json(table: dict[Key, Tiles]) -> str:
    """The table as the JSON text that `read_table` reads."""
    entries = [
        {
            "architecture": architecture,
            "dtype": dtype,
            "width": width,
            "matrix": tiles.matrix,
            "forward": asdict(tiles.forward),
            "nearest": asdict(tiles.nearest),
        }
        for (architecture, dtype, width), tiles in table.items()
    ]
    return json.dumps(entries, indent=1) + "\n"
