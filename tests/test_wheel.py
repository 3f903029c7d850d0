"""The wheel, installed into an empty environment: imports, console scripts, packaged architectures."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object, cwd: Path, expect: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files: a build in the checkout would leave its folders there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (path,) = out.glob("megacid-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with this wheel, which finds the packages it requires where these tests find them."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A line of a .pth file is a search path; .pth files in it, those of editable installations, are not read.
    (packages / "requirements.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder


def test_wheel_holds_the_packages_and_no_benchmark(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        *("megacid/py.typed", "megacid/train.py", "megacid/models/configs/digits-student.json"),
        *("megacid_kernels/py.typed", "megacid_kernels/fused/exponentials.py", "megacid_tools/embed.py"),
    } <= names
    assert not [name for name in names if "bench" in name or "tune" in Path(name).stem.split("_") or "tests" in name]


PROGRAM = """
import sys
from importlib.metadata import entry_points
import torch, megacid, megacid_kernels
from megacid.models.student import build_student

student = build_student("digits-student", embed_dim=32, seed=0)
out = student(torch.zeros(2, *student.image_shape), torch.zeros(2, student.text_length, dtype=torch.long))
head = megacid.PartialFC(5, 32)
head(out.image, torch.tensor([0, 4])).backward()
print(megacid.__file__, megacid_kernels.__file__, tuple(out.text.shape))
scripts = {entry.name: entry.load() for entry in entry_points(group="console_scripts") if "megacid" in entry.name}
print(*sorted(scripts))
sys.argv = ["megacid-train", "--deepspeed_config", "missing.json"]
print(scripts["megacid-train"]())
"""


def test_student_and_commands_of_the_wheel_are_used(installed: Path, tmp_path: Path) -> None:
    files, scripts, code = run(installed / "bin" / "python", "-c", PROGRAM, cwd=tmp_path).strip().splitlines()
    assert files.count(str(installed)) == 2 and files.endswith("(2, 32)")
    assert scripts.split() == [f"megacid-{name}" for name in ("balance", "cluster", "embed", "eval", "export", "train")]
    assert code == "2"


def test_console_script_runs(installed: Path, tmp_path: Path) -> None:
    assert "usage: " in run(installed / "bin" / "megacid-embed", "--help", cwd=tmp_path)
