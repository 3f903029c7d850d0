"""Clusters a features directory: writes a copy of it whose labels are k-means clusters in place of classes.

The features are linked, not copied. The true classes are kept, so a run on clusters can be evaluated by class.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacid.data.features import FeatureSet
from megacid.distributed.stopping import Progress, no_progress
from megacid.offline.cluster.assign_labels import label_partition
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.state import KMeansSettings
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
    """Write the features directory `out`, labelled by the k clusters of the training rows of `source`.

    An interrupted call continues after the last iteration; a finished directory of the same arguments is kept.

    Args:
        progress: Called with the number of rows processed, num_rows * (iterations + 1) in all.

    Returns:
        meta.json of `out`.

    Raises:
        UserError: `out` holds something else.
    """
    rows = FeatureSet(source, true_labels=True)
    test = FeatureSet(source, "test")
    arguments = {"features": str(source.resolve()), "digest": rows.digest}
    arguments |= {
        name: getattr(settings, name) for name in ("k", "metric", "seed", "init", "iterations", "train_sample")
    }
    stage = StageDirectory(out, "sweep", arguments)
    if (meta := stage.finished()) is not None:
        stage.remove_partial_results()
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
    counts = {"rows": rows.num_rows, "test rows": test.num_rows, "empty": int((sizes == 0).sum())}
    stage.commit(
        arguments, classes=settings.k, dim=rows.dim, true_classes=rows.classes, objective=state.objective, **counts
    )
    (out / "state.npz").unlink(missing_ok=True)
    return read_meta(out, expect="sweep")


def _link(source: Path, target: Path) -> None:
    """Create a hard link, or a symbolic link if the file system refuses (a target on another disk)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())
