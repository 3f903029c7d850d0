"""The settings of a run: recorded in config.json, compared at every later start and between the ranks of one start."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megacid.config.conditions import ineffective
from megacid.config.deepspeed_keys import REFUSED
from megacid.config.renamed import with_new_keys
from megacid.config.schema import SECTIONS, MegacidConfig, RunFile, defaults
from megacid.config.sections import SourceConfig
from megacid.errors import UserError
from megacid.storage.atomic import SETTINGS_BYTES, read_bounded, write_json_atomic
from megacid.storage.metadata import versions

log = logging.getLogger("megacid")

# Settings that change no result, such as where files are written and how the global batch is split; and the guard's.
MAY_CHANGE = (
    "megacid.run.dir", "megacid.run.name", "megacid.run.save_every", "megacid.run.keep_last", "megacid.run.log_every",
    "megacid.run.trackers",
    "megacid.run.timeout_s", "megacid.run.save_timeout_s", "megacid.run.start_timeout_s",
    "megacid.run.save_in_background", "megacid.run.checkpoint_mirror", "megacid.run.check_every",
    "megacid.data.workers", "megacid.data.worker_timeout_s", "megacid.data.prefetch", "megacid.data.error_budget",
    "megacid.data.cache_dir", "megacid.data.cache_gb",
    "megacid.student.grad_checkpointing", "megacid.student.ema_decay", "megacid.classifier.memory_budget_gb",
    "megacid.classifier.cuda_graph",
    "megacid.guard", "megacid.eval",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
    "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "timers", "aio",
)  # fmt: skip

_SOURCE: dict[str, Any] = {"shards": ""} | {
    key: field.default for key, field in SourceConfig.model_fields.items() if not field.is_required()
}
DEEPSPEED = ((0, 19, 8), (0, 20))  # the first version that works, the first that is not known to; as in pyproject.toml


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as dotted path -> value."""
    if isinstance(tree, dict):
        return {
            key: value
            for name, sub in tree.items()
            for key, value in flat(sub, f"{path}.{name}" if path else name).items()
        }
    return {path: list(tree) if isinstance(tree, tuple) else tree}


def settings_of_this_rank(run: RunFile, world: int) -> dict[str, Any]:
    """What must be equal on all ranks of one start: every setting, the number of ranks, the versions of packages."""
    packages = {f"version of {name}": version for name, version in versions().items()}
    return {**flat(run.resolved()), "number of ranks": world, **packages}


def without_ineffective(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings of a run with the defaults for settings that have no effect."""
    sections = {name: SimpleNamespace() for name in SECTIONS}
    for path, value in settings.items():
        block, section, key, *names = [*path.split("."), "", ""]
        if block != "megacid" or section not in sections:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if key == "sources" and len(names) == 4:  # data.sources.NAME.KEY
            blocks = getattr(sections[section], key, None) or {}
            setattr(blocks.setdefault(names[0], SimpleNamespace(**_SOURCE)), names[1], value)
            value = blocks
        setattr(sections[section], key, value)
    for setting in ineffective(MegacidConfig, SimpleNamespace(**sections)):
        settings = settings | flat(setting.default, f"megacid.{setting.path}")
    return settings


def check_packages() -> None:
    """Raise UserError when the installed DeepSpeed is one that the trainer does not work with."""
    installed = versions().get("deepspeed", "none")
    numbers = tuple(map(int, re.findall(r"\d+", installed)[:3]))
    if not DEEPSPEED[0] <= numbers < DEEPSPEED[1]:
        oldest, newest = (".".join(map(str, version)) for version in DEEPSPEED)
        raise UserError(
            f"DeepSpeed {installed} is installed, expected >= {oldest} and < {newest}, since older ones ignore "
            f'"gradient_allreduce_op": pip install "deepspeed>={oldest},<{newest}"'
        )


def _code_version() -> str | None:
    """The commit of the checkout, or None outside one."""
    command = ["git", "rev-parse", "HEAD"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def recorded_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a config.json records, as dotted path -> value."""
    # A setting that did not exist when the run was started had the value that is its default now, and one without
    # effect may be removed: earlier versions accepted it.
    recorded = without_ineffective(flat({"megacid": defaults()}) | with_new_keys(flat({**config["resolved"]})))
    return {key: value for key, value in recorded.items() if key not in REFUSED and key.split(".")[0] not in REFUSED}


def read_config(directory: Path) -> dict[str, Any] | None:
    """The config.json of a run directory; None without one. Raises UserError when it cannot be read."""
    path = directory / "config.json"
    try:
        data = read_bounded(path, SETTINGS_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        data = b""
    return parse_config(data, f"{path}", "choose another run.name")


def parse_config(data: bytes, path: str, remedy: str) -> dict[str, Any]:
    """The config.json with the bytes `data`. UserError, with the path and what else to do than restore it."""
    try:
        config = json.loads(data)
        recorded_settings(config)
        return dict(config)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} cannot be read: restore it, or {remedy}") from None


def changed_settings(run: RunFile, config: dict[str, Any]) -> list[str]:
    """The settings that change a result and differ from those in `config`, each as "key: before -> now"."""
    before = recorded_settings(config)
    now = flat(run.resolved())
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def check_same_settings(run: RunFile, directory: Path) -> None:
    """Raise UserError with the differences when `directory` was started with settings that give other results."""
    config = read_config(directory)
    if config is not None and (changed := changed_settings(run, config)):
        raise UserError(
            f"{directory} was started with other settings ({'; '.join(changed)}): use them again, or choose another "
            "run.name"
        )


def write_config(run: RunFile, directory: Path, world: int, fork_of: Path | None = None) -> None:
    """Record the settings of a new run, and what it was started with, in config.json.

    Args:
        fork_of: the checkpoint of another run that a fork starts from.
    """
    origin = {}
    if fork_of is not None:
        parent = read_config(fork_of.parent)
        changed = None if parent is None else changed_settings(run, parent)
        origin = {"fork_of": str(fork_of.resolve()), "changed": changed}
        log.info("fork of %s; changed settings: %s", fork_of, "unknown" if changed is None else changed or "none")
    write_json_atomic(
        directory / "config.json",
        {
            "resolved": run.resolved(),
            "file": str(run.path),
            "world": world,
            "versions": versions(),
            "commit": _code_version(),
            **origin,
        },
    )
