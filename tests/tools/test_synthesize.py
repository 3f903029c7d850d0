import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from megacid.data.decode import decode_image
from megacid.data.index import ShardReader, load_index
from megacid.errors import UserError
from synthetic_data import MAX_CLUSTERS, SHAPES, SceneMaker, class_features, hashed_normals

ROOT = Path(__file__).resolve().parents[2]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthesize", ROOT / "tools" / "synthesize.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()
SCENES = ["--num", "90", "--clusters", "12", "--samples-per-shard", "40", "--size", "24", "--test-share", "0.1"]


def run(*args: object) -> int:
    return tool.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesize") / "digits"
    assert run("digits", "--out", out, "--shards", 3) == 0
    return out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesize") / "scenes"
    assert run("scenes", "--out", out, *SCENES) == 0
    return out


def train_samples(folder: Path) -> dict[str, dict]:
    """key -> json, with the decoded image as array."""
    index = load_index(folder)
    reader = ShardReader(index)
    samples = {}
    for shard in range(len(index.names)):
        for row, key in enumerate(index.table(shard).keys):
            sample = json.loads(reader.read(shard, row, "json"))
            assert sample["key"] == key and reader.read(shard, row, "text").decode() == sample["caption"]
            samples[key] = {**sample, "pixels": np.asarray(decode_image(reader.read(shard, row, "image")), int)}
    return samples


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def benchmark_images(folder: Path) -> list[tuple[bytes, int]]:
    """(pixels, class) read the way CLIP_benchmark reads: webdataset, nshards.txt, .png and .cls."""
    shards = int((folder / "nshards.txt").read_text())
    urls = [str(folder / f"{number}.tar") for number in range(shards)]
    raw = wds.WebDataset(urls, shardshuffle=False)
    return [(Image.open(io.BytesIO(s["png"])).convert("RGB").tobytes(), int(s["cls"])) for s in raw]


@pytest.mark.parametrize("kind,originals,copies", [("digits", 1438, 959), ("scenes", None, None)])
def test_sizes_meta_and_shards_agree(request: pytest.FixtureRequest, kind: str, originals: int | None, copies) -> None:
    out: Path = request.getfixturevalue(kind)
    index = load_index(out / "train")
    meta = json.loads((out / "train" / "meta.json").read_text())
    sizes = json.loads((out / "train" / "sizes.json").read_text())
    assert sizes == {f"{name}.tar": int(size) for name, size in zip(index.names, index.sizes)}
    assert meta["shards_digest"] == index.digest and meta["pairs"] == index.num_samples == sum(sizes.values())
    redundant = sum(sample["redundant"] for sample in train_samples(out / "train").values())
    assert (meta["originals"], meta["copies"]) == (meta["pairs"] - redundant, redundant)
    if originals is not None:
        assert (meta["originals"], meta["copies"]) == (originals, copies)
    assert meta["originals"] / meta["pairs"] == pytest.approx(0.6, abs=0.12 if kind == "scenes" else 0.001)


def test_webdataset_reads_the_training_shards(digits: Path) -> None:
    keys = []
    for url in sorted(map(str, (digits / "train").glob("*.tar"))):
        for sample in wds.WebDataset(url, shardshuffle=False):
            assert {"txt", "json"} < set(sample) and ("jpg" in sample) != ("png" in sample)
            keys.append(sample["__key__"])
    index = load_index(digits / "train")
    assert keys == [key for shard in range(3) for key in index.table(shard).keys]
    assert keys[0] == "000000000" and keys[-1] == f"00002{index.sizes[2] - 1:04d}"


@pytest.mark.parametrize("kind", ["digits", "scenes"])
def test_copies_look_like_their_origin_and_share_its_label(request: pytest.FixtureRequest, kind: str) -> None:
    samples = train_samples(request.getfixturevalue(kind) / "train")
    copies = [sample for sample in samples.values() if sample["redundant"]]
    changes = {sample["change"].split()[0] for sample in copies}
    assert changes == {"jpeg", "shift", "brightness"}
    for sample in samples.values():
        origin = samples[sample["origin"]]
        assert not origin["redundant"] and origin["label"] == sample["label"]
        assert sample["redundant"] == (sample["origin"] != sample["key"])
        if sample["change"].split()[0] == "jpeg":
            assert np.abs(sample["pixels"] - origin["pixels"]).mean() < 6
        if sample["change"].startswith("shift"):
            _, dx, dy = sample["change"].split()
            back = np.roll(sample["pixels"], (-int(dy), -int(dx)), (0, 1))
            assert np.abs(back - origin["pixels"]).mean() < 6
    assert len({sample["caption"] for sample in samples.values() if sample["label"] == 3}) > 2


def test_no_test_digit_is_among_the_training_pairs(digits: Path) -> None:
    test = benchmark_images(digits / "test" / "test")
    train = benchmark_images(digits / "test" / "train")
    assert len(test) == 359 and len(train) == 1438
    assert not {pixels for pixels, _ in test} & {pixels for pixels, _ in train}
    # The linear probe's images are the originals of the training pairs, nothing else.
    samples = train_samples(digits / "train").values()
    exact = {sample["pixels"].astype(np.uint8).tobytes() for sample in samples if not sample["redundant"]}
    png = sum(pixels in exact for pixels, _ in train)
    assert png > 600  # about half of the originals are stored without loss
    assert not any(pixels in exact for pixels, _ in test)


def test_a_validation_split_has_digits_of_its_own(digits: Path, tmp_path: Path) -> None:
    assert run("digits", "--out", tmp_path / "d", "--validation-share", 0.2) == 0
    parts = [
        {pixels for pixels, _ in benchmark_images(tmp_path / "d" / folder / split)}
        for folder, split in (("test", "test"), ("validation", "test"), ("validation", "train"))
    ]
    test, validation, train = parts
    assert len(test) == len(validation) == 359 and len(train) == 1079
    assert not test & validation and not validation & train and not test & train
    assert test == {pixels for pixels, _ in benchmark_images(digits / "test" / "test")}
    with pytest.raises(UserError, match=r"1\.1 in all, expected less than 1"):
        run("digits", "--out", tmp_path / "e", "--validation-share", 0.9)


def test_digits_split_is_stratified_and_named_as_the_benchmark_wants(digits: Path) -> None:
    root = digits / "test"
    counts = np.bincount([label for _, label in benchmark_images(root / "test")], minlength=10)
    assert counts.min() >= 35 and counts.max() <= 37
    assert (root / "classnames.txt").read_text().split() == list(tool.DIGITS)
    assert all("{c}" in line for line in (root / "zeroshot_classification_templates.txt").read_text().splitlines())
    assert (root / "dataset_type.txt").read_text().strip() == "classification"


@pytest.mark.parametrize("kind", ["digits", "scenes"])
def test_same_arguments_give_the_same_bytes(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    args = ["--shards", "3"] if kind == "digits" else SCENES
    assert run(kind, "--out", tmp_path / "again", *args) == 0
    assert tars(tmp_path / "again") == tars(request.getfixturevalue(kind))
    if kind == "scenes":
        assert run(kind, "--out", tmp_path / "other", *args, "--seed", 1) == 0
        assert tars(tmp_path / "other") != tars(tmp_path / "again")


def test_an_output_directory_is_reused_refused_or_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features"
    args = ["features", "--out", out, "--classes", 3, "--dim", 4, "--per-class", 2]
    assert run(*args) == 0
    stamp = (out / "meta.json").stat().st_mtime_ns
    assert run(*args) == 0 and "already exists" in capsys.readouterr().out
    assert (out / "meta.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="other arguments"):
        run(*args, "--seed", 1)
    assert run(*args, "--seed", 1, "--force") == 0
    assert json.loads((out / "meta.json").read_text())["source"]["seed"] == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this tool"):
        run("features", "--out", mine, "--classes", 3, "--force")
    assert (mine / "thesis.txt").exists()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "write_benchmark", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("scenes", "--out", tmp_path / "scenes", *SCENES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "x"])
def test_shares_are_checked(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=f"--redundancy is {value}, expected a finite number, 0 or more and below 1"):
        run("digits", "--out", tmp_path / "d", "--redundancy", value)


def test_scene_clusters_differ_and_captions_say_what_is_drawn() -> None:
    maker = SceneMaker(200, 0.3, 32, seed=5)
    scenes = [maker.scene(cluster) for cluster in range(200)]
    assert len(set(scenes)) == 200 and {scene.shape for scene in scenes} == set(SHAPES)
    assert sorted(maker.cluster(i) for i in range(200)) == list(range(200))
    for number in range(60):
        scene, caption = maker.scene(maker.cluster(maker.origin(number))), maker.caption(number)
        assert all(word in caption for word in scene)
    with pytest.raises(UserError, match=str(MAX_CLUSTERS)):
        SceneMaker(MAX_CLUSTERS + 1, 0.3, 32, seed=5)


def test_scene_shape_has_its_colour_and_place() -> None:
    maker = SceneMaker(MAX_CLUSTERS, 0.0, 48, seed=0)
    from synthetic_data import COLOURS, PLACES

    for number in range(80):
        scene = maker.scene(maker.cluster(number))
        pixels = np.asarray(maker.image(number), float)
        ink = np.abs(pixels - COLOURS[scene.colour]).sum(2) < 46  # jitter of at most 14 in each channel
        assert ink.any(), scene
        if scene.background not in ("grey", "sand"):
            y, x = np.argwhere(ink).mean(0) / 48
            assert np.hypot(x - PLACES[scene.place][0], y - PLACES[scene.place][1]) < 0.15, scene


def test_scene_origins_are_originals_and_test_images_are_new() -> None:
    train, test = (SceneMaker(10, 0.5 * (1 - stream), 24, 3, stream) for stream in (0, 1))
    origins = [train.origin(i) for i in range(2000)]
    assert all(o <= i and origins[o] == o for i, o in enumerate(origins))
    assert sum(o != i for i, o in enumerate(origins)) == pytest.approx(1000, abs=100)
    assert not {train.image(i).tobytes() for i in range(40)} & {test.image(i).tobytes() for i in range(40)}


@pytest.mark.parametrize("rows_per_file", [1000, 64])
def test_feature_files_hold_normalised_rows_of_their_class(tmp_path: Path, rows_per_file: int) -> None:
    out = tmp_path / "f"
    args = ["--classes", 50, "--dim", 32, "--per-class", 6, "--test-per-class", 2, "--noise", 0.4]
    assert run("features", "--out", out, *args, "--rows-per-file", rows_per_file) == 0
    split = {}
    for name, folder, total in (("train", out, 300), ("test", out / "test", 100)):
        paths = sorted((folder / "features").glob("*.npy")), sorted((folder / "labels").glob("*.npy"))
        assert len(paths[0]) == len(paths[1]) == -(-total // rows_per_file)
        x, y = (np.concatenate([np.load(path) for path in part]) for part in paths)
        assert x.dtype == np.float16 and y.dtype == np.int32 and x.shape == (total, 32)
        assert np.allclose(np.linalg.norm(x.astype(np.float32), axis=1), 1, atol=2e-3)
        assert (np.bincount(y, minlength=50) == total // 50).all()
        assert (np.diff(y) != 0).mean() > 0.9  # shuffled, not sorted by class
        split[name] = x.astype(np.float32), y
    (x, y), (tx, ty) = split["train"], split["test"]
    means = np.stack([x[y == c].mean(0) for c in range(50)])
    assert ((tx @ means.T).argmax(1) == ty).mean() > 0.95
    assert (tx @ x.T).max() < 0.9995  # no row of the test split is one of the training rows


def test_feature_rows_do_not_depend_on_their_neighbours() -> None:
    classes, samples = np.array([5, 999_999, 5]), np.array([0, 1, 2])
    rows = class_features(classes, samples, 7, 0.5, seed=1)
    assert np.array_equal(class_features(classes[1:2], samples[1:2], 7, 0.5, seed=1), rows[1:2])
    assert not np.array_equal(rows[0], rows[2])
    assert np.array_equal(
        class_features(classes, samples, 7, 0.0, 1)[0], class_features(classes, samples, 7, 0.0, 1)[2]
    )


def test_nuisance_lies_in_one_subspace_of_a_quarter_of_the_dimensions() -> None:
    classes, samples = np.arange(400) % 7, np.arange(400)
    plain, loud = (class_features(classes, samples, 32, 0.0, 1, nuisance) for nuisance in (0.0, 5.0))
    # Without noise the 7 centres span 7 dimensions; the nuisance adds exactly 8 and no more.
    assert np.linalg.matrix_rank(plain, tol=1e-3) == 7 and np.linalg.matrix_rank(loud, tol=1e-3) == 7 + 8
    assert (plain * loud).sum(1).mean() < 0.4
    assert np.array_equal(class_features(classes[3:4], samples[3:4], 32, 0.0, 1, 5.0), loud[3:4])


def test_hashed_normals_are_standard_and_independent() -> None:
    x = hashed_normals(np.arange(4000), 50, key=3)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.15
    correlation = np.corrcoef(x.T) - np.eye(50)
    assert np.abs(correlation).max() < 0.08
    assert np.abs(np.corrcoef(x[:50]) - np.eye(50)).max() < 0.65
    assert not np.array_equal(x, hashed_normals(np.arange(4000), 50, key=4))
