"""F20: JSON, manifests, indices and settings that are damaged or made to do harm: one UserError that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_data import BOMBS, RUN, build, checkpoint
from pair_data import stream, write_shards

from megacid.checkpoint import store
from megacid.config.load import load_run
from megacid.data.features import FeatureSet
from megacid.data.index import ShardIndex, load_index
from megacid.data.index_verify import verify_index
from megacid.data.side_tables import KeepTable, LabelTable
from megacid.data.teacher_table import TeacherTable
from megacid.errors import UserError


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards")


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "a/../../b", "", "."])
def test_a_manifest_cannot_name_a_file_outside_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x", name)
    with pytest.raises(ValueError, match="lists entries that cannot be files of a checkpoint"):
        store.read_manifest(folder)


@pytest.mark.parametrize(
    "manifest",
    [[], None, 7, "x", {}, {"format": 1}, {"format": 1, "files": 7}, {"format": 1, "files": [7]},
     {"format": 1, "files": [{}]}, {"format": 1, "files": [{"name": 7, "bytes": "x", "sha256": None}]}],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_a_clear_error(tmp_path: Path, manifest: Any) -> None:
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x")
    (folder / store.MANIFEST).write_bytes(store.seal(manifest))
    with pytest.raises(ValueError, match="step-00000003"):
        store.read_manifest(folder)
    assert store.newest_valid(folder.parent)[0] is None


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_made_to_do_harm_is_a_clear_error_wherever_it_is_read(
    tmp_path: Path, index: ShardIndex, bomb: str
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "meta.json").write_bytes(BOMBS[bomb])
    for open_stage in (TeacherTable, LabelTable, KeepTable):
        with pytest.raises(UserError, match="stage"):
            open_stage(stage, index)
    with pytest.raises(UserError, match="stage"):
        FeatureSet(stage)
    folder = checkpoint(tmp_path / "run" / "step-00000003", b"x")
    (folder / store.MANIFEST).write_bytes(BOMBS[bomb])
    with pytest.raises(ValueError, match=store.MANIFEST):
        store.read_manifest(folder)
    run_file = tmp_path / "run.json"
    run_file.write_bytes(BOMBS[bomb])
    with pytest.raises(UserError, match=r"run\.json"):
        load_run(run_file, world=1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "open_clip_config.json").write_bytes(BOMBS[bomb])
    with pytest.raises(UserError, match="open_clip_config"):
        build(f"local-dir:{model}", None)
    for name in ("index.json", "00001.keys.json"):  # made again, from the tars
        (index.root / "index" / name).write_bytes(BOMBS[bomb])
        (index.root / "index" / "index.json").write_bytes(BOMBS[bomb])
        assert verify_index(index.root) == [f"{index.root}/index/index.json is missing or unreadable"]
        again = load_index(index.root)
        assert again.digest == index.digest and again.table(1).keys == index.table(1).keys


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, '{"a":' * 100_000])
def test_a_setting_made_to_do_harm_is_a_clear_error(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    with pytest.raises(UserError):
        load_run(path, [f"run.seed={value}"], world=1)


@pytest.mark.parametrize(
    "change",
    [{"bytes": "7"}, {"samples": -1}, {"samples": 10**30}, {"dropped": {"x": "y"}}, {"name": "../../00001"},
     {"damage": 7}, {"sha256": None}],
)  # fmt: skip
def test_an_index_that_was_tampered_with_is_made_again_or_refused(
    tmp_path: Path, index: ShardIndex, change: dict[str, Any]
) -> None:
    path = index.root / "index" / "index.json"
    stored = json.loads(path.read_text())
    stored["shards"][1].update(change)
    path.write_text(json.dumps(stored))
    try:
        again = load_index(index.root)
        again.table(1)
    except UserError as error:
        assert "index" in str(error)
    else:
        assert again.digest == index.digest and again.table(1).keys == index.table(1).keys


def test_offsets_of_a_tampered_index_read_nothing_else(index: ShardIndex) -> None:
    members = np.load(index.root / "index" / "00001.members.npy")
    for row, (offset, size) in enumerate([(-5, 10), (2**62, 10), (0, 2**62), (0, -7), (10**6, 10), (0, 0)]):
        members[row, :2] = offset, size
    np.save(index.root / "index" / "00001.members.npy", members)
    batches = list(stream(load_index(index.root), total_steps=3, error_budget=1.0))
    assert {s.partition(":")[0] for b in batches for s in b.replaced} == {f"00001/k{9 + row}" for row in range(6)}
    assert all(b.image[:, 0, 0, 0].long().equal(b.text[:, 0]) for b in batches)


# ---- the run file ----------------------------------------------------------------------------------------------------


def numbers() -> list[str]:
    """Every number of the megacid block."""
    from megacid.config.schema import defaults

    names = [
        f"{section}.{name}"
        for section, values in defaults().items()
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return [*names, "run.total_steps", "loss.temperature", "classifier.filter_threshold", "classifier.lr"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-1" + "0" * 30])
def test_numbers_that_are_none_or_beyond_all_measure_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    accepted = []
    for name in numbers():
        try:
            load_run(path, [f"{name}={value}"], world=1)
            accepted.append(name)
        except UserError as error:
            assert name in str(error)
    assert not accepted
    for key in ("train_batch_size", "gradient_clipping", "optimizer.params.lr"):
        with pytest.raises(UserError):
            load_run(path, [f"{key}={value}"], world=1)
    assert math.isnan(json.loads("NaN"))  # json lets it pass: somebody else has to look
