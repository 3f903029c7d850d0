"""The backend of the search for nearest centroids, and the builds of faiss that may be installed."""

from __future__ import annotations

import pytest
import torch

from megacid.errors import UserError
from megacid.offline import nearest
from megacid.offline.cluster.state import KMeansSettings

TWO = r"faiss-cpu and faiss-gpu-cuvs are both installed, expected one build of faiss.*pip uninstall faiss-cpu faiss-gpu"


@pytest.mark.parametrize(
    ("builds", "backend", "message"),
    [
        (["faiss-gpu-cuvs", "faiss-cpu"], "auto", TWO),
        (["faiss-gpu-cuvs", "faiss-cpu", "faiss-cpu"], "faiss", TWO),
        ([], "faiss", "faiss is not installed: pip install faiss-cpu, or take --backend torch"),
        (["faiss-gpu-cuvs", "faiss-cpu"], "torch", None),
        (["faiss-cpu", "faiss-cpu"], "auto", None),
        ([], "auto", None),
    ],
)
def test_two_builds_of_faiss_are_refused_where_faiss_may_be_used(
    monkeypatch: pytest.MonkeyPatch, builds: list[str], backend: str, message: str | None
) -> None:
    monkeypatch.setattr(nearest.metadata, "packages_distributions", lambda: {"faiss": builds})
    monkeypatch.setattr(nearest, "_faiss_builds", nearest._faiss_builds.__wrapped__)
    if message is None:
        nearest.check_backend(backend)
    else:
        with pytest.raises(UserError, match=message):
            nearest.check_backend(backend)


@pytest.mark.parametrize(
    ("dim", "has_faiss", "by_onednn", "expected"),
    [(128, True, False, "faiss"), (128, True, True, "torch"), (128, False, False, "torch"), (64, True, False, "torch")],
)
def test_auto_takes_faiss_for_wide_rows_unless_torch_multiplies_by_onednn(
    dim: int, has_faiss: bool, by_onednn: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "onednn_is_faster", lambda: by_onednn)
    monkeypatch.setattr(nearest.importlib.util, "find_spec", lambda name: object() if has_faiss else None)
    assert nearest.chosen_backend("auto", torch.device("cpu"), dim) == expected


def test_packages_are_searched_once_since_every_cell_of_a_clustering_checks_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(nearest.metadata, "packages_distributions", lambda: calls.append(1) or {"faiss": ["faiss-cpu"]})
    nearest._faiss_builds.cache_clear()
    try:
        for _ in range(3):
            KMeansSettings(k=2)
        assert len(calls) == 1
    finally:
        nearest._faiss_builds.cache_clear()
