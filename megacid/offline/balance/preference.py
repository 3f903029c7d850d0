"""The order in which samples are preferred. Legend: n samples with an embedding, B rows of a block, D width."""

from __future__ import annotations

import numpy as np
import torch

from megacid.distributed.array_exchange import ALONE, Ranks
from megacid.distributed.parallel import shard_range
from megacid.distributed.stopping import Progress, no_progress
from megacid.failpoints import failpoint
from megacid.offline.balance.context import Keep
from megacid.offline.balance.linking import check_unit
from megacid.offline.nearest import prepare
from megacid.offline.random_streams import RandomStream
from megacid.offline.row_numbers import row_dtype
from megacid.offline.rows import Rows
from megacid.storage.stage_directory import PartialResults

_BLOCK_ROWS = 1 << 16
_PART_BLOCKS = 16  # blocks in one partial result


def preference(
    keep: Keep,
    score: np.ndarray,
    seed: int,
    image: Rows,
    text: Rows | None,
    ranks: Ranks = ALONE,
    partial: PartialResults | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """The order in which samples are preferred, number [n]: smaller is kept first. A collective.

    Args:
        score: [n], similarity to the centroid; overwritten.
        text: caption embeddings, for keep="caption".
        ranks: share the reading of the embeddings, for keep="caption".
        partial: where finished parts are kept.

    Raises:
        UserError: naming an embedding that is zero or not finite.
    """
    if keep in ("nearest", "medoid"):  # with medoids this is the order of the cap alone
        score = score.astype(np.float32, copy=False)
        return np.negative(score, out=score)
    if keep == "farthest":
        return score.astype(np.float32, copy=False)
    if keep == "random":
        order = np.random.default_rng([seed, RandomStream.KEEP_ORDER]).permutation(len(score))
        return order.astype(row_dtype(len(score)))
    assert text is not None
    part_rows = _BLOCK_ROWS * _PART_BLOCKS
    parts, mine = -(-len(score) // part_rows), [np.empty(0, np.float32)]
    with ranks.stop_together():
        for part in range(*shard_range(parts, ranks.rank, ranks.world)):
            low, high = part * part_rows, min((part + 1) * part_rows, len(score))
            cosine = partial.array(f"caption-{part}", (high - low,), "f") if partial else None
            if cosine is None:
                cosine = _caption_cosine(image, text, low, high, progress)
                if partial:
                    partial.save_array(f"caption-{part}", cosine)
                failpoint("balance:preference", step=part)
            mine.append(-cosine)
    return ranks.concatenate(np.concatenate(mine))


def _caption_cosine(image: Rows, text: Rows, low: int, high: int, progress: Progress) -> np.ndarray:
    """The cosine of image and caption of the rows [low, high), float32."""
    out = np.empty(high - low, np.float32)
    for start in range(low, high, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, high)
        v, t = (prepare(rows.read(start, stop), "cosine", torch.device("cpu")) for rows in (image, text))
        for x_BD, rows in ((v, image), (t, text)):
            check_unit(x_BD, rows, np.arange(start, stop))
        progress(0)
        out[start - low : stop - low] = (v * t).sum(1).numpy()
    return out
