"""The class-sharded, sampled margin classifier and its row-sparse optimizers."""

from megacid.classifier.clipping import clip_grad_norm_
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.row_adamw import RowAdamW
from megacid.classifier.row_sgd import RowSGD
from megacid.distributed.parallel import shard_range
from megacid_kernels.margin import Margin

__all__ = ["Margin", "PartialFC", "RowAdamW", "RowSGD", "clip_grad_norm_", "shard_range"]
