"""Who may import whom. An import in the wrong direction is how a code base loses its shape; this walks the syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# module prefix -> prefixes of our own modules it may import; the longest matching prefix decides.
ALLOWED = {
    "megacid_kernels": {"megacid_kernels"},
    "megacid.errors": set(),
    "megacid.probes": set(),
    "megacid.orphans": set(),
    "megacid.deepspeed_keys": set(),
    "megacid.config": {"megacid.config_checks", "megacid.deepspeed_keys"},
    "megacid.config_checks": {"megacid.config"},  # for its types alone
    "megacid.distributed.parallel": {"megacid.config"},
    "megacid.distributed.collectives": {"megacid.config"},
    "megacid.distributed.engine": {"megacid.config", "megacid.distributed.parallel", "megacid.distributed.collectives"},
    "megacid_kernels.margin": set(),
    "megacid.classifier.margin": {"megacid_kernels.margin"},
    "megacid.classifier.sampling": set(),
    "megacid.classifier": {
        "megacid.config",
        "megacid.classifier",
        "megacid.distributed.collectives",
        "megacid_kernels",
    },
    "megacid.losses": {
        "megacid.config",
        "megacid.losses",
        "megacid.classifier",
        "megacid.distributed.collectives",
        "megacid_kernels",
    },
    "megacid.data": {"megacid.config", "megacid.data", "megacid.checkpoint.store"},
    "megacid.checkpoint.store": {"megacid.config"},
    "megacid.checkpoint.state": {"megacid.config", "megacid.checkpoint.store", "megacid.distributed.collectives"},
    "megacid.checkpoint.saver": {"megacid.checkpoint", "megacid.distributed.collectives"},
    "megacid.runtime": {
        "megacid.config",
        "megacid.runtime",
        "megacid.checkpoint.store",
        "megacid.classifier.sampling",
        "megacid.distributed.collectives",
        "megacid.distributed.parallel",
        "megacid_kernels",
    },
    "megacid.student": {"megacid.config"},
    "megacid.tower": {"megacid.student"},
    "megacid.offline": {
        "megacid.config",
        "megacid.offline",
        "megacid.data",
        "megacid.student",
        "megacid.distributed",
        "megacid.checkpoint.store",
        "megacid_kernels",
    },
    "megacid.evaluate": {
        "megacid.config",
        "megacid.evaluate",
        "megacid.data",
        "megacid.student",
        "megacid.tower",
        "megacid.checkpoint",
    },
    "megacid.figures": {"megacid.offline", "megacid.data", "megacid.checkpoint.store"},
    "megacid.assemble": {
        "megacid.config",
        "megacid.classifier",
        "megacid.data",
        "megacid.distributed",
        "megacid.losses",
        "megacid.student",
        "megacid.tower",
    },
    "megacid.parts": {
        "megacid.assemble",
        "megacid.checkpoint",
        "megacid.classifier",
        "megacid.config",
        "megacid.distributed",
        "megacid.losses",
        "megacid.runtime",
        "megacid.student",
        "megacid.tower",
    },
    "megacid.benchmarks": {"megacid", "megacid_kernels"},
    "megacid.train": {"megacid", "megacid_kernels"},
    "megacid": {"megacid.classifier"},
}
ONLY_HERE = {"deepspeed": "megacid.distributed.engine", "hjson": "megacid.config"}


def _modules() -> dict[str, Path]:
    found = {}
    for root, top in ((ROOT, "megacid"), (ROOT / "kernels", "megacid_kernels")):
        for path in (root / top).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _imports(path: Path, module: str) -> set[str]:
    """Absolute names of what a file imports, also inside functions, `from a import b` as a.b where that is a module."""
    known = _modules()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            whole = {f"{base}.{alias.name}" for alias in node.names} & known.keys()
            names |= whole or {base}
    return names


def _rule(module: str) -> set[str]:
    return ALLOWED[max((p for p in ALLOWED if module == p or module.startswith(p + ".")), key=len)]


@pytest.mark.parametrize("module", sorted(_modules()))
def test_module_imports_only_what_stands_below_it(module: str) -> None:
    for name in _imports(_modules()[module], module):
        top = name.split(".")[0]
        if top in ("megacid", "megacid_kernels"):
            allowed = (
                _rule(module)
                | {module}
                | (
                    {"megacid.errors", "megacid.orphans", "megacid.probes"}
                    if top == "megacid" and not module.startswith("megacid_kernels")
                    else set()
                )
            )
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{module} imports {name}"
            assert name != "megacid.train", f"{module} imports the entry point"
            if name.startswith("megacid.benchmarks"):
                assert module.startswith("megacid.benchmarks"), f"{module} imports {name}"
        assert top not in ("tools", "tests"), f"{module} imports {name}"
        if top in ONLY_HERE:
            assert module == ONLY_HERE[top], f"{module} imports {top}"


def test_no_module_bears_the_name_of_a_top_level_module() -> None:
    """`deepspeed megacid/train.py` puts megacid/ first on sys.path: megacid/random.py would replace the standard library's."""
    taken = sys.stdlib_module_names | {
        "torch",
        "numpy",
        "datasets",
        "triton",
        "faiss",
        "PIL",
        "webdataset",
        "deepspeed",
        "open_clip",
        "kernels",
    }
    assert not {path.stem for path in (ROOT / "megacid").iterdir()} & taken


def test_class_and_kernel_modules_need_no_third_party_package_but_torch() -> None:
    for module in ("megacid_kernels.margin", "megacid.classifier.sampling"):
        tops = {name.split(".")[0] for name in _imports(_modules()[module], module)}
        assert tops <= sys.stdlib_module_names | {"torch"}, tops
