"""Files and functions stay short enough to read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 150
FILES = sorted(path for top in ("megacid", "kernels", "tools", "examples") for path in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_and_its_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MODULE_LINES, (
        f"{path} has {text.count(chr(10))} lines, expected <= {MODULE_LINES}: split it"
    )
    limit = KERNEL_LINES if path.parent.name == "fused" else FUNCTION_LINES
    lines = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = [f"{name} ({count} lines)" for name, count in lines if count > limit]
    assert not long, f"{path}: expected functions of at most {limit} lines, got {', '.join(long)}: split them"
