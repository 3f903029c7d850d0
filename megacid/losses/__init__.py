"""The loss terms and their weighted sum."""

from megacid.losses.cluster import ClusterDistillation
from megacid.losses.instance import affinity_loss, contrastive_loss, feature_mse, instance_loss
from megacid.losses.objective import Objective, StartedBatch

__all__ = [
    "ClusterDistillation", "Objective", "StartedBatch", "affinity_loss", "contrastive_loss", "feature_mse",
    "instance_loss",
]  # fmt: skip
