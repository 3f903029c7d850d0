"""Nearest-centroid search for tiles of rows, with torch, faiss or Triton.

Tiles have a fixed number of rows, the last one padded: a matrix product rounds differently when its shape changes, so
only fixed shapes give labels that do not depend on the memory bound.

Legend: T rows of one tile, K clusters, D width, L nearest centroids.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from megacid.errors import UserError
from megacid_kernels.engines.dispatch import resolve
from megacid_kernels.products import TILE_MULTIPLE, onednn_is_faster, tiles, times_transposed
from megacid_kernels.rows import unit_rows

Metric = Literal["cosine", "euclidean"]
Backend = Literal["auto", "torch", "faiss", "triton"]
TILE_CENTROIDS = 16384
_MANY = TILE_CENTROIDS // 3  # of the nearest: more take longer to be sorted than to be computed
_SORTED_ROWS = 128  # at a time, which bounds the memory of a sort
_MIN_FAISS_DIM = 128  # width from which faiss is faster than torch with MKL
_CACHED_CENTROIDS = 1024  # per product on the CPU, whose 4 MiB are searched while they are in the cache


def tile_rows(device: torch.device) -> int:
    """Rows of one tile: large enough to fill the device, small enough that tile x centroids is at most 0.5 GB."""
    return 8192 if device.type == "cuda" else 1024


def search_bytes(k: int, rows: int, device: torch.device) -> int:
    """Bytes that an Assigner of k centroids needs to search a tile of rows, besides two copies of the centroids. faiss
    also computes products of 1,024 centroids at a time, for all rows."""
    width = _CACHED_CENTROIDS if device.type == "cpu" else TILE_CENTROIDS
    return rows * (min(k, width) * 4 + 48)


def chosen_backend(backend: Backend, device: torch.device, dim: int) -> Backend:
    """The backend that "auto" stands for.

    On a GPU: Triton if it is installed. On the CPU, for wide rows: faiss if it is installed and torch has only MKL (see
    `megacid_kernels.products`). Else torch. This is a fixed rule and not a measurement at run time, because backends
    round differently and a continued run must give the same bits.

    Measured (`tools/bench.py --suite kmeans`, AMD EPYC, 4,096 centroids): at D = 256 an iteration takes 1.04 to 1.08
    times as long as faiss's assignment alone with faiss, 1.13 (one thread) to 1.27 times (two) with MKL, and 0.60 to
    0.63 times with oneDNN; at D = 64 MKL takes 0.7 times as long as faiss. For a GPU see `--suite assignment`.
    """
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") is not None else "torch"
    by_faiss = device.type == "cpu" and dim >= _MIN_FAISS_DIM and not onednn_is_faster()
    return "faiss" if by_faiss and importlib.util.find_spec("faiss") is not None else "torch"


class Assigner:
    """Finds the nearest centroids by their merit. Cosine: x . c (unit centroids); Euclidean: x . c - |c|^2 / 2.

    Backends:
        torch: Blocked fp32 products on `device`.
        faiss: faiss.IndexFlat, on the GPU if `device` is one and faiss was built for it.
        triton: `megacid_kernels.fused.nearest`; factors rounded to fp16 for the cosine, products of three TF32 terms
            for distances. For the nearest centroid only; several are found by torch. UserError without a GPU.
        auto: See `chosen_backend`.
    """

    def __init__(self, centroids_KD: Tensor, metric: Metric, device: torch.device, backend: Backend = "auto") -> None:
        self.metric, self.device = metric, device
        self.backend = chosen_backend(backend, device, centroids_KD.shape[1])
        self.centroids_KD = centroids_KD.to(device, torch.float32)
        parts = self.centroids_KD.split(TILE_CENTROIDS)  # fp64 copies of all centroids would need four times as much
        self.half_norm_K = torch.cat([(part.double().pow(2).sum(1) / 2).float() for part in parts])
        self._merit: Tensor | None = None  # reused by all tiles: page faults cost as much as a pass over it
        self._index: Any = None
        if self.backend == "faiss":
            import faiss  # must come after torch

            index_class = faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2
            self._index = index_class(self.centroids_KD.shape[1])
            if device.type == "cuda" and faiss.get_num_gpus():
                self._resources = faiss.StandardGpuResources()  # must live as long as the index
                self._index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._index)
            self._index.add(self.centroids_KD.cpu().numpy())
        elif self.backend == "triton":
            self._operand = _triton_operand(self.centroids_KD, metric)

    def tile(self, x_TD: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
        """(similarity fp32 [T, L]: cosine or squared distance; label int64 [T, L]) of the `top` nearest, best first."""
        if self._index is not None:
            similarity, label = self._index.search(x_TD.cpu().numpy(), top)
            return torch.from_numpy(similarity).to(self.device), torch.from_numpy(label).to(self.device)
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
        """The largest merit [T, 1] and its centroid, on the CPU. Uses NumPy, because torch's max with indices is not
        vectorised and takes a sixth of the time of the product at D = 256."""
        rows = np.arange(len(x_TD))
        best_T, label_T = np.full(len(x_TD), -np.inf, np.float32), np.zeros(len(x_TD), np.int64)
        for part in tiles(len(self.centroids_KD), _CACHED_CENTROIDS):
            merit = self._merits(x_TD, part).numpy()
            index_T = merit.argmax(1)
            value_T = merit[rows, index_T]
            better_T = value_T > best_T  # on a tie the first stays
            np.copyto(best_T, value_T, where=better_T)
            np.copyto(label_T, index_T + part.start, where=better_T)
            del merit  # the next product gets its memory, which is in the cache
        return torch.from_numpy(best_T)[:, None], torch.from_numpy(label_T)[:, None]

    def _top(self, x_TD: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The largest merits [T, L] and their centroids."""
        if top > _MANY and len(self.centroids_KD) > TILE_CENTROIDS:
            return self._top_of_many(x_TD, top)
        best: Tensor | None = None
        label_TL = torch.empty(0, dtype=torch.int64)
        for start in range(0, len(self.centroids_KD), TILE_CENTROIDS):
            merit = self._merits_in_buffer(x_TD, start)
            # On a tie the earlier tile wins: the running best comes first.
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

    def _top_of_many(self, x_TD: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """As `_top`. Merits wait until there are about three times as many as are kept, since a sort of nearly all of
        them in every tile of centroids takes several times as long."""
        count, waiting = len(self.centroids_KD), 3 * top // TILE_CENTROIDS * TILE_CENTROIDS
        merit = torch.empty(len(x_TD), top + waiting, device=self.device)  # the best so far, then those that wait
        label_TL = torch.empty(len(x_TD), top, dtype=torch.int64, device=self.device)
        for first in range(0, count, waiting):
            stop, held = min(first + waiting, count), top if first else 0
            for start in range(first, stop, TILE_CENTROIDS):
                part = self._merits_in_buffer(x_TD, start)
                merit[:, held + start - first :][:, : part.shape[1]] = part
            for low in range(0, len(x_TD), _SORTED_ROWS):
                rows = slice(low, low + _SORTED_ROWS)
                value, place = merit[rows, : held + stop - first].topk(top, dim=1)
                before = label_TL[rows].gather(1, place.clamp_max(top - 1))
                label_TL[rows] = torch.where(place < held, before, place - held + first)
                merit[rows, :top] = value
        return merit[:, :top], label_TL

    def _merits_in_buffer(self, x_TD: Tensor, start: int) -> Tensor:
        """Merits of up to TILE_CENTROIDS centroids, fp32 [T, <= TILE_CENTROIDS]; overwritten by the next call."""
        count = min(TILE_CENTROIDS, len(self.centroids_KD) - start)
        if self._merit is None or self._merit.numel() < len(x_TD) * count:
            self._merit = torch.empty(len(x_TD) * count, dtype=torch.float32, device=self.device)
        merit = self._merit[: len(x_TD) * count].view(len(x_TD), count)
        parts = tiles(count, _CACHED_CENTROIDS) if self.device.type == "cpu" else [slice(0, count)]
        for part in parts:
            self._merits(x_TD, slice(start + part.start, start + part.stop), out=merit[:, part])
        return merit

    def _merits(self, x_TD: Tensor, part: slice, out: Tensor | None = None) -> Tensor:
        """Merits of a part of the centroids, fp32 [T, part]."""
        if len(x_TD) % TILE_MULTIPLE == 0:
            merit = times_transposed(x_TD, self.centroids_KD[part], out=out)
        else:  # merging has tiles of any length, and oneDNN keeps what it prepares for every shape
            merit = torch.mm(x_TD, self.centroids_KD[part].T, out=out)
        if self.metric == "euclidean":
            merit -= self.half_norm_K[part]
        return merit

    def cosine(self, x_TD: Tensor, label_T: Tensor) -> Tensor:
        """Cosine fp32 [T] of each row to the centroid of its label."""
        return torch.nn.functional.cosine_similarity(x_TD, self.centroids_KD[label_T], dim=1)


def _triton_operand(centroids_KD: Tensor, metric: Metric) -> Tensor:
    """The centroids as the kernel multiplies them. UserError if the kernel cannot run here."""
    try:
        resolve("triton", centroids_KD.device, centroids_KD.dtype)
    except ValueError as error:
        raise UserError(f"backend is 'triton', which cannot run here ({error}): take --backend torch") from None
    return centroids_KD.half() if metric == "cosine" else centroids_KD


def prepare(block: np.ndarray, metric: Metric, device: torch.device) -> Tensor:
    """A block of rows as fp32 [B, D] on the device; unit rows for the cosine."""
    # np.array copies: rows come from read-only memory maps.
    dtype = np.float16 if block.dtype == np.float16 else np.float32
    x_BD = torch.from_numpy(np.array(block, dtype=dtype)).to(device).float()
    if metric != "cosine":
        return x_BD
    # The squares of float16's numbers are in range.
    return torch.nn.functional.normalize(x_BD, dim=1) if dtype == np.float16 else unit_rows(x_BD)


def pad_rows(x_BD: Tensor, rows: int) -> Tensor:
    """x_BD padded with zero rows to `rows`."""
    if len(x_BD) == rows:
        return x_BD
    return torch.cat([x_BD, x_BD.new_zeros(rows - len(x_BD), x_BD.shape[1])])


@functools.cache
def _faiss_builds() -> list[str]:
    """The installed distributions of faiss. Cached: it reads the files of all packages, for some 20 ms."""
    return sorted(set(metadata.packages_distributions().get("faiss", ())))


def check_backend(backend: str) -> None:
    if backend not in get_args(Backend):
        raise UserError(f"backend is {backend!r}, expected one of {', '.join(get_args(Backend))}: correct --backend")
    builds = _faiss_builds()
    if backend == "faiss" and not builds:
        raise UserError("backend is 'faiss' but faiss is not installed: pip install faiss-cpu, or take --backend torch")
    if backend in ("auto", "faiss") and len(builds) > 1:
        raise UserError(
            f"{' and '.join(builds)} are both installed, expected one build of faiss, since their files overwrite each "
            f"other: pip uninstall {' '.join(builds)}, then install one of them"
        )
