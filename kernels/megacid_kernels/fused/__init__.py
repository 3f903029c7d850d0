"""Triton kernels of the head and of the row updates. Needs triton; what else in the package imports this does so late."""

from megacid_kernels.fused.epilogue import row_epilogue
from megacid_kernels.fused.finish import finish_x_, rows_through_norm_
from megacid_kernels.fused.forward import exponentials
from megacid_kernels.fused.inplace import exponentials_
from megacid_kernels.fused.labels import LabelOrder, add_labels_, label_order
from megacid_kernels.fused.launch import INTERPRET, Tile, tile_of
from megacid_kernels.fused.nearest import nearest
from megacid_kernels.fused.negatives import Exponentials, pitch, pitched
from megacid_kernels.fused.product import ProductTile
from megacid_kernels.fused.rows import through_norm_, unit_rows
from megacid_kernels.fused.target import target_cosines
from megacid_kernels.fused.tuning import Tiles, tiles_for
from megacid_kernels.fused.update import AdamWFactors, SGDFactors, adamw_rows_, sgd_rows_

__all__ = [
    "INTERPRET",
    "AdamWFactors",
    "Exponentials",
    "LabelOrder",
    "ProductTile",
    "SGDFactors",
    "Tile",
    "Tiles",
    "adamw_rows_",
    "add_labels_",
    "exponentials",
    "exponentials_",
    "finish_x_",
    "label_order",
    "nearest",
    "pitch",
    "pitched",
    "row_epilogue",
    "rows_through_norm_",
    "sgd_rows_",
    "target_cosines",
    "through_norm_",
    "tile_of",
    "tiles_for",
    "unit_rows",
]
