"""The checkpoint directory protocol: what is published is whole, what is not whole is never taken for a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megacid.checkpoint import store
from megacid.errors import UserError


def make(root: Path, step: int, keep_last: int = 2) -> Path:
    stage = store.make_stage(root, step)
    files = [store.write_tensors(stage, f"part-{i}.safetensors", {"x": torch.arange(100) + step + i}) for i in range(2)]
    final = store.publish(root, stage, step, files, {"updates": step})
    store.prune(root, keep_last)
    return final


def test_only_the_newest_keep_last_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        make(tmp_path, step)
    assert [step for step, _ in store.list_steps(tmp_path)] == [10, 100]
    assert store.newest_valid(tmp_path) == (tmp_path / "step-00000100", [])
    assert list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("name", ["part-0.safetensors", "part-1.safetensors", store.MANIFEST])
def test_every_flipped_byte_is_found_and_the_older_checkpoint_serves(tmp_path: Path, name: str) -> None:
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    whole = (newest / name).read_bytes()
    rng = np.random.default_rng(0)
    for offset in rng.integers(0, len(whole), 32):
        spoiled = bytearray(whole)
        spoiled[offset] ^= 1 << int(rng.integers(8))
        (newest / name).write_bytes(spoiled)
        found, problems = store.newest_valid(tmp_path)
        # White space of the manifest that JSON does not see is the one thing that may change.
        if name == store.MANIFEST and not problems:
            assert json.loads(bytes(spoiled)) == json.loads(whole)
            continue
        assert found == tmp_path / "step-00000001"
        assert str(newest) in problems[0]


@pytest.mark.parametrize("harm", ["truncate", "delete", "swap"])
def test_truncated_missing_and_swapped_files_are_found(tmp_path: Path, harm: str) -> None:
    newest = make(tmp_path, 2)
    one, two = newest / "part-0.safetensors", newest / "part-1.safetensors"
    if harm == "truncate":
        one.write_bytes(one.read_bytes()[:-1])
    elif harm == "delete":
        one.unlink()
    else:
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b)
        two.write_bytes(a)
    with pytest.raises(ValueError, match="part-0"):
        store.verify(newest)


def forge(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a manifest and seal it again, as somebody would who means harm."""

    def harm(path: Path) -> None:
        manifest = json.loads(path.read_text())["manifest"]
        path.write_bytes(store.seal(change(manifest) or manifest))

    return harm


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "deep": lambda path: path.write_text("[" * 200_000),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "other white space": lambda path: path.write_text(path.read_text().replace("\n", "  \n", 1)),
    "manifest is a list": forge(lambda m: [m]),
    "another format": forge(lambda m: m.update(format=99)),
    "another step": forge(lambda m: m.update(step=7)),
    "step is a text": forge(lambda m: m.update(step="1")),
    "no files": forge(lambda m: m.pop("files") and m),
    "files is a dict": forge(lambda m: m.update(files={})),
    "a file is a text": forge(lambda m: m["files"].append("part-0.safetensors")),
    "a file above": forge(lambda m: m["files"][0].update(name="../part-0.safetensors")),
    "an absolute file": forge(lambda m: m["files"][0].update(name="/etc/passwd")),
    "a file of negative size": forge(lambda m: m["files"][0].update(bytes=-1)),
    "a file twice": forge(lambda m: m["files"].append(m["files"][0])),
    "a directory as file": forge(lambda m: m["files"][0].update(name="sub", bytes=4096)),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_whatever_stands_in_a_manifest_is_one_kind_of_error_that_names_it(tmp_path: Path, how: str) -> None:
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    (newest / "sub").mkdir()
    HOSTILE[how](newest / store.MANIFEST)
    with pytest.raises(ValueError, match=newest.name):
        store.verify(newest)
    found, problems = store.newest_valid(tmp_path)
    assert found == tmp_path / "step-00000001" and len(problems) == 1


def test_a_stage_that_was_never_published_is_no_checkpoint(tmp_path: Path) -> None:
    stage = store.make_stage(tmp_path, 7)
    store.write_tensors(stage, "part-0.safetensors", {"x": torch.zeros(3)})
    assert store.newest_valid(tmp_path) == (None, [])
    store.sweep_stages(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    store.write_json_atomic(path, {"a": 1})
    with pytest.raises(RuntimeError), store.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_meta_of_another_tool_or_an_unfinished_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tools/cluster\.py"):
        store.read_meta(tmp_path / "nowhere", expect="cluster")
    with pytest.raises(UserError, match="did not finish"):
        store.read_meta(tmp_path, expect="cluster")
    store.write_meta(tmp_path, "embed", {}, dim=3)
    assert store.read_meta(tmp_path, expect="embed")["dim"] == 3
    with pytest.raises(UserError, match="made by 'embed'"):
        store.read_meta(tmp_path, expect="cluster")


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    wide = torch.randn(5, 7)
    tensors = {
        "fp32": wide, "turned": wide.T, "part": wide[1:3, ::2], "bf16": wide.bfloat16(), "fp64": wide.double(),
        "fp16": wide.half(), "int64": torch.arange(3), "int32": torch.arange(4, dtype=torch.int32), "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "bool": torch.tensor([True, False, True]), "Ω/name": torch.ones(1, dtype=torch.uint8),
    }  # fmt: skip
    written = store.write_tensors(tmp_path, "a.safetensors", tensors, {"start": "0", "stop": "5"})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert written.bytes == len(data) and written.sha256 == hashlib.sha256(data).hexdigest()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.metadata() == {"start": "0", "stop": "5"}
        assert torch.equal(handle.get_slice("turned")[2:4], wide.T[2:4])
