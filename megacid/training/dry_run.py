"""`train.py --dry-run`: every check that needs no training step."""

from __future__ import annotations

import logging

from megacid.config.schema import RunFile
from megacid.data.batch import DataBudgetError
from megacid.distributed.consensus import fail_together, gather_json
from megacid.distributed.parallel import Parallel
from megacid.training.components import build_components
from megacid.training.memory import report_memory
from megacid.training.metrics import setup_logging

log = logging.getLogger("megacid")


def dry_run(run: RunFile, parallel: Parallel) -> int:
    """Check data, one batch, student and classifier, and log the memory. Writes nothing to the run directory."""
    setup_logging(parallel.rank, None)
    components = build_components(run, parallel)
    with fail_together(parallel.group):
        batch = next(iter(components.data.stream(0)))
    for failure in filter(None, gather_json(batch.failure, parallel.group)):
        raise DataBudgetError(failure)
    report_memory(components.run, components.student, components.head, parallel)
    log.info("dry run: %s is valid for %d steps on %d ranks", run.path, run.megacid.run.total_steps, parallel.world)
    return 0
