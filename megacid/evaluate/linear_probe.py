"""Linear probe: a linear classifier on frozen image features. Here it is L2-regularised logistic regression.

The features are the L2-normalised outputs of `encode_image` AFTER the projection, as in CLIP_benchmark; `tasks.py` has
a task for those before it. The regression is fitted with the L-BFGS of the CLIP paper; `adamw_probe.py` has
CLIP_benchmark's AdamW. Deterministic. For several labels per image (labels [N, C]), the probe is one regression per
class with the same strength.
Shapes: N samples, C classes, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megacid.distributed.stopping import Progress, no_progress, stop_together
from megacid.errors import UserError
from megacid.evaluate.datasets import Benchmark
from megacid.evaluate.execution import DEFAULT, Execution, image_features
from megacid.evaluate.zero_shot import MultiLabelScores, Predictions, top_classes
from megacid.models.clip import LoadedClip

STRENGTHS = tuple(10.0**p for p in range(-2, 7))
WORSE_IN_A_ROW = 2  # strengths below the best accuracy that end the choice
HOLD_OUT = 0.2
MAX_ITERATIONS = 1000
ROWS_PER_CHUNK = 16384


@dataclass(frozen=True)
class Probe:
    """A fitted classifier: scores are feature_ND @ weight.T + bias."""

    weight: torch.Tensor  # [C, D] fp64
    bias: torch.Tensor  # [C] fp64
    iterations: int
    converged: bool

    def scores(self, feature_ND: torch.Tensor) -> torch.Tensor:
        return feature_ND.double() @ self.weight.T + self.bias


def fit(
    feature_ND: torch.Tensor,
    label_N: torch.Tensor,
    *,
    num_classes: int,
    strength: float,
    progress: Progress = no_progress,
) -> Probe:
    """Minimise |W|^2 / (2 * strength) + sum of cross entropies from W = 0, without a penalty on the bias.

    label_N: int64 [N], or [N, C] with 0 or 1, whose cross entropies are those of each class by itself.
    feature_ND: any float dtype, on the device that computes. strength: inverse regularisation, scikit-learn's C.
    progress: polled in every evaluation of the loss.
    """
    n = len(label_N)
    # The bias, which has no penalty, absorbs a shift of the features: improves the conditioning, keeps the minimiser.
    mean_D = feature_ND.double().mean(dim=0)
    feature_ND = feature_ND.double() - mean_D
    weight_CD = feature_ND.new_zeros(num_classes, feature_ND.shape[1], requires_grad=True)
    bias_C = feature_ND.new_zeros(num_classes, requires_grad=True)
    # Everything is divided by n, so the gradient tolerance does not depend on the number of samples.
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        progress(0)
        optimizer.zero_grad()
        total = weight_CD.square().sum() / (2 * strength * n)
        total.backward()
        value = total.detach()
        for start in range(0, n, ROWS_PER_CHUNK):  # the [N, C] scores of a large set do not fit in memory
            rows = slice(start, start + ROWS_PER_CHUNK)
            scores = feature_ND[rows] @ weight_CD.T + bias_C
            part = _cross_entropy(scores, label_N[rows]) / n
            part.backward()
            value = value + part.detach()
        return value

    optimizer.step(closure)
    state = optimizer.state[weight_CD]
    weight_CD, bias_C = weight_CD.detach(), bias_C.detach()
    return Probe(weight_CD, bias_C - weight_CD @ mean_D, state["n_iter"], state["n_iter"] < MAX_ITERATIONS)


def _cross_entropy(score_NC: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Summed over samples, and over classes for several labels per image."""
    if label.dim() == 2:
        return F.binary_cross_entropy_with_logits(score_NC, label.to(score_NC.dtype), reduction="sum")
    return F.cross_entropy(score_NC, label, reduction="sum")


def scored(score_NC: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """The metrics of scores of all classes; the first is the one that chooses the strength. label: [N] or [N, C]."""
    if label.dim() == 2:
        return MultiLabelScores(score_NC.cpu(), label).metrics()
    return Predictions(top_classes(score_NC), label).metrics()


def hold_out(label_N: torch.Tensor, share: float = HOLD_OUT, seed: int = 0) -> torch.Tensor:
    """bool [N] mask of the samples for choosing the strength: `share` of every class, never its only sample.

    For several labels per image, `share` of the samples, at least one, never the only one.
    """
    generator = torch.Generator().manual_seed(seed)
    if label_N.dim() == 2:
        count = min(max(round(len(label_N) * share), 1), len(label_N) - 1)
        return torch.randperm(len(label_N), generator=generator) < count
    held_out_N = torch.zeros(len(label_N), dtype=torch.bool)
    for c in label_N.unique():
        rows = (label_N == c).nonzero().flatten()
        count = min(max(round(len(rows) * share), 1), len(rows) - 1)
        held_out_N[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held_out_N


def held_out_rows(label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row numbers (int64) of the samples to fit on and of those that `hold_out` holds out.

    Raises:
        UserError: no class has two samples, or, for several labels per image, there are fewer than two samples.
    """
    held_out_N = hold_out(label_N)
    if not held_out_N.any() and label_N.dim() == 2:
        raise UserError(f"the number of train samples is {len(label_N)}, expected at least 2: use another set")
    if not held_out_N.any():
        raise UserError(
            f"the train split has {len(label_N)} samples and no class twice, expected two samples of one class"
        )
    return (~held_out_N).nonzero().flatten(), held_out_N.nonzero().flatten()


def choose_strength(
    feature_ND: torch.Tensor, label_N: torch.Tensor, *, num_classes: int, progress: Progress = no_progress
) -> tuple[float, list[float]]:
    """The strength with the best held-out accuracy (on ties the smallest), and the accuracies of those that were tried.

    They are tried from the smallest on until `WORSE_IN_A_ROW` are below the best: the largest take most iterations.
    label_N is on the CPU. Raises UserError as `held_out_rows` does.
    """
    fit_rows, held_rows = held_out_rows(label_N)
    device = feature_ND.device
    train_ND, train_N = feature_ND[fit_rows.to(device)], label_N[fit_rows].to(device)
    accuracies: list[float] = []
    for strength in STRENGTHS:
        probe = fit(train_ND, train_N, num_classes=num_classes, strength=strength, progress=progress)
        metrics = scored(probe.scores(feature_ND[held_rows.to(device)]), label_N[held_rows])
        accuracies.append(next(iter(metrics.values())))
        if max(accuracies[-WORSE_IN_A_ROW:]) < max(accuracies):
            break
    return STRENGTHS[accuracies.index(max(accuracies))], accuracies


@dataclass(frozen=True)
class Fitted:
    """What a probe that was fitted on the train split gives."""

    score_NC: torch.Tensor  # of the test split
    held_out: float  # accuracy, or mean average precision, of the held-out samples with the chosen regularisation
    settings: dict[str, float | int | bool]  # how the probe was fitted, for the result


# (train_ND, train_N on the CPU, test_ND, number of classes, progress) -> Fitted
Recipe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Progress], Fitted]


def lbfgs(
    train_ND: torch.Tensor, train_N: torch.Tensor, test_ND: torch.Tensor, num_classes: int, progress: Progress
) -> Fitted:
    """Logistic regression; its settings are the strength C, chosen from `STRENGTHS`, and the iterations."""
    strength, accuracies = choose_strength(train_ND, train_N, num_classes=num_classes, progress=progress)
    label_N = train_N.to(train_ND.device)
    probe = fit(train_ND, label_N, num_classes=num_classes, strength=strength, progress=progress)
    settings = {"C": strength, "iterations": probe.iterations, "converged": probe.converged}
    return Fitted(probe.scores(test_ND), max(accuracies), settings)


def linear_probe(
    clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT, *, recipe: Recipe = lbfgs
) -> dict[str, float | int | bool]:
    """Fit on the train split and score the test split. A collective: the ranks share the features, and each fits.

    Returns:
        CLIP_benchmark's names lp_acc1, lp_acc5 and lp_mean_per_class_recall, or lp_mean_average_precision for several
        labels per image; then `held_out_acc1` (or `held_out_mean_average_precision`), by which the regularisation was
        chosen, the recipe's settings and the sizes of both splits.
    """
    train, test = how.opened(lambda: [benchmark.split(name, clip.preprocess_eval) for name in ("train", "test")])
    with how.progress(f"features {benchmark.name}", len(train) + len(test)) as progress:
        train_ND, train_N = image_features(clip, train, how, progress)
        test_ND, test_N = image_features(clip, test, how, progress)
        with stop_together(how.group):
            fitted = recipe(train_ND, train_N, test_ND, benchmark.num_classes, progress)
            metrics = scored(fitted.score_NC, test_N)
    return {
        **{f"lp_{name}": value for name, value in metrics.items()},
        f"held_out_{next(iter(metrics))}": fitted.held_out,
        **fitted.settings,
        "train_samples": len(train_N),
        "test_samples": len(test_N),
    }
