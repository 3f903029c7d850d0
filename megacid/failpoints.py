"""Failpoints: named points of the program at which tests inject faults.

    failpoint("store:before_manifest", step=step)

does nothing in production but look at an empty dict. Only tests (see `tests/faultplan.py`) and benchmarks install
hooks; no code path depends on one. The names are the contract:

    start:          building (before the classifier is made), ready (everything is built, before the first step)
    train:          batch (a micro-batch is about to be used), gradients (before the guard's decision), applied (both
                    optimizers have stepped or skipped), step_end (after logging and saving)
    store:          stage_made, mid_file, before_fsync, after_fsync, files_written on every rank;
                    before_manifest, before_rename, after_rename, during_prune, after_prune on rank 0
    mirror:         file (one is about to be copied) on every rank; before_manifest, after_manifest, fetched (before the
                    rename) on rank 0
    embed:          partition, image_written, text_written, metadata_written, shard_done, before_meta, done
    cluster:        init, iteration, iteration_saved, labels, labelled, before_meta, after_meta
                    two levels: coarse, cells, start, fine, merge, refine, refine_saved
                    stage (its name; the bench times them)
    cluster_order:  block (its rows are distributed), file (of the copy)
    balance:        preference, search, cluster, part, candidate_clusters, exchange, pair, cross_cluster, merge,
                    medoids, keep, subset on every rank; report, gallery, before_meta, after_meta on rank 0
    reshard:        tar, before_meta
    eval:           batch (of one rank, also while training), before_result, task_done
    synthesize:     before_meta
    icons:          tar (one was written or found)
    prepare_icons:  before_meta, after_meta
    offline:        file (inside every atomic write, before the rename), folder
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The only module-level state: empty outside of tests and benchmarks.
hooks: dict[str, Callable[..., None]] = {}


def failpoint(name: str, **facts: Any) -> None:
    """Call the hook of that name, if a test has installed one."""
    if hooks and (hook := hooks.get(name)) is not None:
        hook(**facts)
