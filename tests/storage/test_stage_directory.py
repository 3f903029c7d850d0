"""The one rule for output directories: the same arguments continue, others are refused and nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacid.errors import UserError
from megacid.storage.stage_directory import StageDirectory


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stage(folder: Path, made_by: str = "cluster", **changes: Any) -> StageDirectory:
    return StageDirectory(folder, made_by, {"k": 4, "pair": (1, 2), "rate": 0.1, **changes}, notes={"batch_size": 8})


def test_the_same_arguments_continue_and_finish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stage(out).finished() is None and not out.exists()
    first = stage(out)
    first.begin()
    first.work.begin()
    first.work.save_json("half", 7)
    (out / ".tmp-3-x").write_text("left by a kill")
    again = stage(out)
    again.begin()
    assert again.work.json("half") == 7 and not (out / ".tmp-3-x").exists()
    again.commit({"shards": "s"}, rows=3)
    meta = stage(out).finished()
    assert meta is not None and (meta["made_by"], meta["source"], meta["rows"]) == ("cluster", {"shards": "s"}, 3)
    assert not (out / ".work").exists()


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "out was made with k 4, this run has 5: take another output directory, or delete it"),
        ({"new": 1}, "made with new None, this run has 1"),
        ({"made_by": "embed"}, "made with made_by 'cluster', this run has 'embed'"),
    ],
)
def test_other_arguments_are_refused_and_change_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str, finish: bool
) -> None:
    out = tmp_path / "out"
    stage(out).begin()
    if finish:
        stage(out).commit({})
    before = contents(out)
    for act in ("finished", "begin"):
        with pytest.raises(UserError, match=message):
            getattr(stage(out, **changes), act)()
    assert contents(out) == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not empty and was not made by tools/cluster\.py"):
        stage(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_directory_of_an_earlier_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"made_by": "cluster"}))
    with pytest.raises(UserError, match=r"was written by an earlier version of tools/cluster\.py: take another"):
        stage(tmp_path).finished()


def test_a_damaged_record_of_arguments_is_refused(tmp_path: Path) -> None:
    stage(tmp_path).begin()
    (tmp_path / "settings.json").write_text('{"k": ')
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        stage(tmp_path).begin()


def test_a_damaged_meta_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage(tmp_path).begin()
    stage(tmp_path).commit({})
    (tmp_path / "meta.json").write_text('{"made_by": "clu')
    assert stage(tmp_path).finished() is None and "is damaged" in caplog.text


def test_a_note_that_changed_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage(tmp_path).begin()
    changed = stage(tmp_path)
    changed.notes = {"batch_size": 9}
    changed.begin()
    assert "was started with batch_size 8, this run has 9" in caplog.text
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == 8
