"""The builds of faiss that may be installed: none, one, or two whose files overwrite each other."""

from __future__ import annotations

import pytest

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
