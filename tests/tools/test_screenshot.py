"""Pictures of curves: what is missing is one error, and with a browser TensorBoard's page becomes a picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import screenshot
from megacid.errors import UserError


def test_a_missing_browser_and_a_directory_without_curves_are_one_error_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"none of chromium, .* is installed"):
            screenshot.main([str(tmp_path), str(out)])
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(UserError, match="has no TensorBoard files"):
        screenshot.main([str(tmp_path), str(out)])
    with pytest.raises(UserError, match="took no picture"):
        screenshot.take("/bin/false", "http://127.0.0.1:1/", out)
    assert not out.exists()


@pytest.mark.slow
def test_the_picture_shows_the_curves(tmp_path: Path) -> None:
    if not any(map(shutil.which, screenshot.BROWSERS)):
        pytest.skip("no browser")
    pictures = []
    for name, slope in (("up", 1.0), ("down", -1.0)):
        with SummaryWriter(str(tmp_path / name / "tensorboard")) as writer:
            for step in range(1, 51):
                writer.add_scalar("train/loss", slope * step, step)
        assert screenshot.main([str(tmp_path / name), str(tmp_path / f"{name}.png")]) == 0
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (1650, 1020)
            pictures.append(picture.convert("RGB"))
    colours = [len(picture.getcolors(1 << 20)) for picture in pictures]
    assert min(colours) > 20 and pictures[0].tobytes() != pictures[1].tobytes()
