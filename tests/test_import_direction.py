"""Who may import whom: rooms import rooms below them, and no two modules import each other, not even for types.

`docs/architecture.md` says what each room is for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room -> the rooms below it that it imports. Every room of megacid may also import errors and failpoints.
ROOMS: dict[str, set[str]] = {
    "megacid_kernels": set(),
    "megacid.errors": set(),
    "megacid.failpoints": set(),
    "megacid.storage": set(),
    "megacid.config": set(),
    "megacid.models": set(),
    "megacid.distributed": {"config"},
    "megacid.data": {"distributed", "storage"},
    "megacid.checkpoint": {"distributed", "storage"},
    "megacid.classifier": {"distributed", "kernels"},
    "megacid.losses": {"classifier", "distributed", "kernels"},
    "megacid.evaluate": {"checkpoint", "data", "distributed", "models", "storage"},
    "megacid.offline": {"data", "distributed", "models", "storage", "kernels"},
    "megacid.training": {
        *(
            "checkpoint",
            "classifier",
            "config",
            "data",
            "distributed",
            "evaluate",
            "kernels",
            "losses",
            "models",
            "storage",
        )
    },
    "megacid.train": {"checkpoint", "config", "data", "distributed", "training"},
    "megacid": {"classifier"},
}
LEAVES = {"megacid.errors", "megacid.failpoints"}
ONLY_HERE = {
    "deepspeed": {"megacid.distributed.engine", "megacid.distributed.weight_average", "megacid.config.deepspeed_keys"},
    "hjson": {"megacid.config.load"},
}


def _modules() -> dict[str, Path]:
    modules = {}
    for root, top in ((ROOT, "megacid"), (ROOT / "kernels", "megacid_kernels")):
        for path in (root / top).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = _modules()


def _imports(module: str, nodes: Iterable[ast.AST] = ()) -> set[str]:
    """Absolute names of all imports of a module, also of those inside functions and for types; or those of `nodes`."""
    path, names = MODULES[module], set()
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules or {base}
    return names


def _room(module: str) -> str:
    return max((room for room in ROOMS if module == room or module.startswith(room + ".")), key=len)


def _below(room: str) -> set[str]:
    leaves = LEAVES if room.startswith("megacid.") and room not in LEAVES else set()
    return leaves | {"megacid_kernels" if name == "kernels" else f"megacid.{name}" for name in ROOMS[room]}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_stands_below_its_room(module: str) -> None:
    room = _room(module)
    for name in _imports(module):
        top = name.split(".")[0]
        if top in ("megacid", "megacid_kernels") and _room(name) != room:
            assert _room(name) in _below(room), f"{module} imports {name}"
        assert top not in ("tools", "tests", "benchmarks"), f"{module} imports {name}"
        if top in ONLY_HERE:
            assert module in ONLY_HERE[top], f"{module} imports {top}"


def test_a_room_imports_every_room_that_its_row_names() -> None:
    """The table says what is, not what was."""
    for room in ROOMS:
        used = {
            _room(name) for module in MODULES if _room(module) == room for name in _imports(module) if name in MODULES
        }
        assert _below(room) - used - LEAVES == set(), room


def test_data_takes_rank_and_world_as_integers() -> None:
    for module in MODULES:
        if _room(module) == "megacid.data":
            assert not {"torch.distributed", "megacid.distributed.collectives"} & _imports(module), module


def test_no_import_circle() -> None:
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    for names in (MODULES.keys(), MODULES.keys() - packages):  # a package's __init__ imports its modules
        graph = {module: (_imports(module) & names) - {module} for module in names}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"import circle: {' -> '.join(error.args[1])}")
    rooms = {room: _below(room) for room in ROOMS}
    TopologicalSorter(rooms).prepare()


def _at_import(module: str) -> set[str]:
    """What a module imports while it is imported: not inside functions, not for types."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return _imports(module, nodes)


def test_a_start_of_the_trainer_imports_open_clip_only_for_a_student_that_needs_it() -> None:
    """open_clip, timm and torchvision take seconds; --help, a wrong run file and a feature tower do without them."""
    reached, left = set(), {"megacid.train"}
    while left:
        module = left.pop()
        reached.add(module)
        left |= (_at_import(module) & MODULES.keys()) - reached
    assert len(reached) > 50
    assert {
        m for m in reached if {"open_clip", "torchvision"} & {name.split(".")[0] for name in _at_import(m)}
    } == set()


def test_the_top_of_the_package_holds_the_loop_and_what_everyone_uses() -> None:
    assert {path.name for path in (ROOT / "megacid").glob("*.py")} == {
        *("__init__.py", "errors.py", "failpoints.py", "train.py")
    }


def test_no_module_bears_the_name_of_a_top_level_module() -> None:
    """`deepspeed megacid/train.py` puts megacid/ first on sys.path: megacid/random.py would replace the library's."""
    third_party = {
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
    assert not {path.stem for path in (ROOT / "megacid").iterdir()} & (sys.stdlib_module_names | third_party)


def test_margins_and_sampling_need_no_third_party_package_but_torch() -> None:
    for module in ("megacid_kernels.margin", "megacid.classifier.sampling"):
        tops = {name.split(".")[0] for name in _imports(module)}
        assert tops <= sys.stdlib_module_names | {"torch"}, tops
