"""Several teachers whose embeddings stand side by side in one matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megacid.errors import UserError


@dataclass(frozen=True)
class Teachers:
    """How to take the matrix of K teachers apart, whose rows are [t_1, ..., t_K] / sqrt(K) with unit rows t_k.

    Args:
        widths: of each teacher; () for one teacher of any width.
        scales: 1 / temperature of the similarities of each teacher.
    """

    widths: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, widths: Sequence[int], temperature: float | Sequence[float]) -> Teachers:
        """Teachers with one temperature, or one for each.

        Raises:
            UserError: another number of temperatures, or one <= 0.
        """
        count = max(1, len(widths))
        values = tuple(temperature) if isinstance(temperature, Sequence) else (temperature,) * count
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"affinity_temperature is {temperature}, expected > 0: 0.01 is usual")
        if len(values) != count:
            raise UserError(
                f"affinity_temperature has {len(values)} values, expected one, or {count}: one for each teacher"
            )
        return cls(tuple(widths), tuple(1 / value for value in values))

    def separate(self, image_GD: Tensor, text_GD: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Image and text columns of each teacher, and the scale of their products, which undoes the 1 / sqrt(K)."""
        count, widths = len(self.scales), self.widths or (image_GD.shape[1],)
        if not self.widths and image_GD.shape[1] != text_GD.shape[1]:
            raise UserError(
                f"the teacher's images have width {image_GD.shape[1]} and its texts {text_GD.shape[1]}, expected one "
                "width: pass embeddings of one model"
            )
        for matrix in (image_GD, text_GD):
            if matrix.shape[1] != sum(widths):
                raise UserError(
                    f"the teachers' embeddings have width {matrix.shape[1]}, expected {sum(widths)}, the sum of "
                    f"{', '.join(map(str, widths))}: pass the width of each teacher"
                )
        columns = image_GD.split(widths, dim=1), text_GD.split(widths, dim=1)
        yield from ((image, text, count * scale) for image, text, scale in zip(*columns, self.scales))
