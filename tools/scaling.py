#!/usr/bin/env python3
"""Draw the figure of docs/scaling.md and print its table: the predicted time of a step by GPUs and classes.

    tools/scaling.py --out docs/images/scaling.svg

The run file is configs/vit_b32_laion225m_8gpu.json at the teacher's width 1280. Nothing is measured: the costs are
those of `megacid.training.step_time`. Needs matplotlib.
"""

import itertools
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401  import paths of a plain checkout
from argtypes import ToolParser, local_path
from megacid.config.load import load_run
from megacid.errors import run_tool
from megacid.training.communication import step_collectives
from megacid.training.components import make_student
from megacid.training.memory import memory_estimate, student_bytes
from megacid.training.open_data import Data
from megacid.training.step_time import H100, Step

RUN_FILE = Path(__file__).resolve().parents[1] / "configs" / "vit_b32_laion225m_8gpu.json"
WIDTH, GPUS, CLASSES = 1280, (8, 64, 512), (10**6, 10**7, 10**8)
# The parts of a step as they are drawn, with a colour each from the palette of Okabe and Ito.
GROUPS = {
    "student": ("#0072B2", ("forward", "backward")),
    "objective": ("#E69F00", ("objective: pairs", "objective: classes")),
    "updates": ("#F0E442", ("update: student", "update: classes")),
    "communication": ("#D55E00", ("communication",)),
    "waiting for data": ("#BBBBBB", ("waiting for data",)),
}


class Case(NamedTuple):
    """A number of GPUs and of classes. seconds: of a step, by group. samples: of a step. gib: peak memory of a GPU."""

    gpus: int
    classes: int
    seconds: dict[str, float]
    samples: int
    gib: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def busy(self) -> float:
        """Seconds without waiting for data."""
        return self.total - self.seconds["waiting for data"]

    @property
    def largest(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def predict() -> list[Case]:
    """Every number of GPUs with every number of classes."""
    first = load_run(RUN_FILE, world=1)
    student = make_student(first, Data(lambda start: iter(()), (WIDTH,)))  # type: ignore[arg-type,return-value]
    base, cases = Step.of(first, student, CLASSES[0], 1, "cuda"), []
    for gpus, classes in itertools.product(GPUS, CLASSES):
        run = load_run(RUN_FILE, world=gpus).with_embed_dim(WIDTH)
        collectives = step_collectives(run, student, classes, gpus, "cuda")
        reserved = student_bytes(run, student, gpus, "cuda")
        step = replace(base, run=run, world=gpus, num_classes=classes, collectives=collectives, student_bytes=reserved)
        times = step.time(H100)
        seconds = {name: sum(times[part] for part in parts) for name, (_, parts) in GROUPS.items()}
        peak = memory_estimate(run, student, classes, gpus, "cuda").peak
        cases.append(Case(gpus, classes, seconds, run.global_batch, peak / 1024))
    return cases


def table(cases: Iterable[Case]) -> list[str]:
    """The rows of a Markdown table; the largest share is bold."""
    lines = [f"| GPUs | classes | ms per step | without waiting | samples/s | {' | '.join(GROUPS)} | GiB per GPU |"]
    lines.append("|" + "---:|" * (len(GROUPS) + 6))
    for case in cases:
        cells = [str(case.gpus), f"{case.classes // 10**6}M", f"{1e3 * case.total:,.0f}", f"{1e3 * case.busy:,.0f}"]
        cells.append(f"{case.samples / case.total:,.0f}")
        for name, seconds in case.seconds.items():
            share = f"{seconds / case.total:.0%}"
            cells.append(f"**{share}**" if name == case.largest else share)
        lines.append(f"| {' | '.join([*cells, f'{case.gib:.0f}'])} |")
    return lines


def draw(cases: list[Case], path: Path) -> None:
    """Write bars of the shares of a step, with its time above each."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    places = [i + 0.6 * (i // len(CLASSES)) for i in range(len(cases))]
    bottom = [0.0] * len(cases)
    for name, (colour, _) in GROUPS.items():
        shares = [100 * case.seconds[name] / case.total for case in cases]
        axes.bar(places, shares, bottom=bottom, color=colour, label=name, edgecolor="white", linewidth=0.6)
        bottom = [low + share for low, share in zip(bottom, shares)]
    for place, case in zip(places, cases):
        axes.text(place, 101, f"{1e3 * case.total:,.0f} ms", ha="center", va="bottom", fontsize=9)
    middle = CLASSES[len(CLASSES) // 2]
    labels = [f"{case.classes // 10**6}M" + f"\nclasses, {case.gpus} GPUs" * (case.classes == middle) for case in cases]
    axes.set_xticks(places, labels)
    axes.set_ylabel("share of a step, %")
    axes.set_ylim(0, 109)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(GROUPS), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="the figure, .svg or .png")
    args = parser.parse_args(argv)
    cases = predict()
    print("\n".join(table(cases)))
    draw(cases, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
