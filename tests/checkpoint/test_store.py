"""The checkpoint directory protocol: what is published is whole, what is not whole is never taken for a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megacid.checkpoint import store
from megacid.checkpoint.saver import Saver
from megacid.checkpoint.state import CheckpointReader, restore
from megacid.errors import UserError
from megacid.storage.atomic import atomic_path, write_json_atomic
from megacid.storage.metadata import read_meta, write_meta


def make(root: Path, step: int, keep_last: int = 2) -> Path:
    stage = store.make_stage(root, step)
    files = [store.write_tensors(stage, f"part-{i}.safetensors", {"x": torch.arange(100) + step + i}) for i in range(2)]
    final = store.publish(root, stage, step, files, {"updates": step})
    store.prune(root, keep_last, step=step)
    return final


def test_only_the_newest_keep_last_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        make(tmp_path, step)
    assert [step for step, _ in store.list_steps(tmp_path)] == [10, 100]
    assert store.newest_valid(tmp_path) == (tmp_path / "step-00000100", [])
    assert list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("kept", [1, 2])
def test_damaged_and_left_behind_checkpoints_push_out_no_good_one(tmp_path: Path, kept: int) -> None:
    """10 is good, 20 and 25 are damaged, 30 is good and of a part that was given up; then 12 and 15 are saved."""
    for step in (10, 20, 25, 30):
        make(tmp_path, step, keep_last=9)
    for step in (20, 25):
        (tmp_path / store.step_name(step) / "part-1.safetensors").unlink()
    make(tmp_path, 12, kept)
    assert [step for step, _ in store.list_steps(tmp_path)] == [*[10, 12][-kept:], 20, 25, 30]
    make(tmp_path, 15, kept)
    assert [step for step, _ in store.list_steps(tmp_path)] == [*[12, 15][-kept:], 20, 25, 30]


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_nothing_is_published_that_is_not_there(tmp_path: Path, harm: str) -> None:
    """A file that rank 0 does not see as it was written, on another node's own disk, say: an error, no checkpoint."""
    stage = store.make_stage(tmp_path, 1)
    written = store.write_tensors(stage, "a.safetensors", {"x": torch.ones(9)})
    path = stage / "a.safetensors"
    path.unlink() if harm == "gone" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"a\.safetensors"):
        store.publish(tmp_path, stage, 1, [written], {})
    assert store.list_steps(tmp_path) == []


def test_a_rank_that_outlived_its_job_does_not_write_into_the_next_ones_stage(tmp_path: Path) -> None:
    late = store.make_stage(tmp_path, 1)
    store.remove_stages(tmp_path)
    stage = store.make_stage(tmp_path, 1)
    written = store.write_tensors(stage, "a.safetensors", {"x": torch.ones(9)})
    with pytest.raises(FileNotFoundError):
        store.write_tensors(late, "a.safetensors", {"x": torch.zeros(9)})
    store.verify(store.publish(tmp_path, stage, 1, [written], {}))


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
    if harm != "swap":  # both are of one size
        with pytest.raises(ValueError, match="part-0"):
            store.verify(newest, hashes=False)


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
    "a number too long": lambda path: path.write_text("1" * 5000),
    "not a number": forge(lambda m: m.update(step=float("nan"))),
    "an empty list of files": forge(lambda m: m.update(files=[])),
    "a file without a hash": forge(lambda m: m["files"][0].pop("sha256") and m),
    "a file with a very long name": forge(lambda m: m["files"][0].update(name="x" * 3000)),
    "a file that is the manifest": forge(lambda m: m["files"][0].update(name=store.MANIFEST)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
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


def test_everything_is_durable_before_it_is_visible_and_old_ones_go_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves the page cache behind and hides a missing fsync, which a power failure would not."""
    make(tmp_path, 1, keep_last=1)
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(f"sync {'files of the stage' if path.name.startswith('.tmp-step') else path.name}")

    def watched_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"rename to {Path(target).name}")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "7")
    make(tmp_path, 2, keep_last=1)
    assert done == [
        "sync part-0.safetensors", "sync part-1.safetensors",
        f"sync .tmp-7-{store.MANIFEST}", f"rename to {store.MANIFEST}", "sync files of the stage",
        "sync files of the stage", "rename to step-00000002", f"sync {tmp_path.name}",
        "rename to .tmp-pruned-step-00000001",
    ]  # fmt: skip


def test_a_stage_that_was_never_published_is_no_checkpoint(tmp_path: Path) -> None:
    stage = store.make_stage(tmp_path, 7)
    store.write_tensors(stage, "part-0.safetensors", {"x": torch.zeros(3)})
    assert store.newest_valid(tmp_path) == (None, [])
    store.remove_stages(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_processes_of_the_same_number_write_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with atomic_path(path) as first, atomic_path(path) as second:  # as on two nodes
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first.read_bytes() == b"first"
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_meta_of_another_tool_or_an_unfinished_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tools/cluster\.py"):
        read_meta(tmp_path / "nowhere", expect="cluster")
    with pytest.raises(UserError, match="did not finish"):
        read_meta(tmp_path, expect="cluster")
    write_meta(tmp_path, "embed", {}, dim=3)
    assert read_meta(tmp_path, expect="embed")["dim"] == 3
    with pytest.raises(UserError, match="made by 'embed'"):
        read_meta(tmp_path, expect="cluster")


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    wide = torch.randn(5, 7)
    tensors = {
        "fp32": wide, "turned": wide.T, "part": wide[1:3, ::2], "bf16": wide.bfloat16(), "fp64": wide.double(),
        "fp16": wide.half(), "int64": torch.arange(3), "int32": torch.arange(4, dtype=torch.int32),
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "bool": torch.tensor([True, False, True]),
        "Ω/name": torch.ones(1, dtype=torch.uint8),
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


class FakeEngine:
    """What a checkpoint needs of the engine: parameters with their moments, and buffers."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], buffers: tuple[str, ...] = ("clip.mean",)) -> None:
        self.state = {n: {k: torch.randn(s) for k in ("param", "exp_avg", "exp_avg_sq")} for n, s in shapes.items()}
        self.buffers, self.loaded = {name: torch.randn(3) for name in buffers}, 0

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, tensors in self.state.items():
            yield name, {kind: value.clone() for kind, value in tensors.items()}

    def named_buffers(self) -> dict[str, Tensor]:
        return self.buffers

    def load_named_state(self, state: Callable[[str, str], Tensor], step: int) -> None:
        self.loaded += 1
        for name, tensors in self.state.items():
            for kind, value in tensors.items():
                value.copy_(state(name, kind))

    def load_average(self, read: Callable[[str], Tensor] | None) -> None:
        assert read is None  # these checkpoints have none

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        for name, value in buffers.items():
            self.buffers[name].copy_(value)


class FakeRows:
    def __init__(self, start: int, stop: int, **rows: Tensor) -> None:
        self.start, self.stop, self.own = start, stop, rows

    def state_rows(self) -> dict[str, Tensor]:
        return self.own

    def load_state_rows(self, read: Callable[[str, int, int], Tensor]) -> None:
        for name, value in self.own.items():
            value.copy_(read(name, self.start, self.stop))


SHAPES: dict[str, tuple[int, ...]] = {"clip.a.weight": (4, 3), "clip.a.bias": (4,), "logit_scale": ()}
FACTS = {"num_classes": 7, "embed_dim": 3}


def classes(**more: Tensor) -> FakeRows:
    return FakeRows(0, 7, weight=torch.randn(7, 3), hits=torch.arange(7), **more)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[FakeEngine, FakeRows, Path]:
    engine, head = FakeEngine(SHAPES), classes()
    Saver(tmp_path, keep_last=2).save(5, engine, {"head": head}, (0, 7), {**FACTS, "updates": 4})
    return engine, head, tmp_path / "step-00000005"


def test_what_was_saved_is_what_is_loaded(saved: tuple[FakeEngine, FakeRows, Path]) -> None:
    engine, head, directory = saved
    again, rows = FakeEngine(SHAPES), classes()
    assert restore(directory, again, {"head": rows}, FACTS) == 5
    for name, tensors in engine.state.items():
        assert all(torch.equal(value, again.state[name][kind]) for kind, value in tensors.items())
    assert torch.equal(engine.buffers["clip.mean"], again.buffers["clip.mean"])
    assert all(torch.equal(value, rows.own[name]) for name, value in head.own.items())


OTHERS: dict[str, tuple[FakeEngine, dict[str, FakeRows], str]] = {
    "a parameter more": (FakeEngine({**SHAPES, "clip.b": (2,)}), {"head": classes()}, "has no exp_avg/b; has no"),
    "a parameter less": (FakeEngine({"clip.a.weight": (4, 3), "logit_scale": ()}), {"head": classes()},
        "has exp_avg/a.bias, which this run"),
    "another shape": (FakeEngine({**SHAPES, "clip.a.bias": (4, 4)}), {"head": classes()},
        r"a\.bias of shape \(4,\), expected \(4, 4\)"),
    "a buffer more": (FakeEngine(SHAPES, ("clip.mean", "clip.var")), {"head": classes()}, "has no buffer/var"),
    "a buffer less": (FakeEngine(SHAPES, ()), {"head": classes()}, "has buffer/mean, which this run does not have"),
    "rows more": (FakeEngine(SHAPES), {"head": classes(x=torch.ones(7))}, "has no head/x"),
    "rows less": (FakeEngine(SHAPES), {"head": FakeRows(0, 7, weight=torch.ones(7, 3))},
        "has head/hits, which this run"),
    "wider rows": (FakeEngine(SHAPES), {"head": FakeRows(0, 7, weight=torch.ones(7, 9), hits=torch.ones(7))},
        r"weight of shape \(3,\), expected \(9,\)"),
    "no classifier": (FakeEngine(SHAPES), {}, "has head/hits, which this run does not have"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_with_other_tensors_than_the_checkpoint_is_refused_before_anything_changes(
    saved: tuple[FakeEngine, FakeRows, Path], what: str
) -> None:
    engine, rows, message = OTHERS[what]
    with pytest.raises(UserError, match=message) as caught:
        restore(saved[2], engine, rows, FACTS)  # type: ignore[arg-type]
    assert engine.loaded == 0 and caught.value.on_every_rank


def test_rows_that_no_file_or_two_files_hold_are_refused(saved: tuple[FakeEngine, FakeRows, Path]) -> None:
    directory = saved[2]
    for start, stop in ((0, 6), (1, 7), (0, 8)):
        stage = store.make_stage(directory.parent, 9)
        rows = {"head/weight": torch.ones(stop - start, 3)}
        files = [
            store.write_tensors(stage, "student-00000.safetensors", {}),
            store.write_tensors(stage, "classifier-00000.safetensors", rows, {"start": str(start), "stop": str(stop)}),
        ]
        with pytest.raises(UserError, match="expected each of 7 rows once"):
            CheckpointReader(store.publish(directory.parent, stage, 9, files, FACTS))
