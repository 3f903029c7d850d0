"""Clusters instead of classes for labels: k-means over a features directory, and a directory like it beside it.

The features are linked, not copied; the true classes go along, so that a run on clusters can be judged by classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacid.data.features import FeatureSet
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.kmeans import KMeansSettings, kmeans
from megacid.offline.cluster.labels import label_partition
from megacid.offline.nearest import Assigner
from megacid.storage.metadata import read_meta
from megacid.storage.npy import write_array
from megacid.storage.stage_directory import StageDirectory


def cluster_features(
    source: Path,
    out: Path,
    settings: KMeansSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the features directory `out` whose labels are the k clusters of `source`'s training rows; returns its meta.

    An interrupted call goes on after the last iteration; a complete directory made in the same way is left as it is.
    progress: called with the number of rows done, num_rows * (iterations + 1) in all. UserError when `out` holds something else.
    """
    rows = FeatureSet(source, true_labels=True)
    test = FeatureSet(source, "test")
    wanted = {"features": str(source.resolve()), "digest": rows.digest}
    wanted |= {name: getattr(settings, name) for name in ("k", "metric", "seed", "init", "iterations", "train_sample")}
    stage = StageDirectory(out, "sweep", wanted)
    if (meta := stage.finished()) is not None:
        return meta
    stage.begin()
    device = torch.device(device)
    state = kmeans(
        rows, settings, device=device, checkpoint=out / "state.npz", identity={"digest": rows.digest}, progress=progress
    )
    assigner = Assigner(state.centroids, settings.metric, device, settings.backend)
    sizes = np.zeros(settings.k, np.int64)
    for partition, path in enumerate(rows.label_paths):
        labels, _, _ = label_partition(rows, partition, assigner, 1, progress)
        write_array(out / "labels" / path.name, labels[:, 0])
        sizes += np.bincount(labels[:, 0], minlength=settings.k)
    for folder, paths in (("features", rows.paths), ("true_labels", rows.label_paths),
                          ("test/features", test.paths), ("test/labels", test.label_paths)):  # fmt: skip
        for path in paths:
            _link(path, out / folder / path.name)
    facts = {"rows": rows.num_rows, "test rows": test.num_rows, "empty": int((sizes == 0).sum())}
    stage.commit(
        wanted,
        classes=settings.k,
        dim=rows.dim,
        true_classes=rows.classes,
        objective=state.objective,
        **facts,
    )
    (out / "state.npz").unlink(missing_ok=True)
    return read_meta(out, expect="sweep")


def _link(source: Path, target: Path) -> None:
    """A hard link, or a symbolic one where the file system cannot (another disk, say)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())
