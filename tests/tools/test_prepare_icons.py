"""tools/prepare_icons.py on small packages: what is left out, splits, families, restarts, sets, bad input."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from icon_package import SHAPES, icon_set, iconify_sets, write_fonts, write_iconify
from offline_data import run as run_tool_inside
from offline_data import save_model
from PIL import Image

import prepare_icons as tool
from icon_names import concept_of, stem_of, style_words, system_of
from icon_report import nearest_rows
from icon_sets import HELD_OUT, SPLITS
from icon_tars import Renderer, TarContent, TarJob, make_tar
from megacid import failpoints
from megacid.data.index import ShardReader, load_index
from megacid.errors import UserError

pytest.importorskip("resvg_py")
ALL = ("--size", 16, "--pairs-per-tar", 4)


def run(package: Path, out: Path, *more: object) -> int:
    return tool.main([str(arg) for arg in ("--package", package, "--out", out, *ALL, "--workers", 1, *more)])


def pairs_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "pairs.parquet").to_pylist()


def made_files(out: Path) -> dict[str, bytes]:
    """All that must not depend on how the corpus was made."""
    paths = [path for path in out.rglob("*") if path.is_file() and "index" not in path.parts]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in paths
        if path.name not in ("meta.json", "settings.json")
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_iconify(tmp_path_factory.mktemp("package") / "iconify-json-1.2.3.tgz")


@pytest.fixture(scope="module")
def corpus(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "icons"
    assert run(package, out) == 0
    return out


def test_sets_without_a_free_licence_are_left_out_and_named(corpus: Path) -> None:
    summary = json.loads((corpus / "summary.json").read_text())
    assert summary["left_out"] == {
        "secret": {"licence": "none", "icons": 5},
        "shared": {"licence": "GPL-3.0", "icons": 1},
    }
    used = {pair["set"] for pair in pairs_of(corpus)}
    assert used == {"bi", "iconoir", "pixelarticons", "tabler", "temaki"}
    page = (corpus / "ATTRIBUTION.md").read_text()
    for prefix in used:
        assert f"| {prefix} | {prefix.title()} | Author of {prefix} |" in page
    assert "secret" not in page and "shared" not in page


def test_icons_that_do_not_render_are_counted_and_named(corpus: Path, package: Path, tmp_path: Path) -> None:
    summary = json.loads((corpus / "summary.json").read_text())
    assert set(summary["no_picture"]) == {"tabler:broken", "tabler:blank"}
    assert summary["no_picture"]["tabler:blank"] == "blank picture" and summary["no_picture"]["tabler:broken"]
    assert summary["no_caption"] == ["tabler:null"]  # the loader takes it for a missing value
    total = sum(len(stored["icons"]) for name, stored in iconify_sets().items() if name not in ("secret", "shared"))
    assert summary["pairs"] == len(pairs_of(corpus)) == total - 3


def test_tars_are_pairs_that_the_loader_reads(corpus: Path) -> None:
    by_key = {pair["key"]: pair for pair in pairs_of(corpus)}
    seen = []
    for split in SPLITS:
        index = load_index(corpus / split)
        assert not index.dropped
        reader = ShardReader(index)
        for shard in range(len(index.names)):
            for row, key in enumerate(index.table(shard).keys):
                pair = by_key[key]
                seen.append(key)
                assert pair["split"] == split and reader.caption(shard, row) == pair["caption"]
                assert key[:5] == index.names[shard] and pair["caption"] == pair["name"].replace("-", " ")
                with Image.open(io.BytesIO(reader.read(shard, row, "image"))) as picture:
                    assert picture.size == (16, 16)
    assert sorted(seen) == sorted(by_key) == [pair["key"] for pair in pairs_of(corpus)]


def test_a_wide_icon_is_in_the_middle_of_a_white_square(corpus: Path) -> None:
    key = next(pair["key"] for pair in pairs_of(corpus) if pair["set"] == "temaki")
    with Image.open(io.BytesIO(tool.PictureReader(corpus)(key))) as picture:
        dark = np.argwhere(np.asarray(picture.convert("L")) < 128)
    assert dark[:, 0].min() >= 4 and dark[:, 0].max() <= 11  # 20 of 40 units high
    assert np.abs(dark.mean(0) - 7.5).max() < 1


def test_a_design_system_is_in_one_split(corpus: Path) -> None:
    splits: dict[str, set[str]] = {}
    for pair in pairs_of(corpus):
        splits.setdefault(pair["design_system"], set()).add(pair["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert splits["bi"] == {"test"} and splits["iconoir"] == {"validation"} and splits["tabler"] == {"train"}


@pytest.mark.parametrize("kind", list(HELD_OUT))
def test_validation_and_test_share_no_system(kind: str) -> None:
    validation, test = (set(getattr(HELD_OUT[kind], split).split()) for split in SPLITS[1:])
    assert validation and test and not validation & test
    assert {system_of(prefix) for prefix in ("lucide", "feather", "fa6-solid", "la")} == {"lucide", "font-awesome"}


def test_families_concepts_and_equal_pictures_are_recorded(corpus: Path) -> None:
    pairs = {f"{pair['set']}:{pair['name']}": pair for pair in pairs_of(corpus)}
    assert pairs["tabler:bell"]["family"] == pairs["tabler:bell-filled"]["family"] == "tabler:bell"
    assert pairs["bi:bell"]["family"] == pairs["bi:bell-fill"]["family"] != pairs["tabler:bell"]["family"]
    names = "tabler:bell", "tabler:bell-filled", "bi:bell", "bi:bell-fill", "pixelarticons:bell-2"
    assert {pairs[name]["concept"] for name in names} == {"bell"}
    assert pairs["pixelarticons:house"]["concept"] == "home" and pairs["iconoir:cog"]["concept"] == "settings"
    assert pairs["tabler:traffic-light"]["concept"] == "traffic light"
    assert pairs["tabler:house"]["picture"] == pairs["tabler:home"]["picture"]
    assert pairs["tabler:bell"]["picture"] != pairs["tabler:bell-filled"]["picture"]
    summary = json.loads((corpus / "summary.json").read_text())
    # Of 16 training pairs: 5 drawings in two styles; `house` and `home` have equal pictures.
    train = [pair for pair in pairs.values() if pair["split"] == "train"]
    assert summary["redundancy"]["families"] == len({pair["family"] for pair in train})
    assert summary["redundancy"]["share_in_families"] == round(10 / len(train), 4)
    assert summary["redundancy"]["equal_pictures"] == round(
        1 - len({pair["picture"] for pair in train}) / len(train), 4
    )


def test_styles_are_told_from_other_meanings_of_a_word() -> None:
    styled = [f"{name}-{style}" for name in "abcdef" for style in ("line", "bold")]
    assert {"line", "bold", "outline"} <= style_words(styled, [])
    assert "light" not in style_words([*styled, "traffic-light", "street-light"], [])
    assert "night" in style_words(styled, ["two-night"])
    assert stem_of("two-tone-bell-off-24-filled", {"24", "filled"}, {"twotone"}) == "bell-off"
    assert stem_of("outline", {"outline"}) == "outline"
    assert concept_of("arrow-left-2") == "arrow left" and concept_of("360") == "360"


@pytest.mark.parametrize("folder", [False, True], ids=["three workers", "folder"])
def test_bytes_depend_neither_on_workers_nor_on_packing(
    corpus: Path, package: Path, tmp_path: Path, folder: bool
) -> None:
    if folder:
        assert run(write_iconify(tmp_path / "unpacked"), tmp_path / "again") == 0
    else:
        assert run(package, tmp_path / "again", "--workers", 3) == 0
    assert made_files(tmp_path / "again") == made_files(corpus)


def kill_after(tars: int) -> None:
    def hook(number: int) -> None:
        if number == tars:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hooks["icons:tar"] = hook


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_run_continues_and_ends_with_the_same_bytes(
    corpus: Path, package: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "icons"
    if (child := os.fork()) == 0:
        kill_after(2)
        run(package, out, "--workers", workers)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("[0-9]*.tar")}  # not those that were being written
    assert len(kept) >= 2 and not (out / "meta.json").exists()
    cut = min(kept)
    cut.write_bytes(cut.read_bytes()[:700])  # as a crash of the machine may leave it
    assert run(package, out) == 0
    assert made_files(out) == made_files(corpus)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items() if path != cut)
    assert "cpu_seconds" in json.loads((corpus / "meta.json").read_text())
    assert "cpu_seconds" not in json.loads((out / "meta.json").read_text())  # it would leave out the killed run
    stamp = (out / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(package, out) == 0 and "is complete" in capsys.readouterr().out
    assert (out / "summary.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="was made with size 16, this run has 24"):
        run(package, out, "--size", 24)


def test_an_interrupt_ends_the_workers_and_keeps_finished_tars(
    corpus: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    def first_tar_alone(job: TarJob, renderer: Renderer) -> TarContent:
        if job.path.name != "00000.tar":
            time.sleep(600)
        return make_tar(job, renderer)

    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        patch.setitem(failpoints.hooks, "icons:tar", interrupt)
        patch.setattr("icon_tars.make_tar", first_tar_alone)
        with pytest.raises(KeyboardInterrupt):
            run(package, tmp_path / "icons", "--workers", 2)
    assert set(multiprocessing.active_children()) == before
    assert [path.name for path in (tmp_path / "icons").rglob("*.tar")] == ["00000.tar"]
    assert run(package, tmp_path / "icons") == 0 and made_files(tmp_path / "icons") == made_files(corpus)


def test_tars_of_other_held_out_systems_or_renderers_are_not_reused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(package, tmp_path / "icons") == 0
    with monkeypatch.context() as patch:
        patch.setattr(tool, "renderer_version", lambda kind: "resvg-py 0.0.1")
        with pytest.raises(UserError, match=r"was made with renderer 'resvg-py .*', this run has 'resvg-py 0\.0\.1'"):
            run(package, tmp_path / "icons")
    swapped = HELD_OUT["iconify"]._replace(test="pixelarticons")
    monkeypatch.setitem(HELD_OUT, "iconify", swapped)
    with pytest.raises(UserError, match="was made with plan"):
        run(package, tmp_path / "icons")


def members_of(root: Path) -> dict[str, bytes]:
    with tarfile.open(root / "0.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_classification_sets_score_concepts_on_held_out_systems(corpus: Path) -> None:
    pairs, read = pairs_of(corpus), tool.PictureReader(corpus)
    # In this package a class is drawn by all systems of a split: tabler, pixelarticons and temaki share two concepts.
    for split, classes, pictures in (("test", ["bell", "home"], 3), ("validation", ["home"], 1)):
        root = corpus / f"concepts-{split}"
        assert (root / "classnames.txt").read_text().split() == classes
        for part, source in (("train", "train"), ("test", split)):
            members = members_of(root / part)
            labels = {name.partition(".")[0]: int(data) for name, data in members.items() if name.endswith(".cls")}
            assert len(labels) == (pictures if part == "test" else 3 * len(classes))
            for name, label in labels.items():
                drawn = [p["key"] for p in pairs if p["split"] == source and p["concept"] == classes[label]]
                assert members[f"{name}.png"] in [read(key) for key in drawn]


def test_seldom_sets_have_the_concepts_that_fewer_training_systems_draw(corpus: Path) -> None:
    # Of the three training systems tabler alone draws these; the heart of bi is a training picture.
    assert (corpus / "seldom-test" / "classnames.txt").read_text().split() == ["camera", "star"]
    pairs, read = pairs_of(corpus), tool.PictureReader(corpus)
    for part in ("train", "test"):
        members = members_of(corpus / "seldom-test" / part)
        labels = {name.partition(".")[0]: int(data) for name, data in members.items() if name.endswith(".cls")}
        assert sorted(labels.values()) == [0, 1]
        for name, label in labels.items():
            concept = ("camera", "star")[label]
            drawn = [p["key"] for p in pairs if p["split"] == part and p["concept"] == concept]
            assert members[f"{name}.png"] in [read(key) for key in drawn]
    assert not (corpus / "seldom-validation").exists(), "its only other concept is in no training system"
    assert set(json.loads((corpus / "summary.json").read_text())["evaluation_sets"]) >= {"concepts-test", "seldom-test"}


def test_retrieval_sets_have_each_caption_and_picture_once(corpus: Path) -> None:
    pairs = pairs_of(corpus)
    for split in SPLITS[1:]:
        assert (corpus / f"retrieval-{split}" / "dataset_type.txt").read_text() == "retrieval\n"
        members = members_of(corpus / f"retrieval-{split}" / "test")
        captions = sorted(data.decode() for name, data in members.items() if name.endswith(".txt"))
        drawn = [data for name, data in members.items() if name.endswith(".png")]
        assert len(drawn) == len(set(drawn)) == len(captions) == len({caption.lower() for caption in captions})
        # The heart of the test split is also a training picture; its picture `sparkle` is also its star.
        expected = {p["caption"] for p in pairs if p["split"] == split} - {"heart", "sparkle", "star"}
        assert set(captions) - {"sparkle", "star"} == expected
        assert len(captions) == len(expected) + (split == "test")
    pictures = {f"{pair['set']}:{pair['name']}": pair["picture"] for pair in pairs}
    assert pictures["bi:heart"] == pictures["tabler:heart-filled"]
    assert pictures["bi:star"] == pictures["bi:sparkle"]


def test_the_evaluation_tool_reads_both_kinds_of_sets(corpus: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=3)
    for name in ("concepts-test", "retrieval-test"):
        run_tool_inside(
            *("eval", "--model", f"local-dir:{model}", "--dataset-root", corpus / name, "--out", tmp_path / "results"),
            *("--device", "cpu"),
        )
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert {(result["dataset"], result["task"]) for result in results} == {
        *(("concepts-test", task) for task in ("zeroshot_classification", "linear_probe", "knn")),
        ("retrieval-test", "zeroshot_retrieval"),
    }


def test_nearest_rows_are_those_of_a_full_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icon_report._BLOCK", 7)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 9)).astype(np.uint8)
    pixels[3] = pixels[30]
    queries, base = np.array([3, 5, 39]), np.arange(2, 40)
    unit = pixels / np.linalg.norm(pixels.astype(float), axis=1, keepdims=True)
    cosine = unit[queries] @ unit[base].T
    cosine[queries[:, None] == base] = -1
    rows, values = nearest_rows(pixels, queries, base)
    assert rows.tolist() == base[cosine.argmax(1)].tolist() and rows[0] == 30
    assert values == pytest.approx(cosine.max(1), abs=1e-5)


@pytest.fixture(scope="module")
def font_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fonts")
    assert run(write_fonts(root / "qtawesome-9.9-py3-none-any.whl"), root / "out") == 0
    return root / "out"


def test_fonts_of_a_wheel_are_drawn_by_pillow(font_corpus: Path) -> None:
    summary = json.loads((font_corpus / "summary.json").read_text())
    assert summary["package"] == {"kind": "fonts", "version": "9.9"}
    assert summary["no_picture"] == {"msc:nothing": "the font has no such glyph"}
    assert summary["left_out"] == {"mystery": {"licence": "none", "icons": 0}}
    pairs = {f"{pair['set']}:{pair['name']}": pair for pair in pairs_of(font_corpus)}
    assert {pair["split"] for pair in pairs.values() if pair["set"] == "ri"} == {"validation"}
    assert pairs["ph:home"]["family"] == pairs["ph:home-fill"]["family"]
    read = tool.PictureReader(font_corpus)
    for pair in pairs.values():
        with Image.open(io.BytesIO(read(pair["key"]))) as picture:
            dark = np.argwhere(np.asarray(picture.convert("L")) < 200)
        assert picture.size == (16, 16) and len(dark) > 8
        assert np.abs((dark.min(0) + dark.max(0)) / 2 - 7.5).max() <= 1.5  # in the middle
    assert len({read(pair["key"]) for pair in pairs.values()}) == len(pairs)


# ---- bad input ------------------------------------------------------------------------------------------------------


def without(prefix: str) -> dict[str, Any]:
    return {name: stored for name, stored in iconify_sets().items() if name != prefix}


def test_a_cut_or_foreign_package_is_one_error(package: Path, tmp_path: Path) -> None:
    cut, text, wheel = tmp_path / "cut.tgz", tmp_path / "notes.txt", tmp_path / "other.whl"
    cut.write_bytes(package.read_bytes()[:-200])
    text.write_text("no package")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("numpy/core.py", "")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (cut, "cannot be read .*: download the package again"),
        (text, "cannot be read .*: download the package again"),
        (wheel, "has neither collections.json nor fonts"),
        (tmp_path / "empty", "has neither collections.json nor fonts"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    unpacked = write_iconify(tmp_path / "unpacked")
    for damage, message in (
        ('{"prefix": "tabler"', "json/tabler.json is not JSON"),
        ('{"prefix": "tabler"}', "json/tabler.json is not in IconifyJSON's format .KeyError"),
        ("[]", "json/tabler.json holds list"),
    ):
        (unpacked / "json" / "tabler.json").write_text(damage)
        with pytest.raises(UserError, match=message):
            run(unpacked, tmp_path / "out")
    (unpacked / "json" / "tabler.json").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 7 sets .* json/tabler.json"):
        run(unpacked, tmp_path / "out")


def test_a_package_without_held_out_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no free icon for the split test"):
        run(write_iconify(tmp_path / "a.tgz", without("bi")), tmp_path / "out")
    alone = {**without("bi"), "bi": icon_set("bi", "MIT", {"camera": SHAPES["camera"]})}
    with pytest.raises(UserError, match=r"no concept of one word .* split test"):
        run(write_iconify(tmp_path / "b.tgz", alone), tmp_path / "out")


def test_a_killed_worker_is_one_error(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icon_tars.make_tar", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process of 2 was killed"):
        run(package, tmp_path / "out", "--workers", 2)
