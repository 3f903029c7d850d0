"""E9: names and numbers of a run file that no run can mean are one line that names the key."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hostile_data import RUN

from megacid.config.load import load_run
from megacid.config.schema import SECTIONS
from megacid.errors import UserError


def load(tmp_path: Path, *assignments: str, text: str | None = None) -> Any:
    file = tmp_path / "run.json"
    file.write_text(text if text is not None else json.dumps(RUN))
    return load_run(file, list(assignments), world=1)


def refused(tmp_path: Path, match: str, *assignments: str, text: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(tmp_path, *assignments, text=text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", "a/b", "/tmp/x", "a\\b", "a/../b", "a\nb", "a\x1bb", "a\0b", "\ud800", "n" * 300]
)
def test_a_run_name_is_one_directory(tmp_path: Path, name: str) -> None:
    tree = copy.deepcopy(RUN)
    tree["megacid"]["run"]["name"] = name
    refused(tmp_path, r'"megacid\.run\.name" is .*expected the name of one directory', text=json.dumps(tree))


@pytest.mark.parametrize("name", ["x", "a.b", "..a", "run 1", "数字", "n" * 200])
def test_usual_run_names_stay(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, f"run.name={json.dumps(name)}").directory == Path("runs") / name


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "1e39", "1e300"])
@pytest.mark.parametrize(
    "key", ["optimizer.params.lr", "classifier.lr", "classifier.scale", "loss.cluster", "run.timeout_s"]
)
def test_numbers_beyond_fp32_are_refused_wherever_they_stand(tmp_path: Path, key: str, number: str) -> None:
    refused(tmp_path, key.replace(".", r"\."), f"{key}={number}")
    # The same in the file, read as Hjson.
    tree = copy.deepcopy(RUN)
    sections = (key if key.startswith("optimizer") else f"megacid.{key}").split(".")
    node = tree
    for section in sections[:-1]:
        node = node[section]
    node[sections[-1]] = "NUMBER"
    refused(tmp_path, "number|JSON", text=json.dumps(tree).replace('"NUMBER"', number))


@pytest.mark.parametrize(
    "assignment",
    ["student.hidden=1e12", f"student.hidden={10**12}", f"student.embed_dim={10**12}", f"student.layers={10**9}",
     f"run.total_steps={10**18}", f"run.keep_last={10**18}", "run.timeout_s=1e30", "run.save_timeout_s=1e9",
     f"data.block_shards={10**18}", f"student.hidden={10**30}", f"guard.max_consecutive_skips={2**62}"],
)  # fmt: skip
def test_sizes_that_no_machine_has_are_refused(tmp_path: Path, assignment: str) -> None:
    refused(tmp_path, assignment.partition("=")[0].replace(".", r"\."), assignment)


@pytest.mark.parametrize("number", ["1e-8", "0.001", "3e38", "1e5"])
def test_usual_numbers_stay(tmp_path: Path, number: str) -> None:
    assert load(tmp_path, f"optimizer.params.lr={number}").deepspeed["optimizer"]["params"]["lr"] == float(number)
    assert load(tmp_path, f"classifier.scale={number}").megacid.classifier.scale == float(number)


NUMBERS = [
    (section, name)
    for section, model in SECTIONS.items()
    for name, field in model.model_fields.items()
    if re.search(r"\b(int|float)\b", repr(field.annotation)) and "str" not in repr(field.annotation)
]


assert len(NUMBERS) > 35


@pytest.mark.parametrize(("section", "name"), NUMBERS, ids=lambda part: part)
def test_numbers_in_quotes_booleans_and_lists_for_numbers_are_refused(tmp_path: Path, section: str, name: str) -> None:
    # Each of several teachers has a temperature of its own, so [1] is the list of one teacher's.
    one = '["1"]' if name == "affinity_temperature" else "[1]"
    for text in ('"1"', "true", one, "{}"):
        refused(tmp_path, rf'"megacid\.{section}\.{name}.* is .*expected', f"{section}.{name}={text}")


@pytest.mark.parametrize("section", SECTIONS)
def test_booleans_lists_and_texts_for_blocks_are_refused(tmp_path: Path, section: str) -> None:
    for text in ("true", "[]", "1", "on"):
        refused(tmp_path, rf'"megacid\.{section}" is .*expected a block', f"{section}={text}")


PATHS = ["run.dir", "data.features", "data.shards", "data.teacher", "data.labels", "data.keep", "classifier.init"]


@pytest.mark.parametrize("path", ['""', '"  "', '"a\\u0000b"', "7", "true", "[]", "{}", "$HOME/x", "~nobody-here/x"])
def test_what_is_no_path_is_refused(tmp_path: Path, path: str) -> None:
    for key in PATHS:
        refused(tmp_path, rf'"megacid\.{key}" is .*, expected (text|a path)', f"{key}={path}")


def test_a_run_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    os.truncate(tmp_path / "run.json", 40 << 30)
    with pytest.raises(UserError, match=r"run\.json has more than"):
        load_run(tmp_path / "run.json", world=1)
