"""k-means settings, and the state that every iteration saves and an interrupted run continues from.

Legend: K clusters, D width.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megacid.errors import UserError
from megacid.offline.nearest import Backend, Metric, check_backend
from megacid.storage.atomic import writing

Init = Literal["random", "k-means++"]
Method = Literal["flat", "hierarchical"]
TWO_LEVELS_K = 512  # from this many clusters two levels take less time than k-means++ over all rows
COARSE_POINTS = 256  # rows per coarse centroid in the sample that they are trained on
PLUS_PLUS_K = 4096  # up to this many clusters a flat k-means++ takes no longer than a few iterations


@dataclass(frozen=True)
class KMeansSettings:
    """Options of k-means. All but `memory_gb` and, up to rounding, `backend` decide the result."""

    k: int
    metric: Metric = "cosine"
    iterations: int = 20
    tolerance: float = 0.0  # stop when the objective improves by less than this fraction; 0: never
    seed: int = 0
    init: Init = "random"
    train_sample: int | None = None  # rows used for training; None: all
    backend: Backend = "auto"
    memory_gb: float = 4.0  # bound on the memory of one rank
    method: Method = "flat"
    refine: int = 6  # hierarchical: iterations over all k after the two levels
    refine_cells: int = 16  # hierarchical: coarse clusters whose centroids a row is compared with when refining; 0: all

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k is {self.k}, expected at least 1 cluster: give --k")
        if self.metric not in ("cosine", "euclidean"):
            raise UserError(f"metric is {self.metric!r}, expected cosine or euclidean")
        if self.init not in ("random", "k-means++"):
            raise UserError(f"init is {self.init!r}, expected random or k-means++")
        if self.iterations < 1:
            raise UserError(f"iterations is {self.iterations}, expected at least 1")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance}, expected a fraction >= 0 and < 1: correct --tolerance")
        if self.method not in ("flat", "hierarchical"):
            raise UserError(f"method is {self.method!r}, expected flat or hierarchical")
        for name in ("refine", "refine_cells"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected 0 or more: correct --{name.replace('_', '-')}"
                )
        check_backend(self.backend)


def default_method(k: int) -> Method:
    """The fastest method, with k-means++, that reaches the objective of a flat fit from random rows.

    At 200,000 x 256 and k = 2,000 two levels take 0.4 times as long as a fit of faiss, flat k-means++ several times as
    long as two levels (`tools/bench.py --suite kmeans`). Below 512 clusters flat k-means++ is the faster one. A rule
    and not a measurement, as in `nearest.chosen_backend`.
    """
    return "hierarchical" if k >= TWO_LEVELS_K else "flat"


def default_settings(k: int, *, method: Method | None = None, init: Init | None = None, **given: Any) -> KMeansSettings:
    """Settings of k clusters; method and init by k where they are None. given: other fields of KMeansSettings."""
    method = method or default_method(k)
    init = init or ("k-means++" if method == "hierarchical" or k <= PLUS_PLUS_K else "random")
    return KMeansSettings(k, method=method, init=init, **given)


def cell_count(k: int) -> int:
    """Coarse clusters of two levels: about sqrt(k), which makes both levels equally expensive."""
    return max(1, round(math.sqrt(k)))


def coarse_rows(k: int) -> int:
    """Rows that the coarse clusters of k are trained on."""
    return max(cell_count(k) * COARSE_POINTS, 4096)


def num_candidates(settings: KMeansSettings) -> int:
    """Centroids nearest to its cell that a row is compared with in a refining iteration; 0: all."""
    count = math.ceil(settings.refine_cells * settings.k / cell_count(settings.k))
    return count if count < settings.k else 0


@dataclass
class KMeansState:
    """State after an iteration. `objective`: mean cosine (or squared distance) in each iteration, before its update."""

    centroids: Tensor  # fp32 [K, D], CPU
    iteration: int = 0
    objective: list[float] = field(default_factory=list)
    imbalance: float = math.nan
    stopped: bool = False


def settled(objective: list[float], settings: KMeansSettings) -> bool:
    """Whether the last iteration improved the objective by at most `tolerance`."""
    if settings.tolerance == 0 or len(objective) < 2:
        return False
    before, now = objective[-2:]
    gain = now - before if settings.metric == "cosine" else before - now
    return gain <= settings.tolerance * abs(before)


def fingerprint(settings: KMeansSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """The settings and inputs that must not change for a run to be continued, as JSON values."""
    # Backend and memory bound may change between two parts of one run, and so may the number of iterations and the
    # tolerance, unless the run would have ended before (see `load_state`).
    names = ["method", "k", "metric", "seed", "init", "train_sample"]
    if settings.method == "hierarchical":
        names.append("refine_cells")
    return {name: getattr(settings, name) for name in names} | identity


def save_state(path: Path, state: KMeansState, settings: KMeansSettings, identity: dict[str, Any]) -> None:
    """Write the state atomically. UserError when the disk is full."""
    metadata = {
        "settings": fingerprint(settings, identity),
        "iteration": state.iteration,
        "objective": state.objective,
        "imbalance": state.imbalance,
        "stopped": state.stopped,
    }
    text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, centroids=state.centroids.numpy(), metadata=text)


def load_state(path: Path, settings: KMeansSettings, identity: dict[str, Any]) -> KMeansState:
    """The saved state of a run with these settings.

    Raises:
        UserError: The file is damaged or has other settings, or its run is past the end that these settings give.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            metadata = json.loads(stored["metadata"].tobytes())
            centroids_KD = torch.from_numpy(stored["centroids"])
        before = dict(metadata["settings"])
        # `stopped` is computed anew below: the tolerance may have changed.
        state = KMeansState(centroids_KD, metadata["iteration"], metadata["objective"], metadata["imbalance"])
        if len(state.objective) != state.iteration or not all(isinstance(value, float) for value in state.objective):
            raise ValueError("its objective does not have one number per iteration")
        if state.centroids.ndim != 2 or len(state.centroids) != before["k"] or state.centroids.dtype != torch.float32:
            raise ValueError(f"its centroids are {state.centroids.dtype} {tuple(state.centroids.shape)}")
    except Exception as error:  # zip, .npy and JSON readers raise nearly any exception type
        message = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({message}): delete it to start again") from None
    for name, value in fingerprint(settings, identity).items():
        if before.get(name) != value:
            raise UserError(
                f"{path} was made with {name}={before.get(name)!r}, this run has {name}={value!r}: take another --out "
                "or delete that file"
            )
    ends = [n for n in range(1, state.iteration) if n >= settings.iterations or settled(state.objective[:n], settings)]
    if ends:
        raise UserError(
            f"{path} is after iteration {state.iteration}, with iterations={settings.iterations} and "
            f"tolerance={settings.tolerance:g} a run ends after {ends[0]}: give the earlier arguments, take another "
            "--out, or delete that file"
        )
    state.stopped = settled(state.objective, settings)
    return state
