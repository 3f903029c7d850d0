"""What a student returns, apart from the students: the trainer imports it without open_clip.

Shapes: B batch, D embedding.
"""

from typing import NamedTuple

import torch


class StudentOutput(NamedTuple):
    """Output of a student. A tuple, because DeepSpeed's module hooks must see every tensor."""

    image: torch.Tensor  # [B, D] fp32, L2-normalised
    text: torch.Tensor  # [B, D] fp32, L2-normalised
    logit_scale: torch.Tensor  # 0-d fp32, min(exp(parameter), 100)
    logit_bias: torch.Tensor  # 0-d fp32; 0 for a student without one
