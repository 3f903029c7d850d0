"""Linear probe as CLIP_benchmark fits it (its `metrics/linear_probe.py`, version 1.6.2): AdamW with a cosine schedule.

10 epochs of batches of 64 at a learning rate that falls from 0.1 to 0, without a warm-up; fp32, as its `--no_amp`. The
weight decay is chosen on held-out samples, and the final fit has all train samples. Weights and batches are drawn from
torch's CPU generator exactly as CLIP_benchmark draws them, so equal features in equal order give its numbers.
Shapes: B batch, N samples, C classes, D features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from megacid.distributed.stopping import Progress, no_progress
from megacid.evaluate.linear_probe import Fitted, held_out_rows, scored

EPOCHS = 10
BATCH_SIZE = 64
LEARNING_RATE = 0.1
SEED = 0
WEIGHT_DECAYS = tuple(np.logspace(-6, 2, 97).tolist())
_COARSE, _SPANS = 16, (8, 4, 2, 1)  # steps of the search in WEIGHT_DECAYS


def fit(
    feature_ND: Tensor,
    label_N: Tensor,
    *,
    num_classes: int,
    weight_decay: float,
    seed: int = SEED,
    progress: Progress = no_progress,
) -> nn.Linear:
    """Minimise the mean cross entropy. The same seed gives the same weights; torch's generators keep their state.

    Args:
        feature_ND: fp32, on the device that computes.
        label_N: int64, on the same device.
        progress: polled for every batch.
    """
    rows = TensorDataset(feature_ND, label_N)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        linear = nn.Linear(feature_ND.shape[1], num_classes).to(feature_ND.device)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
        # Batches of row numbers, so the dataset is indexed once per batch instead of once per sample.
        order = BatchSampler(RandomSampler(rows), BATCH_SIZE, drop_last=False)
        batches: DataLoader[tuple[Tensor, ...]] = DataLoader(rows, sampler=order, batch_size=None)
        steps = EPOCHS * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for _ in range(EPOCHS):
            for feature_BD, label_B in batches:
                progress(0)
                optimizer.zero_grad()
                F.cross_entropy(linear(feature_BD), label_B).backward()
                optimizer.step()
                schedule.step()
    return linear.requires_grad_(False)


def choose_weight_decay(
    feature_ND: Tensor,
    label_N: Tensor,
    split: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    seed: int = SEED,
    progress: Progress = no_progress,
) -> tuple[float, float]:
    """The weight decay with the best held-out accuracy that a search in WEIGHT_DECAYS finds, and that accuracy.

    The search takes the best of every 16th value, then of that one and its neighbours at distances 8, 4, 2 and 1. Of
    equal ones it takes the smallest. label_N is on the CPU; split: its `held_out_rows`.
    """
    fit_rows, held_rows = split
    device = feature_ND.device
    train_ND, train_N = feature_ND[fit_rows.to(device)], label_N[fit_rows].to(device)
    held_ND, held_N = feature_ND[held_rows.to(device)], label_N[held_rows]
    accuracies: dict[int, float] = {}

    def accuracy(index: int) -> float:
        if index not in accuracies:
            decay = WEIGHT_DECAYS[index]
            linear = fit(train_ND, train_N, num_classes=num_classes, weight_decay=decay, seed=seed, progress=progress)
            accuracies[index] = scored(linear(held_ND), held_N)["acc1"]
        return accuracies[index]

    last = len(WEIGHT_DECAYS) - 1
    best = max(range(0, last + 1, _COARSE), key=accuracy)
    for span in _SPANS:
        best = max(max(best - span, 0), best, min(best + span, last), key=accuracy)
    return WEIGHT_DECAYS[best], accuracies[best]


def adamw(train_ND: Tensor, train_N: Tensor, test_ND: Tensor, num_classes: int, progress: Progress) -> Fitted:
    """A recipe of `linear_probe`, for one label per image. The settings have CLIP_benchmark's names."""
    split = held_out_rows(train_N)
    weight_decay, held_out = choose_weight_decay(train_ND, train_N, split, num_classes=num_classes, progress=progress)
    order = torch.cat(split)  # CLIP_benchmark appends the held-out samples to the others
    feature_ND, label_N = train_ND[order.to(train_ND.device)], train_N[order].to(train_ND.device)
    linear = fit(feature_ND, label_N, num_classes=num_classes, weight_decay=weight_decay, progress=progress)
    settings = {"weight_decay": weight_decay, "epochs": EPOCHS, "seed": SEED, "fewshot_k": -1, "normalized": True}
    return Fitted(linear(test_ND), held_out, settings)
