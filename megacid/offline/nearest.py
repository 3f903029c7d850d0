"""Nearest centroids of blocks of rows.

Legend: T rows of one tile, K clusters, D width, L nearest centroids.

Work is cut into tiles of a fixed number of rows, the last one padded: a matrix product rounds differently when its
shape changes, so only fixed shapes give labels that do not depend on how much memory the user allows.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from megacid.errors import UserError
from megacid_kernels.engines.dispatch import resolve

Metric = Literal["cosine", "euclidean"]
Backend = Literal["auto", "torch", "faiss", "triton"]
TILE_CENTROIDS = 16384
_WIDE = 128  # columns from which faiss is the faster one
_CACHED_CENTROIDS = 1024  # of one product on the CPU: its 4 MiB are looked through before they leave the cache


def tile_rows(device: torch.device) -> int:
    """Rows of one tile: large enough to fill the device, small enough that tile x centroids is at most 0.5 GB."""
    return 8192 if device.type == "cuda" else 1024


def search_bytes(k: int, rows: int, device: torch.device) -> int:
    """What an Assigner of k centroids holds beside two copies of them while it looks for the one nearest to each of a tile
    of rows. faiss, too, makes products of 1,024 centroids at a time, for all rows."""
    width = _CACHED_CENTROIDS if device.type == "cpu" else TILE_CENTROIDS
    return rows * (min(k, width) * 4 + 48)


def chosen_backend(backend: Backend, device: torch.device, dim: int) -> Backend:
    """What "auto" stands for: on a GPU Triton's kernel where it imports; on the CPU, for wide rows, faiss where it is
    installed; else torch. A rule, not a measurement in every run: they round differently, and a run that goes on has to
    give the same bits. For a GPU nothing has been measured yet (`tools/bench.py --suite assignment`).

    Measured (`tools/bench.py --suite kmeans`, AMD EPYC, 4,096 centroids): an iteration costs 1.04 to 1.06 times faiss's
    assignment with faiss and 1.13 (one thread) to 1.27 times (two) with torch's MKL at D = 256; at D = 64 torch's products
    take 0.7 times as long as faiss.
    """
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") is not None else "torch"
    wide = device.type == "cpu" and dim >= _WIDE
    return "faiss" if wide and importlib.util.find_spec("faiss") is not None else "torch"


class Assigner:
    """Finds the nearest centroids. Cosine: largest x . c (unit centroids); Euclidean: largest x . c - |c|^2 / 2.

    backend "torch": blocked fp32 products on `device`; "faiss": faiss.IndexFlat, on the GPU where `device` is one and faiss
    was built for it; "triton": `megacid_kernels.fused.nearest` on a GPU, with factors rounded to fp16 for the cosine and
    products of three TF32 terms for distances, for the nearest centroid alone (several are found by torch); "auto": see
    `chosen_backend`. UserError for Triton without a GPU.
    """

    def __init__(self, centroids_KD: Tensor, metric: Metric, device: torch.device, backend: Backend = "auto") -> None:
        self.metric, self.device = metric, device
        self.backend = chosen_backend(backend, device, centroids_KD.shape[1])
        self.centroids_KD = centroids_KD.to(device, torch.float32)
        self.half_norm_K = (self.centroids_KD.double().pow(2).sum(1) / 2).float()
        self._merit: Tensor | None = None  # one for all tiles: fresh pages for each cost as much as a pass over it
        self._index: Any = None
        if self.backend == "faiss":
            import faiss  # after torch, and only when asked for

            make = faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2
            self._index = make(self.centroids_KD.shape[1])
            if device.type == "cuda" and faiss.get_num_gpus():
                self._resources = faiss.StandardGpuResources()  # has to live as long as the index
                self._index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._index)
            self._index.add(self.centroids_KD.cpu().numpy())
        elif self.backend == "triton":
            self._operand = _triton_operand(self.centroids_KD, metric)

    def tile(self, x_TD: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
        """(similarity fp32 [T, L], label int64 [T, L]), best first. Similarity: cosine or squared distance, see `merit`."""
        if self._index is not None:
            found, label = self._index.search(x_TD.cpu().numpy(), top)
            return torch.from_numpy(found).to(self.device), torch.from_numpy(label).to(self.device)
        if top == 1 and self.backend == "triton":
            best, label_TL = self._by_triton(x_TD)
        elif top == 1 and self.device.type == "cpu":
            best, label_TL = self._largest(x_TD)
        else:
            best, label_TL = self._top(x_TD, top)
        if self.metric == "euclidean":
            best = (x_TD.pow(2).sum(1, keepdim=True) - 2 * best).clamp_min(0)
        return best, label_TL

    def _by_triton(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        from megacid_kernels.fused.nearest import nearest

        half_norm_K = self.half_norm_K if self.metric == "euclidean" else None
        value_T, label_T = nearest(x_TD.to(self._operand.dtype), self._operand, half_norm_K, precision="tf32x3")
        return value_T[:, None], label_T[:, None]

    def _largest(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The largest merit [T, 1] and its centroid, on the CPU.

        Looked for by NumPy: torch's max with indices is not vectorised and costs a sixth of the product at D = 256.
        """
        rows, best_T, label_T = (
            np.arange(len(x_TD)),
            np.full(len(x_TD), -np.inf, np.float32),
            np.zeros(len(x_TD), np.int64),
        )
        for start in range(0, len(self.centroids_KD), _CACHED_CENTROIDS):
            merit = self._merits(x_TD, start, _CACHED_CENTROIDS).numpy()
            index_T = merit.argmax(1)
            value_T = merit[rows, index_T]
            better_T = value_T > best_T  # of equal ones the first stays
            np.copyto(best_T, value_T, where=better_T)
            np.copyto(label_T, index_T + start, where=better_T)
        return torch.from_numpy(best_T)[:, None], torch.from_numpy(label_T)[:, None]

    def _top(self, x_TD: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The largest merits [T, L] and their centroids."""
        best: Tensor | None = None
        label_TL = torch.empty(0, dtype=torch.int64)
        for start in range(0, len(self.centroids_KD), TILE_CENTROIDS):
            merit = self._merits(x_TD, start, TILE_CENTROIDS)
            # Of several tiles the earlier wins a tie: topk and max are applied to the running best first.
            value, index = merit.max(1, keepdim=True) if top == 1 else merit.topk(min(top, merit.shape[1]), dim=1)
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
        return best, label_TL

    def _merits(self, x_TD: Tensor, start: int, count: int) -> Tensor:
        """What is to be made large, fp32 [T, count or what is left]; overwritten by the next call."""
        part = self.centroids_KD[start : start + count]
        merit = torch.mm(x_TD, part.T, out=self._room(len(x_TD), len(part)))
        if self.metric == "euclidean":
            merit -= self.half_norm_K[start : start + count]
        return merit

    def _room(self, rows: int, centroids: int) -> Tensor:
        if self._merit is None or self._merit.numel() < rows * centroids:
            self._merit = torch.empty(rows * centroids, dtype=torch.float32, device=self.device)
        return self._merit[: rows * centroids].view(rows, centroids)

    def cosine(self, x_TD: Tensor, label_T: Tensor) -> Tensor:
        """Cosine fp32 [T] of each row to the centroid of its label."""
        return torch.nn.functional.cosine_similarity(x_TD, self.centroids_KD[label_T], dim=1)


def _triton_operand(centroids_KD: Tensor, metric: Metric) -> Tensor:
    """What the kernel multiplies with. UserError where it cannot run."""
    try:
        resolve("triton", centroids_KD.device, centroids_KD.dtype)
    except ValueError as error:
        raise UserError(f"backend is 'triton', which cannot be had here ({error}): take --backend torch") from None
    return centroids_KD.half() if metric == "cosine" else centroids_KD


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
    if backend not in get_args(Backend):
        raise UserError(
            f"backend is {backend!r}, expected {', '.join(get_args(Backend)[:-1])} or {get_args(Backend)[-1]}"
        )
    if backend == "faiss":
        try:
            import faiss  # noqa: F401
        except ImportError:
            raise UserError(
                "backend is 'faiss' but faiss is not installed: pip install faiss-cpu, or take --backend torch"
            ) from None
