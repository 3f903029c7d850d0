"""Zero-shot classification: the class whose averaged caption embedding is nearest to the image, or scores of all.

Shapes: B batch, N samples, C classes, D embedding, T context, P templates, K = min(TOP, C).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megacid.distributed.stopping import Progress, no_progress
from megacid.errors import UserError
from megacid.evaluate.datasets import Benchmark
from megacid.evaluate.execution import DEFAULT, Execution
from megacid.models.clip import LoadedClip

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions for a split, in its order."""

    top: torch.Tensor  # [N, K] int64, best class first
    label: torch.Tensor  # [N] int64

    def metrics(self) -> dict[str, float]:
        """acc1, acc5 (over K classes) and mean_per_class_recall (over the classes that occur), from 0 to 1."""
        hit_NK = self.top == self.label[:, None]
        classes = self.label.unique()
        recall = torch.stack([hit_NK[self.label == c, 0].double().mean() for c in classes])
        return {
            "acc1": hit_NK[:, 0].double().mean().item(),
            "acc5": hit_NK.any(dim=1).double().mean().item(),
            "mean_per_class_recall": recall.mean().item(),
        }


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of every class for a split whose images may have several labels, in its order."""

    score: torch.Tensor  # [N, C]
    label: torch.Tensor  # [N, C] int64, 0 or 1

    def metrics(self) -> dict[str, float]:
        """mean_average_precision, from 0 to 1: the mean over the classes that occur, by scikit-learn."""
        try:
            from sklearn.metrics import average_precision_score
        except ImportError:
            raise UserError("the mean average precision needs scikit-learn: pip install scikit-learn") from None
        occurs = self.label.any(dim=0)
        if not occurs.any():
            raise UserError(
                f"all {len(self.label)} samples are without a label, expected some with one: use another set"
            )
        if bad := int((~self.score.isfinite()).any(dim=1).sum()):
            raise UserError(
                f"{bad} of {len(self.label)} samples have scores that are not finite, expected none: the weights may "
                "have diverged, evaluate an earlier checkpoint"
            )
        value = average_precision_score(self.label[:, occurs].numpy(), self.score[:, occurs].double().cpu().numpy())
        return {"mean_average_precision": float(value)}


def top_classes(score_BC: torch.Tensor) -> torch.Tensor:
    """The K best classes: [B, C] -> [B, K] int64 on the CPU. Ties go to the lower class id, on every device."""
    return score_BC.sort(dim=1, descending=True, stable=True).indices[:, :TOP].cpu()


def class_embeddings(
    clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT, progress: Progress = no_progress
) -> torch.Tensor:
    """Normalised mean of the normalised embeddings of each class's P captions: [C, D] fp32. A collective."""
    classes_per_batch = max(1, how.batch_size // len(benchmark.templates))

    def batches() -> Iterator[torch.Tensor]:
        own = how.own(benchmark.num_classes)
        for start in own[::classes_per_batch]:
            names = benchmark.classnames[start : min(start + classes_per_batch, own.stop)]
            # Not str.format: class names and templates may contain other braces.
            captions = [template.replace("{c}", name) for name in names for template in benchmark.templates]
            yield clip.encode_text(clip.tokenizer(captions)).unflatten(0, (len(names), -1)).mean(dim=1)
            progress(0)

    empty = torch.empty(0, clip.embed_dim, device=clip.device)
    own = torch.cat([empty, *how.together(batches(), benchmark.num_classes, classes_per_batch)])
    return F.normalize(how.gather(own), dim=-1)


def zero_shot(clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT) -> Predictions:
    """Classify the test split. A collective. Raises UserError if the set is incomplete, the same on every rank."""
    empty = torch.empty(0, min(TOP, benchmark.num_classes), dtype=torch.int64)
    return Predictions(*_zero_shot(clip, benchmark, how, top_classes, empty))


def zero_shot_multilabel(clip: LoadedClip, benchmark: Benchmark, how: Execution = DEFAULT) -> MultiLabelScores:
    """`zero_shot` for a set of several labels per image."""
    return MultiLabelScores(*_zero_shot(clip, benchmark, how, torch.Tensor.cpu, torch.empty(0, benchmark.num_classes)))


def _zero_shot(
    clip: LoadedClip,
    benchmark: Benchmark,
    how: Execution,
    keep: Callable[[torch.Tensor], torch.Tensor],
    empty: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keep(scores [B, C]), labels) of the test split. empty: what `keep` gives for no image."""
    split = how.opened(lambda: benchmark.split("test", clip.preprocess_eval))
    with how.progress(f"zero-shot {benchmark.name}", len(split)) as progress:
        class_CD = class_embeddings(clip, benchmark, how, progress)

        def classify(image: torch.Tensor) -> torch.Tensor:
            return keep(clip.encode_image(image) @ class_CD.T)

        return how.all_images(split, classify, clip.device, progress, empty=empty)
