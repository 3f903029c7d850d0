"""Triton kernels of the classifier and its row optimizers. Needs triton: the rest of the package imports it lazily."""

from megacid_kernels.fused.exponentials import exponentials
from megacid_kernels.fused.exponentials_inplace import exponentials_
from megacid_kernels.fused.gradient_epilogue import finish_x_, rows_through_norm_
from megacid_kernels.fused.label_gradient import LabelOrder, add_labels_, label_order
from megacid_kernels.fused.labels import locate_labels
from megacid_kernels.fused.launch import INTERPRET, Tile, tile_of
from megacid_kernels.fused.nearest import nearest
from megacid_kernels.fused.normalize import unit_rows
from megacid_kernels.fused.product import ProductTile
from megacid_kernels.fused.row_epilogue import RowLosses, SoftmaxRows, row_epilogue
from megacid_kernels.fused.row_statistics import Exponentials, pitch, pitched
from megacid_kernels.fused.row_update import AdamWFactors, SGDFactors, adamw_rows_, sgd_rows_
from megacid_kernels.fused.target import target_cosines, target_margins
from megacid_kernels.fused.tuning import Tiles, tiles_for

__all__ = [
    "INTERPRET",
    "AdamWFactors",
    "Exponentials",
    "LabelOrder",
    "ProductTile",
    "RowLosses",
    "SGDFactors",
    "SoftmaxRows",
    "Tile",
    "Tiles",
    "adamw_rows_",
    "add_labels_",
    "exponentials",
    "exponentials_",
    "finish_x_",
    "label_order",
    "locate_labels",
    "nearest",
    "pitch",
    "pitched",
    "row_epilogue",
    "rows_through_norm_",
    "sgd_rows_",
    "target_cosines",
    "target_margins",
    "tile_of",
    "tiles_for",
    "unit_rows",
]
