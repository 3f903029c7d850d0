"""The margin of the target class. Its formula is the operator's, which takes it apart into numbers."""

from megacid_kernels.margin import SIN_FLOOR, Margin

__all__ = ["SIN_FLOOR", "Margin"]
