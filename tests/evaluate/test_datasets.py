import io
import tarfile

import pytest
import torch
from PIL import Image

from megacid.errors import UserError
from megacid.evaluate.datasets import load_benchmark

SIZE = 8


def to_tensor(image):
    return torch.tensor(image.getpixel((0, 0))).float()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(grey):
    buffer = io.BytesIO()
    Image.new("L", (SIZE, SIZE), grey).save(buffer, "png")
    return buffer.getvalue()


def write_split(directory, shards):
    """shards: one list of (grey value, text of the .cls) per tar."""
    directory.mkdir(parents=True)
    for number, samples in enumerate(shards):
        with tarfile.open(directory / f"{number}.tar", "w") as tar:
            for row, (grey, label) in enumerate(samples):
                add(tar, f"s{row:07d}.cls", label.encode())
                add(tar, f"s{row:07d}.png", grey if isinstance(grey, bytes) else png(grey))
    (directory / "nshards.txt").write_text(f"{len(shards)}\n")


@pytest.fixture
def root(tmp_path):
    write_split(tmp_path / "set" / "test", [[(10, "0"), (20, "1")], [(30, "2"), (40, "0"), (50, "1")]])
    (tmp_path / "set" / "classnames.txt").write_text("zero\nice cream\ntwo {x}\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_all_tars_come_in_order_with_their_classes(root, workers):
    split = load_benchmark(root).split("test", to_tensor)
    batches = list(split.batches(2, workers=workers))
    assert [len(label) for _, label in batches] == [2, 2, 1]
    assert torch.cat([image[:, 0] for image, _ in batches]).tolist() == [10, 20, 30, 40, 50]
    assert torch.cat([label for _, label in batches]).tolist() == [0, 1, 2, 0, 1]


def test_names_and_templates_are_read_line_by_line(root):
    benchmark = load_benchmark(root)
    assert (benchmark.name, benchmark.num_classes) == ("set", 3)
    assert benchmark.classnames == ["zero", "ice cream", "two {x}"] and benchmark.templates == ["a photo of {c}."]
    assert load_benchmark(root, "other").name == "other"


def spoil_classnames(root):
    (root / "classnames.txt").write_text("zero\none\n")


def spoil_gap(root):
    (root / "classnames.txt").write_text("zero\n\ntwo\n")


def spoil_template(root):
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {}.\n")


def spoil_type(root):
    (root / "dataset_type.txt").write_text("retrieval\n")


def spoil_tar(root):
    (root / "test" / "1.tar").unlink()


def spoil_count(root):
    (root / "test" / "nshards.txt").unlink()


def spoil_templates(root):
    (root / "zeroshot_classification_templates.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_classnames, r"1\.tar, sample s0000000: class id is 2.*names 2 classes"),
        (spoil_gap, r"classnames\.txt has an empty line"),
        (spoil_template, r"placeholder \{c\}"),
        (spoil_type, "retrieval"),
        (spoil_tar, r"holds 1 tars.*says 2"),
        (spoil_count, r"nshards\.txt is missing"),
        (spoil_templates, r"templates\.txt is missing"),
    ],
)
def test_a_set_that_does_not_hold_together_is_refused_by_name(root, spoil, named):
    spoil(root)
    with pytest.raises(UserError, match=named):
        list(load_benchmark(root).split("test", to_tensor).batches(8))


def test_missing_directories_are_named(root):
    with pytest.raises(UserError, match="nowhere"):
        load_benchmark(root / "nowhere")
    with pytest.raises(UserError, match="train is missing"):
        load_benchmark(root).split("train", to_tensor)


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        ([(10, "0"), (b"no image", "1")], "sample s0000001 cannot be evaluated"),
        ([(10, "0"), (20, "cat")], "class is b'cat'"),
        ([(10, "0"), (20, "-1")], "class is b'-1'"),
    ],
)
def test_a_bad_sample_stops_the_evaluation_instead_of_leaving_it_out(root, samples, named):
    write_split(root / "val", [samples])
    with pytest.raises(UserError, match=named):
        list(load_benchmark(root).split("val", to_tensor).batches(8))
