"""Triton kernels of the work on [S, D] that is bound by memory. Needs triton; nothing else in the package imports this."""

from megacid_kernels.fused.launch import INTERPRET, Tile, tile_of
from megacid_kernels.fused.rows import through_norm_, unit_rows
from megacid_kernels.fused.update import AdamWFactors, SGDFactors, adamw_rows_, sgd_rows_

__all__ = [
    "INTERPRET",
    "AdamWFactors",
    "SGDFactors",
    "Tile",
    "adamw_rows_",
    "sgd_rows_",
    "through_norm_",
    "tile_of",
    "unit_rows",
]
