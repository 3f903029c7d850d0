"""What k-means is asked for, and the state that an iteration leaves on disk, from which a run that was cut goes on.

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


@dataclass(frozen=True)
class KMeansSettings:
    """What decides the result (all but `memory_gb`, which only bounds what is held at once)."""

    k: int
    metric: Metric = "cosine"
    iterations: int = 20
    tolerance: float = 0.0  # stop when the objective improves by less than this share; 0: never
    seed: int = 0
    init: Init = "random"
    train_sample: int | None = None  # rows used for training; None: all
    backend: Backend = "auto"
    memory_gb: float = 4.0
    method: Literal["flat", "hierarchical"] = "flat"
    refine: int = 2  # hierarchical: iterations over all k after the two levels
    refine_cells: int = 8  # hierarchical: coarse clusters whose centroids a row is compared with in these; 0: all

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
            raise UserError(f"tolerance is {self.tolerance}, expected a share from 0 to below 1")
        if self.method not in ("flat", "hierarchical"):
            raise UserError(f"method is {self.method!r}, expected flat or hierarchical")
        for name in ("refine", "refine_cells"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected 0 or more: correct --{name.replace('_', '-')}"
                )
        check_backend(self.backend)


@dataclass
class KMeansState:
    """What an iteration leaves behind. `objective`: mean cosine, or mean squared distance, before each update."""

    centroids: Tensor  # fp32 [K, D], CPU
    iteration: int = 0
    objective: list[float] = field(default_factory=list)
    imbalance: float = math.nan
    stopped: bool = False


def settled(objective: list[float], settings: KMeansSettings) -> bool:
    """Whether the last of these iterations gained too little to go on."""
    if settings.tolerance == 0 or len(objective) < 2:
        return False
    before, now = objective[-2:]
    gain = now - before if settings.metric == "cosine" else before - now
    return gain <= settings.tolerance * abs(before)


def fingerprint(settings: KMeansSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued, JSON-able."""
    # The backend and the memory bound may change between two parts of one run; so may the number of iterations and the
    # tolerance, as far as they do not say that it should have ended before.
    names = ["method", "k", "metric", "seed", "init", "train_sample"]
    if settings.method == "hierarchical":
        names.append("refine_cells")
    return {name: getattr(settings, name) for name in names} | identity


def save_state(path: Path, state: KMeansState, settings: KMeansSettings, identity: dict[str, Any]) -> None:
    """Write the state, atomic and durable; UserError when the disk does not take it."""
    facts = {
        "settings": fingerprint(settings, identity),
        "iteration": state.iteration,
        "objective": state.objective,
        "imbalance": state.imbalance,
        "stopped": state.stopped,
    }
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, centroids=state.centroids.numpy(), facts=text)


def load_state(path: Path, settings: KMeansSettings, identity: dict[str, Any]) -> KMeansState:
    """The state of a run with these settings. UserError for a damaged file, other settings, or a run that went further."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            centroids_KD = torch.from_numpy(stored["centroids"])
        before = dict(facts["settings"])
        # Stopping is decided anew: the tolerance may have been changed.
        state = KMeansState(centroids_KD, facts["iteration"], facts["objective"], facts["imbalance"])
        if len(state.objective) != state.iteration or not all(isinstance(value, float) for value in state.objective):
            raise ValueError("it has not one number for each iteration")
        if state.centroids.ndim != 2 or len(state.centroids) != before["k"] or state.centroids.dtype != torch.float32:
            raise ValueError(f"its centroids are {state.centroids.dtype} {tuple(state.centroids.shape)}")
    except Exception as error:  # a zip archive, the header of an array and JSON raise nearly anything between them
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({said}): delete it to start again") from None
    wanted = fingerprint(settings, identity)
    for name, value in wanted.items():
        if before.get(name) != value:
            raise UserError(
                f"{path} was made with {name}={before.get(name)!r}, this run has {name}={value!r}: take another --out, or delete that file"
            )
    ends = [n for n in range(1, state.iteration) if n >= settings.iterations or settled(state.objective[:n], settings)]
    if ends:
        raise UserError(
            f"{path} is after iteration {state.iteration}, with iterations={settings.iterations} and "
            f"tolerance={settings.tolerance:g} a run ends after {ends[0]}: give the earlier arguments, take another --out, "
            "or delete that file"
        )
    state.stopped = settled(state.objective, settings)
    return state
