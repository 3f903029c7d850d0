"""CLIP distillation by cluster-instance discrimination, with a million-class, class-sharded margin classifier."""

from megacid.classifier import Margin, PartialFC, RowAdamW, RowSGD, clip_grad_norm_, shard_range

__all__ = ["Margin", "PartialFC", "RowAdamW", "RowSGD", "clip_grad_norm_", "shard_range"]
