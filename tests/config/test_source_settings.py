"""data.sources in a run file: what each source needs, what is refused, and what a resumed run may not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacid.config.load import load_run
from megacid.config.schema import RunFile
from megacid.config.sections import SourceConfig
from megacid.errors import UserError
from megacid.training.run_settings import check_same_settings, write_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits_cpu.json"
LAION = {"shards": ["a/*.tar", "b"], "weight": 3, "teacher": "ta", "labels": "ca", "keep": "ka"}
CC12M = {"shards": "c", "caption": "json:caption", "teacher": ["tc"], "labels": "cc"}
ONE = ("data.shards=null", "data.teacher=null", "data.labels=null")  # of the file


def load(sources: Any, *changes: str) -> RunFile:
    return load_run(DIGITS, [*ONE, f"data.sources={json.dumps(sources)}", *changes], world=1)


def refused(sources: Any, *changes: str) -> str:
    with pytest.raises(UserError) as error:
        load(sources, *changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sources_have_shards_and_side_tables_of_their_own() -> None:
    run = load({"laion": LAION, "cc12m": CC12M})
    cc12m, laion = run.megacid.data.all_sources.items()  # in the order of their names
    assert (cc12m[0], laion[0]) == ("cc12m", "laion")
    assert (laion[1].shards, laion[1].weight, laion[1].teachers, laion[1].caption) == ("a/*.tar::b", 3, ("ta",), "txt")
    assert (cc12m[1].weight, cc12m[1].teachers, cc12m[1].caption, cc12m[1].keep) == (1, ("tc",), "json:caption", None)


def test_the_flat_form_is_one_source_without_a_name() -> None:
    run = load_run(DIGITS, ["data.keep=k"], world=1)
    ((name, source),) = run.megacid.data.all_sources.items()
    data = run.megacid.data
    assert name == "" and source.weight == 1
    assert (source.shards, source.teacher, source.labels, source.keep) == (data.shards, data.teacher, data.labels, "k")


def test_set_changes_a_key_of_a_source() -> None:
    run = load({"laion": LAION, "cc12m": CC12M}, "data.sources.cc12m.weight=0.5", "data.sources.laion.keep=null")
    assert run.megacid.data.all_sources["cc12m"].weight == 0.5
    assert run.megacid.data.all_sources["laion"].keep is None


REFUSED: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "shards, too": (
        {"laion": LAION},
        ("data.shards=x",),
        '"megacid.data.shards" and "megacid.data.sources" are both set (\'x\', 1 sources), expected exactly one',
    ),
    "a teacher for all": (
        {"laion": LAION},
        ("data.teacher=x",),
        "\"megacid.data.teacher\" is 'x', which has no effect without data.shards: remove it, or pass --set data.te",
    ),
    "no source": ({}, (), '"megacid.data.sources" is {}, expected a block {"NAME": {...}, ...} with names of at most'),
    "a list": ([LAION], (), 'expected a block {"NAME": {...}, ...} with names of at most 40 letters'),
    "a name with a dot": ({"a.b": LAION}, (), 'expected a block {"NAME": {...}, ...} with names of at most 40'),
    "a command": (
        {"laion": LAION | {"shards": ["a", "pipe:cat b.tar"]}},
        (),
        "expected tars that are indexed: commands (pipe:) are not mixed with other sources",
    ),
    "a shuffle buffer": (
        {"laion": LAION},
        ("data.shuffle_buffer=10",),
        '"megacid.data.shuffle_buffer" is 10, which has no effect without pipe: in data.shards',
    ),
    "not a block": ({"laion": "a"}, (), '"megacid.data.sources.laion" is "a", expected a block {...}'),
    "no shards": ({"laion": {"weight": 1}}, (), '"megacid.data.sources.laion.shards" is missing, it has no default'),
    "weight 0": (
        {"laion": LAION | {"weight": 0}},
        (),
        '"megacid.data.sources.laion.weight" is 0, expected > 0: raise it',
    ),
    "unknown key": (
        {"laion": LAION | {"wieght": 2}},
        (),
        'unknown key "megacid.data.sources.laion.wieght": did you mean "weight"?',
    ),
    "no teacher": (
        {"laion": LAION, "cc12m": CC12M | {"teacher": None}},
        (),
        '"megacid.data.sources.cc12m.teacher" is null but the term instance needs teacher embeddings',
    ),
    "no labels": (
        {"laion": LAION, "cc12m": CC12M | {"labels": None}},
        (),
        '"megacid.data.sources.cc12m.labels" is null but the term cluster needs labels',
    ),
    "fewer teachers": (
        {"laion": LAION | {"teacher": ["a", "b"]}, "cc12m": CC12M},
        ("classifier.init=random",),
        '"megacid.data.sources.laion.teacher" names 2 teachers, expected 1 as in source cc12m: name the same',
    ),
    "labels for nothing": (
        {"laion": LAION},
        ("loss.cluster=0", "loss.beta=null", "loss.gamma=null", "classifier=null"),
        "\"megacid.data.sources.laion.labels\" is 'ca', which has no effect without loss.cluster > 0: remove it, or "
        "pass --set data.sources.laion.labels=null",
    ),
    "a cache for nothing": (
        {"laion": LAION},
        ("data.cache_dir=/nvme",),
        "which has no effect without a URL in data.shards, teacher, labels or keep (or sources)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_sources_lack_or_have_for_nothing_is_one_line_that_names_the_key(case: str) -> None:
    sources, changes, message = REFUSED[case]
    assert message in refused(sources, *changes)


@pytest.mark.parametrize("key", SourceConfig.model_fields)
def test_every_key_of_a_source_changes_the_settings(key: str) -> None:
    base, value = load({"laion": LAION, "cc12m": CC12M}), {"weight": 7.0}.get(key, "other")
    changed = load({"laion": LAION, "cc12m": CC12M}, f"data.sources.cc12m.{key}={json.dumps(value)}")
    assert changed.resolved() != base.resolved()
    assert getattr(changed.megacid.data.all_sources["cc12m"], key) == value


@pytest.mark.parametrize("key", ["shards", "labels", "keep"])
def test_a_url_in_one_source_is_enough_for_a_cache(key: str) -> None:
    load({"laion": LAION, "cc12m": CC12M | {key: "s3://bucket/cc12m"}}, "data.cache_dir=/nvme")


def test_what_is_written_is_on_a_disk() -> None:
    with pytest.raises(UserError, match=r"run.dir\" is \"s3://bucket/runs\", expected a path on a disk, not a URL"):
        load({"laion": LAION}, "run.dir=s3://bucket/runs")


def test_a_resumed_run_may_not_change_a_source_but_may_list_them_in_another_order(tmp_path: Path) -> None:
    run = load({"laion": LAION, "cc12m": CC12M | {"teacher": "tc"}})
    write_config(run, tmp_path, 1, None)
    check_same_settings(run, tmp_path)
    check_same_settings(load({"cc12m": CC12M | {"teacher": "tc"}, "laion": LAION}), tmp_path)
    with pytest.raises(UserError, match=r"\(megacid\.data\.sources\.laion\.weight: 3\.0 -> 2\.0\)"):
        check_same_settings(load({"laion": LAION | {"weight": 2}, "cc12m": CC12M}), tmp_path)
    with pytest.raises(UserError, match=r"megacid\.data\.sources\.cc12m\.shards: 'c' -> None"):
        check_same_settings(load({"laion": LAION}), tmp_path)


def test_a_run_of_before_sources_goes_on(tmp_path: Path) -> None:
    run = load_run(DIGITS, world=1)
    write_config(run, tmp_path, 1, None)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["resolved"]["megacid"]["data"]["sources"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    check_same_settings(run, tmp_path)
