"""Import paths of a plain checkout: `import checkout` lets a tool run without an installation."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if (ROOT / "kernels" / "megacid_kernels").is_dir():  # not where the tools are installed
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
