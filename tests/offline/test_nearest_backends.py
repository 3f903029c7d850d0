"""The builds of faiss that may be installed: none, one, or two whose files overwrite each other."""

from __future__ import annotations

import pytest

from megacid.errors import UserError
from megacid.offline import nearest

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
    if message is None:
        nearest.check_backend(backend)
    else:
        with pytest.raises(UserError, match=message):
            nearest.check_backend(backend)
