"""Gradient caching: the objective of all micro-batches of a step at once, with the activations of one micro-batch.

A contrastive loss of a batch is not the mean of the losses of its parts, and a sampled classifier draws its rows for
all labels of a step. With several micro-batches per step, `train.accumulate` therefore

1. embeds each micro-batch without graph, except for the last one; the gathers of the targets overlap with the latter,
2. computes the objective on the embeddings of all of them, and its gradient at each embedding (`differentiate`),
3. embeds each micro-batch again and backpropagates <embedding, its gradient> (`surrogate`), the last one first.

The sum of the surrogates has the gradient of the objective at every parameter. The second forward repeats the first
because the engine draws the student's random numbers from a seed. Gao et al. 2021 (GradCache), arXiv 2101.06983.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacid.data.batch import Batch
from megacid.losses import Objective, StartedBatch
from megacid.models.output import StudentOutput
from megacid.training.observe import observe


class _Targets(NamedTuple):
    """Targets of all micro-batches, on the device."""

    label: Tensor | None
    teacher_image: Tensor | None
    teacher_text: Tensor | None


class GradientCache:
    """Micro-batches of one step with their embeddings, then with the gradient of the objective at the embeddings."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._outputs: list[StudentOutput] = []
        self._started: StartedBatch | None = None
        self._gradients: list[tuple[Tensor | None, ...]] = []  # by micro-batch, in the order of StudentOutput

    def start(self, objective: Objective) -> None:
        """Start the objective on the targets of all `batches`. A collective."""
        self._started = objective.start(_Targets(*(self._concatenated(name) for name in _Targets._fields)))

    def add(self, out: StudentOutput) -> None:
        """Add the embeddings of the next of `batches`."""
        self._outputs.append(StudentOutput(*(value.detach() for value in out)))

    @property
    def image(self) -> Tensor:
        """Image embeddings of all micro-batches."""
        return torch.cat([out.image for out in self._outputs])

    def differentiate(self, objective: Objective) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute the started objective and its gradients, also those of the class rows. A collective.

        Returns:
            The loss and its terms, as `Objective` returns them, and what `observe` returns.
        """
        image, text = self.image.requires_grad_(), torch.cat([out.text for out in self._outputs]).requires_grad_()
        last = self._outputs[-1]
        scalars = [x.clone().requires_grad_() for x in (last.logit_scale, last.logit_bias)]
        out, started = StudentOutput(image, text, *scalars), self._started
        assert started is not None
        loss, terms = objective(out, started)
        loss.backward()
        sizes = [len(out.image) for out in self._outputs]
        none = [None] * len(sizes)
        images, texts = (none if x.grad is None else x.grad.split(sizes) for x in (image, text))
        # Every micro-batch has the same logit scale and bias, so each gets an equal share of their gradients.
        shares = [None if x.grad is None else x.grad / len(sizes) for x in scalars]
        self._gradients = [(*pair, *shares) for pair in zip(images, texts)]
        self._started = None  # frees the gathered matrices before the replay
        return loss.detach(), terms, observe(out, started.targets)

    def surrogate(self, micro: int, out: StudentOutput) -> Tensor:
        """<embedding, its gradient> of one micro-batch, 0-d; has the objective's gradient at the student's parameters.

        Args:
            micro: number of the micro-batch.
            out: output of its second forward, with graph.
        """
        parts = [(x * grad).sum() for x, grad in zip(out, self._gradients[micro]) if grad is not None]
        return torch.stack(parts).sum()

    def _concatenated(self, name: str) -> Tensor | None:
        present = [part for batch in self.batches if (part := getattr(batch, name)) is not None]
        return torch.cat(present) if present else None
