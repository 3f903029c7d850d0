"""megacid/train.py with the faults of a plan in its environment, for tests that go through a real launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from faultplan import FaultPlan  # noqa: E402

from megacid import train  # noqa: E402

if __name__ == "__main__":
    FaultPlan.from_json(os.environ.get("FAULT_PLAN", "[]")).install(int(os.environ.get("RANK", "0")))
    sys.exit(train.main(sys.argv[1:]))
