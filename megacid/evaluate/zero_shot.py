"""Zero-shot classification: the class whose averaged caption embedding is nearest to the image.

Shapes: B batch, N samples, C classes, D embedding, T context, P templates, K = min(5, C).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megacid.evaluate.datasets import Benchmark
from megacid.models.clip import LoadedClip


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


def top_classes(score_BC: torch.Tensor) -> torch.Tensor:
    """The K best classes: [B, C] -> [B, K] int64 on the CPU. Ties go to the lower class id, on every device."""
    return score_BC.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()


def class_embeddings(clip: LoadedClip, benchmark: Benchmark, *, classes_per_batch: int = 16) -> torch.Tensor:
    """Normalised mean of the normalised embeddings of each class's P captions: [C, D] fp32."""
    rows = []
    for start in range(0, benchmark.num_classes, classes_per_batch):
        names = benchmark.classnames[start : start + classes_per_batch]
        # Not str.format: class names and templates may contain other braces.
        captions = [template.replace("{c}", name) for name in names for template in benchmark.templates]
        rows.append(clip.encode_text(clip.tokenizer(captions)).unflatten(0, (len(names), -1)).mean(dim=1))
    return F.normalize(torch.cat(rows), dim=-1)


def zero_shot(clip: LoadedClip, benchmark: Benchmark, *, batch_size: int = 256, workers: int = 0) -> Predictions:
    """Classify the test split. Raises UserError if the set is incomplete."""
    split = benchmark.split("test", clip.preprocess_eval)
    class_CD = class_embeddings(clip, benchmark)
    tops, labels = [], []
    for image, label in split.batches(batch_size, workers=workers, describe=f"zero-shot {benchmark.name}"):
        tops.append(top_classes(clip.encode_image(image) @ class_CD.T))
        labels.append(label)
    return Predictions(torch.cat(tops), torch.cat(labels))
