"""Named points of the program at which tests make things go wrong.

    probe("store:before_manifest", step=step)

does nothing in production: one look at an empty dict. Nothing in the program installs a hook, reads a plan from the
environment, or depends on one; `tests/faults/` does (see `tests/faultplan.py`). The names are the contract:

    start:ready          everything is built, before the first step
    train:batch          a micro-batch is about to be used (batch)          train:gradients   before the guard's decision (engine, head)
    train:applied        after both optimizers stepped or skipped           train:step_end    after logging and saving (step)
    store:stage_made     store:mid_file     store:before_fsync    store:after_fsync    store:files_written
    store:before_manifest    store:before_rename    store:after_rename    store:during_prune    store:after_prune
    eval:batch    embed:partition    embed:shard_done    cluster:iteration    cluster:labels    balance:cluster    balance:keep
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The one piece of state at module level: empty outside tests.
hooks: dict[str, Callable[..., None]] = {}


def probe(name: str, **facts: Any) -> None:
    """Call the hook of that name, if a test has installed one, with the facts of the place."""
    if hooks and (hook := hooks.get(name)) is not None:
        hook(**facts)
