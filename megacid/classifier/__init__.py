"""The class-sharded, sampled margin classifier and its row-sparse optimizers."""

from megacid.classifier.margin import Margin
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_optimizer import RowAdamW, RowSGD
from megacid.classifier.sampling import shard_range

__all__ = ["Margin", "PartialFC", "RowAdamW", "RowSGD", "shard_range"]
