"""Nearest centroids of blocks of rows.

Legend: T rows of one tile, K clusters, D width, L nearest centroids.

Work is cut into tiles of a fixed number of rows, the last one padded: a matrix product rounds differently when its
shape changes, so only fixed shapes give labels that do not depend on how much memory the user allows.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megacid.errors import UserError

Metric = Literal["cosine", "euclidean"]
Backend = Literal["auto", "torch", "faiss"]
TILE_CENTROIDS = 16384


def tile_rows(device: torch.device) -> int:
    """Rows of one tile: large enough to fill the device, small enough that tile x centroids is at most 0.5 GB."""
    return 8192 if device.type == "cuda" else 1024


class Assigner:
    """Finds the nearest centroids. Cosine: largest x . c (unit centroids); Euclidean: largest x . c - |c|^2 / 2.

    backend "torch": blocked fp32 products on `device`; "faiss": faiss.IndexFlat on the CPU; "auto": torch.
    """

    def __init__(self, centroids_KD: Tensor, metric: Metric, device: torch.device, backend: Backend = "auto") -> None:
        self.metric, self.device = metric, device
        self.backend = "torch" if backend == "auto" else backend
        self.centroids_KD = centroids_KD.to(device, torch.float32)
        self.half_norm_K = (self.centroids_KD.double().pow(2).sum(1) / 2).float()
        self._index: Any = None
        if self.backend == "faiss":
            import faiss  # after torch, and only when asked for

            make = faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2
            self._index = make(self.centroids_KD.shape[1])
            self._index.add(self.centroids_KD.cpu().numpy())

    def tile(self, x_TD: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
        """(similarity fp32 [T, L], label int64 [T, L]), best first. Similarity: cosine or squared distance, see `merit`."""
        if self._index is not None:
            found, label = self._index.search(x_TD.cpu().numpy(), top)
            return torch.from_numpy(found).to(self.device), torch.from_numpy(label).to(self.device)
        best: Tensor | None = None
        label_TL = torch.empty(0, dtype=torch.int64)
        for start in range(0, len(self.centroids_KD), TILE_CENTROIDS):
            part = self.centroids_KD[start : start + TILE_CENTROIDS]
            merit = x_TD @ part.T
            if self.metric == "euclidean":
                merit -= self.half_norm_K[start : start + TILE_CENTROIDS]
            # Of several tiles the earlier wins a tie: topk and max are applied to the running best first.
            value, index = merit.max(1, keepdim=True) if top == 1 else merit.topk(min(top, len(part)), dim=1)
            if best is None:
                best, label_TL = value, index + start
            elif top == 1:
                better = value > best
                best, label_TL = torch.where(better, value, best), torch.where(better, index + start, label_TL)
            else:
                both, labels = torch.cat([best, value], 1), torch.cat([label_TL, index + start], 1)
                best, order = both.topk(min(top, both.shape[1]), dim=1)
                label_TL = labels.gather(1, order)
        assert best is not None
        if self.metric == "euclidean":
            best = (x_TD.pow(2).sum(1, keepdim=True) - 2 * best).clamp_min(0)
        return best, label_TL

    def cosine(self, x_TD: Tensor, label_T: Tensor) -> Tensor:
        """Cosine fp32 [T] of each row to the centroid of its label."""
        return torch.nn.functional.cosine_similarity(x_TD, self.centroids_KD[label_T], dim=1)


def prepare(block: np.ndarray, metric: Metric, device: torch.device) -> Tensor:
    """A block of rows as fp32 [B, D] on the device; unit rows for the cosine."""
    # A copy: rows come from read-only memory maps.
    x_BD = (
        torch.from_numpy(np.array(block, dtype=np.float16 if block.dtype == np.float16 else np.float32))
        .to(device)
        .float()
    )
    return torch.nn.functional.normalize(x_BD, dim=1) if metric == "cosine" else x_BD


def pad_rows(x_BD: Tensor, rows: int) -> Tensor:
    """x_BD with zero rows added up to `rows`."""
    if len(x_BD) == rows:
        return x_BD
    return torch.cat([x_BD, x_BD.new_zeros(rows - len(x_BD), x_BD.shape[1])])


def check_backend(backend: str) -> None:
    if backend not in ("auto", "torch", "faiss"):
        raise UserError(f"backend is {backend!r}, wanted auto, torch or faiss")
    if backend == "faiss":
        try:
            import faiss  # noqa: F401
        except ImportError:
            raise UserError(
                "backend is 'faiss' but faiss is not installed: pip install faiss-cpu, or take --backend torch"
            ) from None
