"""Stands in for the package trackio, whose dependencies conflict with the trainer's in one environment.

The signatures are those of trackio 0.43.0. Calls are appended to a file, since the trainer runs in a forked process.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any


class Trackio(types.ModuleType):
    """The module; `fail_at`: step at which `Run.log` raises."""

    def __init__(self, calls: Path, fail_at: int | None = None) -> None:
        super().__init__("trackio")
        self.calls = calls

        def record(*call: Any) -> None:
            with calls.open("a") as file:
                file.write(json.dumps(call) + "\n")

        class Histogram:
            def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
                counts, edges = np_histogram
                assert sequence is None and len(edges) == len(counts) + 1

        class Run:
            def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
                if step == fail_at:
                    raise ConnectionError("no route\nto host")
                record("log", {tag: None if isinstance(v, Histogram) else v for tag, v in metrics.items()}, step)

            def finish(self) -> None:
                record("finish")

        def init(
            project: str, name: str | None = None, group: str | None = None, space_id: str | None = None,
            server_url: str | None = None, dataset_id: str | None = None, bucket_id: str | None = None,
            config: dict[str, Any] | None = None, resume: str = "never", settings: Any = None,
            private: bool | None = None, embed: bool = True, auto_log_gpu: bool | None = None,
            gpu_log_interval: float = 10.0, auto_log_cpu: bool | None = None, cpu_log_interval: float = 10.0,
            webhook_url: str | None = None, webhook_min_level: Any = None,
        ) -> Run:  # fmt: skip
            assert resume in ("must", "allow", "never")
            record("init", project, name, config, resume)
            return Run()

        self.init, self.Run, self.Histogram = init, Run, Histogram

    def read(self) -> list[Any]:
        """The calls so far: ["init", project, name, config, resume], ["log", metrics, step], ["finish"]."""
        return [json.loads(line) for line in self.calls.read_text().splitlines()]
