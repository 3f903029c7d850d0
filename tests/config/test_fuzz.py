"""Whatever a run file or --set holds, loading it gives a run, which can be written again, or one line of UserError."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hjson
import pytest
from hostile_data import RUN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacid.config.deepspeed_keys import REFUSED, DeepSpeedKeys, strict_model
from megacid.config.load import load_run
from megacid.config.schema import SECTIONS, RunFile
from megacid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = [RUN, *(json.loads(json.dumps(hjson.loads(path.read_text()))) for path in (ROOT / "configs").glob("*.json"))]
KEYS = sorted(
    {*SECTIONS, "megacid", *DeepSpeedKeys.model_fields, *(key.rpartition(".")[2] for key in REFUSED)}
    | {name for model in SECTIONS.values() for name in model.model_fields}
    | {"stage", "enabled", "device", "lr", "betas", "params", "type", "stage3_max_live_parameters", "offload_optimizer"}
)
PATHS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields] + [
    "data.sources.a.shards", "data.sources.a.weight", "data.sources.a.teacher", "data.sources.a",
    "zero_optimization.stage", "zero_optimization.offload_optimizer.device", "optimizer.params.lr", "bf16.enabled",
    *DeepSpeedKeys.model_fields, *SECTIONS, *REFUSED,
]  # fmt: skip

scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 5) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["auto", "1", "1e-4", "true", "bf16", "fp16", "cpu", "none", "adamw", "~/x", "$X", 5e8])
)  # fmt: skip
keys = st.sampled_from(KEYS) | st.text(max_size=6)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@st.composite
def mutated_files(draw: st.DrawFn) -> Any:
    """A real run file with a few values replaced, keys removed, keys added, or blocks wrapped."""
    tree = copy.deepcopy(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        node, depth = tree, draw(st.integers(0, 3))
        for _ in range(depth):
            blocks = [value for value in node.values() if isinstance(value, dict) and value]
            if not blocks:
                break
            node = draw(st.sampled_from(blocks))
        kind = draw(st.sampled_from(["replace", "nudge", "nudge", "remove", "add", "wrap", "quote"]))
        key = draw(keys) if kind == "add" or not node else draw(st.sampled_from(sorted(node)))
        if kind == "nudge":  # a number to another one, which may well be valid
            numbers = sorted(name for name, value in node.items() if type(value) in (int, float))
            if numbers:
                key = draw(st.sampled_from(numbers))
                node[key] = draw(st.sampled_from([0, 1, node[key] * 2, node[key] / 4, -1]))
        elif kind == "remove":
            node.pop(key, None)
        elif kind in ("wrap", "quote") and key in node:
            node[key] = [node[key]] if kind == "wrap" else json.dumps(node[key])
        else:
            node[key] = draw(values)
    return tree


assignments = st.builds(
    lambda path, sign, value: path + sign + (value if isinstance(value, str) else json.dumps(value)),
    st.sampled_from(PATHS) | st.text(max_size=12) | st.lists(keys, min_size=1, max_size=4).map(".".join),
    st.sampled_from(["=", "=", "=", ""]),
    values,
)


def check(file: Path, text: str, changes: list[str]) -> bool:
    """Load; whether it is a run. Anything but a run or one line of UserError fails the test."""
    file.write_text(text, errors="surrogatepass")
    try:
        run = load_run(file, changes, world=1)
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 10_000, message[:1000]
        return False
    assert isinstance(run, RunFile)
    file.write_text(json.dumps(run.resolved()))
    again = load_run(file, world=1)
    assert again.resolved() == run.resolved()
    return True


def fuzz(cases: int, file: Path) -> int:
    """Number of cases that were runs. Half are mutated run files, the rest --set, random JSON and random text."""
    strict_model("AdamW")  # imports DeepSpeed, which takes seconds
    runs = 0
    options = settings(max_examples=1, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    def of(share: float, text: st.SearchStrategy[str], changes: st.SearchStrategy[list[str]]) -> None:
        @settings(options, max_examples=int(cases * share))
        @given(text, changes)
        def one(text: str, changes: list[str]) -> None:
            nonlocal runs
            runs += check(file, text, changes)

        one()

    of(0.5, mutated_files().map(json.dumps), st.just([]))
    of(0.3, st.sampled_from(FILES).map(json.dumps), st.lists(assignments, min_size=1, max_size=3))
    of(0.15, values.map(json.dumps), st.lists(assignments, max_size=1))
    of(0.05, st.text(max_size=60), st.just([]))
    return runs


def test_a_random_run_file_is_a_run_or_one_line(tmp_path: Path) -> None:
    assert fuzz(700, tmp_path / "run.json") > 25


@pytest.mark.slow
def test_twenty_thousand_random_run_files_are_runs_or_one_line(tmp_path: Path) -> None:
    assert fuzz(20_000, tmp_path / "run.json") > 500


# ---- what a fuzzer rarely reaches --------------------------------------------------------------------------------

DEEP = "[" * 300 + "]" * 300


@pytest.mark.parametrize(
    "change",
    [
        f"run.seed={DEEP}", f"optimizer.params.lr={DEEP}", f"data={DEEP}", f"zero_optimization.zenflow={DEEP}",
        "run.x\ny=1", "a\nb.c=1", "run.name=\ud800", "zero_optimization.\ud800=1", "bf16.\ud800=1", "run.\ud800=1",
        'optimizer={"type": "AdamW", "\\n": 1}',
        f"run.{'k' * 9000}=1", f"data.teacher={'p' * 20_000}; loss.instance=0", f"optimizer={'x' * 20_000}",
        f"student.model={'m' * 20_000}", f"data.features={'f' * 20_000}", f"zero_optimization.stage={'s' * 20_000}",
        "=", ".=1", "..=", "megacid=1", "megacid.=1", "run=1", "run.name.x=1", "optimizer.params.betas=[0.9]",
    ],
)  # fmt: skip
def test_set_with_deep_long_or_odd_text_is_one_line(change: str) -> None:
    with pytest.raises(UserError) as error:
        load_run(ROOT / "configs" / "digits_cpu.json", change.split("; "), world=1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 10_000
