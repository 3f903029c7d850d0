"""The tables of a study: means over seeds, their intervals, and paired differences, from the results of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  import paths of a plain checkout
from megacid.errors import UserError
from study_file import TEACHER, StudyFile
from study_subsets import LARGE_GROUP

METRICS = {
    "acc1": "zero-shot top-1",
    "seldom_acc1": "zero-shot top-1, seldom",
    "lp_acc1": "linear probe top-1",
    "image_retrieval_recall@1": "image retrieval R@1",
    "text_retrieval_recall@1": "text retrieval R@1",
}
KEPT = {"picture": "pictures", "family": "families", "concept": "concepts"}  # of study_subsets.subset_facts -> column
REMOVED = {
    "picture": "the same picture",
    "family": "the same family",
    "concept": "the same concept",
    "another_concept": "another concept",
    "in_large_groups": f"in groups of {LARGE_GROUP} or more",
}
LEVEL = 0.95
Result = dict[str, Any]


def load_results(directory: Path) -> list[Result]:
    """All results of a directory, by name. Raises UserError when there is none, or one is no result of a study."""
    results = []
    for path in sorted(directory.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is not JSON, expected a result of tools/study.py: remove it") from None
        if not isinstance(result, dict) or "digest" not in result:
            raise UserError(f"{path} has no digest, expected a result of tools/study.py: remove it")
        results.append(result)
    if not results:
        raise UserError(f"{directory} has no results, expected those of tools/study.py: run the study first")
    return results


def best_rate(tried: Sequence[Result], metric: str) -> float:
    """The learning rate with the highest metric on the validation sets; of equal ones the lowest.

    Args:
        tried: results of one arm and seed, one per rate.
    """
    for result in tried:
        if metric not in result["metrics"]["validation"]:
            known = ", ".join(sorted(result["metrics"]["validation"]))
            raise UserError(f'"tune_on" is {metric!r}, expected a metric of the validation sets: one of {known}')
    best = max(tried, key=lambda result: (result["metrics"]["validation"][metric], -result["rate"]))
    return float(best["rate"])


def next_rate(rates: Sequence[float], tried: Sequence[Result], metric: str) -> float | None:
    """The learning rate to try next: the middle one first, then the neighbours of the best, the higher one first.

    Args:
        rates: those of the arm.
        tried: results of one arm and seed, one per rate.

    Returns:
        None when the best rate has no untried neighbour: it is chosen.
    """
    rates = sorted(rates)
    if not tried:
        return rates[(len(rates) - 1) // 2]
    best = rates.index(best_rate(tried, metric))
    neighbours = rates[best + 1 : best + 2] + rates[max(best - 1, 0) : best]
    known = {result["rate"] for result in tried}
    return next((rate for rate in neighbours if rate not in known), None)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean and half the width of its 95 % interval by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats

    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


class Finished:
    """The finished runs of a study's arms at their chosen learning rates."""

    def __init__(self, results: Iterable[Result], file: StudyFile) -> None:
        self.file, self.rate, self.tried = file, dict[str, float](), dict[str, list[float]]()
        self.runs: dict[str, dict[int, Result]] = {}
        by_arm: dict[str, list[Result]] = {}
        for result in results:
            if "arm" in result:
                by_arm.setdefault(result["arm"], []).append(result)
        first = file.study.seeds[0]
        for arm, found in by_arm.items():
            if arm == TEACHER:
                self.runs[arm] = {result["seed"]: result for result in found}
            elif arm in file.arms:
                rates = file.arms[arm].rates or file.study.rates
                tried = [result for result in found if result["seed"] == first and result["rate"] in rates]
                if next_rate(rates, tried, file.study.tune_on) is not None:
                    continue  # the rate is not chosen yet
                self.tried[arm] = [result["rate"] for result in tried]
                self.rate[arm] = best_rate(tried, file.study.tune_on)
                self.runs[arm] = {result["seed"]: result for result in found if result["rate"] == self.rate[arm]}

    def with_compared(self, arms: Sequence[str]) -> list[str]:
        """The finished ones of these arms, behind the arms that they are compared with."""
        done = [arm for arm in arms if arm in self.runs]
        return [*self.file.compared(done), *done]

    def values(self, arm: str, part: str, metric: str) -> dict[int, float]:
        """Seed -> percent, of the runs that were evaluated on that part."""
        return {
            seed: 100 * result["metrics"][part][metric]
            for seed, result in self.runs.get(arm, {}).items()
            if metric in result["metrics"].get(part, {})
        }

    def differences(self, arm: str, other: str, part: str, metric: str) -> list[float]:
        """Of the seeds that both arms have."""
        ours, theirs = self.values(arm, part, metric), self.values(other, part, metric)
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _cell(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    found = interval(values)
    if found is None:
        return f"{values[0]:{sign}.2f} (one seed)"
    return f"{found[0]:{sign}.2f} ± {found[1]:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are aligned to the left."""
    rule = f"|{'---|' * left}{'---:|' * (len(header) - left)}"
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def measured(finished: Finished, arms: Sequence[str], part: str) -> list[str]:
    """The metrics that any of these arms has."""
    return [metric for metric in METRICS if any(finished.values(arm, part, metric) for arm in arms)]


def _means(finished: Finished, arms: Sequence[str], part: str) -> str:
    rows, metrics = [], measured(finished, arms, part)
    for arm in (TEACHER, *arms):
        values = [list(finished.values(arm, part, metric).values()) for metric in metrics]
        if any(values):
            rate = f"{finished.rate[arm]:g}" if arm in finished.rate else ""
            tried = ", ".join(f"{rate:g}" for rate in sorted(finished.tried.get(arm, [])))
            rows.append([f"`{arm}`", rate, tried, str(max(map(len, values))), *map(_cell, values)])
    titles = [METRICS[metric] for metric in metrics]
    return _table(["arm", "learning rate", "of", "seeds", *titles], rows, 1) if rows else ""


def _differences(finished: Finished, arms: Sequence[str], part: str) -> str:
    rows, metrics = [], measured(finished, arms, part)
    for arm in arms:
        for other in finished.file.arms[arm].against:
            values = [finished.differences(arm, other, part, metric) for metric in metrics]
            if any(values):
                rows.append([f"`{arm}`", f"`{other}`", str(max(map(len, values))), *(_cell(v, "+") for v in values)])
    titles = [METRICS[metric] for metric in metrics]
    return _table(["arm", "minus", "pairs of runs", *titles], rows, 2) if rows else ""


def _subsets(results: Sequence[Result], names: Collection[str | None]) -> list[str]:
    """Tables of what the named subsets hold, and of what balance removed."""
    results = [result for result in results if str(result.get("stage")).partition("/")[2] in names]

    def row(result: Result, part: str, columns: Mapping[str, str]) -> list[str]:
        facts = result[part]
        name = str(result["stage"]).partition("/")[2]
        return [f"`{name}`", f"{facts['pairs']:,}", *(f"{100 * facts[key]:.1f}" for key in columns)]

    kept = [row(result, "kept", KEPT) for result in results if "kept" in result]
    removed = [
        [*row(result, "removed", REMOVED), f"{result['removed']['largest_group']:,}"]
        for result in results
        if "removed" in result
    ]
    parts = []
    if kept:
        parts += [
            "### Subsets",
            "Percent of the corpus's pictures, families and concepts that have a pair in the subset.",
        ]
        parts.append(_table(["subset", "pairs", *KEPT.values()], kept, 1))
    if removed:
        parts.append("Percent of the removed pairs, by what they share with the pair that balance kept for them.")
        parts.append(_table(["subset", "removed", *REMOVED.values(), "largest group"], removed, 1))
    return parts


def test_table(results: Sequence[Result], file: StudyFile, names: Mapping[str, str]) -> str:
    """Markdown: a table of the test sets for these arms, with a name for each.

    Raises:
        UserError: an arm has no result on the test sets.
    """
    finished, rows = Finished(results, file), []
    metrics = measured(finished, list(names), "test")
    for arm, name in names.items():
        values = [list(finished.values(arm, "test", metric).values()) for metric in metrics]
        if not metrics or not all(values):
            raise UserError(f"The arm {arm} has no results on the test sets: run tools/study.py with --test first")
        rows.append([name, *map(_cell, values)])
    return _table(["student", *(METRICS[metric] for metric in metrics)], rows, 1)


def _duration(results: Sequence[Result]) -> str:
    seconds = [result.get("seconds", {}) for result in results]
    wall, cpu = (
        sum(value for entry in seconds for key, value in entry.items() if key.endswith(kind))
        for kind in ("_wall", "_cpu")
    )
    unit, size = ("hours", 3600) if wall >= 3600 else ("minutes", 60)
    return f"{wall / size:.1f} {unit}, {cpu / size:.1f} {unit} of CPU time"


def _cost(results: Sequence[Result], arms: Sequence[str]) -> str:
    trained = [result for result in results if result.get("arm") in arms]
    if not trained:
        return "No student has finished."
    stages = [result for result in results if "stage" in result]
    first, dates = trained[0], sorted(result["date"][:10] for result in trained)
    return (
        f"{len(trained)} students: {_duration(trained)}; the stages of the study: {_duration(stages)}. "
        f"{first['machine']['cpu']}, {first['machine']['cores']} cores, torch {first['versions'].get('torch')}; "
        f"{dates[0]} to {dates[-1]}."
    )


def report(results: Sequence[Result], file: StudyFile, arms: Sequence[str]) -> str:
    """Markdown: for each part the means and the paired differences of these arms, then what they cost.

    The means of arms that they are compared with come first.
    """
    finished = Finished(results, file)
    parts = []
    for part, title in (("test", "Test sets"), ("validation", "Validation sets")):
        if measured(finished, arms, part):
            means = _means(finished, finished.with_compared(arms), part)
            parts += [f"### {title}", means, *filter(None, [_differences(finished, arms, part)])]
    note = f"Percent; mean ± half of the {100 * LEVEL:.0f} % interval over seeds (Student's t); differences by seed."
    subsets = {file.subset_of(arm) for arm in arms}
    return "\n\n".join([*parts, note, *_subsets(results, subsets), _cost(results, arms)])
