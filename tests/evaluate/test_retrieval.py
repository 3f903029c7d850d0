"""Retrieval: recall against a plain computation, several captions per image, chunks, bad sets, the tool's result."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_data import CAPTIONS, write_retrieval_set
from harness import run_ranks
from offline_data import run, save_model

import megacid.evaluate.retrieval as module
from benchmarks.anonymous_memory import PeakAnonymous, anonymous_bytes
from megacid.distributed.stopping import no_progress
from megacid.errors import UserError
from megacid.evaluate.execution import Execution
from megacid.evaluate.retrieval import first_ranks, load_retrieval, retrieval
from megacid.models.clip import LoadedClip
from megacid.models.student import build_student, loaded_student

QUIET = Execution(batch_size=4, progress=lambda describe, total: nullcontext(no_progress))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_set(tmp_path_factory.mktemp("retrieval") / "colours")


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    return loaded_student(build_student("digits-student", embed_dim=32, seed=5), "memory")


def test_recalls_are_those_of_a_sort_of_all_scores(
    clip: LoadedClip, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_retrieval(root, clip.preprocess_eval)
    assert split.captions == CAPTIONS
    image = clip.encode_image(torch.stack([split[row][0] for row in range(len(split))]))
    owner = np.array([number for number, of_image in enumerate(CAPTIONS) for _ in of_image])
    text = clip.encode_text(clip.tokenizer([caption for of_image in CAPTIONS for caption in of_image]))
    score = (text @ image.T).numpy()
    whole = retrieval(clip, root, QUIET)
    for k in module.TOP_K:
        best = np.argsort(-score, axis=1)[:, :k]
        assert whole[f"image_retrieval_recall@{k}"] == pytest.approx((best == owner[:, None]).any(1).mean())
        best = np.argsort(-score, axis=0)[:k].T
        hits = (owner[best] == np.arange(len(CAPTIONS))[:, None]).any(1)
        assert whole[f"text_retrieval_recall@{k}"] == pytest.approx(hits.mean())
    assert 0 < whole["image_retrieval_recall@5"] < 1 and whole["image_retrieval_recall@10"] == 1
    monkeypatch.setattr(module, "CHUNK_SCORES", 8)
    assert retrieval(clip, root, QUIET) == whole


def encoded(clip: LoadedClip, root: Path) -> tuple[dict[str, float], int]:
    """The recalls, and the number of captions that this rank has encoded."""
    own = 0
    encode = LoadedClip.encode_text

    def counted(clip: LoadedClip, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal own
        own += len(tokens)
        return encode(clip, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedClip, "encode_text", counted)
        return retrieval(clip, root, QUIET), own


def test_ranks_share_the_captions_and_have_the_recalls_of_a_single_one(clip: LoadedClip, root: Path) -> None:
    (whole, captions), parts = encoded(clip, root), run_ranks(encoded, 2, clip, root)
    assert [recalls for recalls, _ in parts] == [whole, whole]
    assert sum(own for _, own in parts) == captions and min(own for _, own in parts) > 0


def test_equal_scores_and_nan_are_no_hits() -> None:
    own = torch.arange(4)
    same = F.normalize(torch.ones(4, 8), dim=1)
    assert first_ranks(same, same, own, own).tolist() == [3, 3, 3, 3]
    assert first_ranks(same * torch.nan, same, own, own).tolist() == [3, 3, 3, 3]
    assert first_ranks(torch.eye(4), torch.eye(4), own, own).tolist() == [0, 0, 0, 0]


@pytest.mark.slow
def test_the_memory_of_100000_items_does_not_grow_with_the_queries() -> None:
    """All scores of 4,000 queries would take 1.5 GiB. The chunks are those of 100,000 queries."""
    item = F.normalize(torch.randn(100_000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    number = torch.arange(len(item))
    before = anonymous_bytes()
    with PeakAnonymous() as peak:
        ranks = first_ranks(item[:4000], item, number, number[:4000])
    assert not ranks.any()
    assert peak.bytes - before < 1 << 30


def test_the_tool_writes_clip_benchmarks_schema_and_refuses_other_tasks(root: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=3)
    options = ("eval", "--model", f"local-dir:{model}", "--dataset-root", root, "--out", tmp_path, "--device", "cpu")
    said = run(*options)
    (file,) = tmp_path.glob("colours_*_zeroshot_retrieval.json")
    result = json.loads(file.read_text())
    assert result["dataset"] == "colours" and result["task"] == "zeroshot_retrieval" and str(file) in str(said)
    assert set(result["metrics"]) == {f"{of}_retrieval_recall@{k}" for of in ("image", "text") for k in (1, 5, 10)}
    said = run(*options, "--tasks", "knn", expect=2)
    assert f"--tasks has 'knn', but {root} is a retrieval set, expected some of retrieval" in said


def test_a_damaged_retrieval_set_is_one_error(clip: LoadedClip, tmp_path: Path) -> None:
    root = write_retrieval_set(tmp_path / "set")
    (root / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"holds 1 tars, .* says 2"):
        retrieval(clip, root, QUIET)
    blank = write_retrieval_set(tmp_path / "blank", [*CAPTIONS[:-1], [" "]])
    with pytest.raises(UserError, match="blank caption"):
        retrieval(clip, blank, QUIET)
