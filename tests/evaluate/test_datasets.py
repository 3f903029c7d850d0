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


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"], ids=lambda s: f"U+{ord(s):04X}"
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_line_separator_of_unicode_inside_a_name_does_not_shift_the_class_ids(root, separator, ending):
    names = ["zero", f"ice{separator}cream", f"two{separator}"]
    templates = [f"a photo{separator}of {{c}}.", "{c}"]
    (root / "classnames.txt").write_bytes(ending.join([*names, ""]).encode())
    (root / "zeroshot_classification_templates.txt").write_bytes(ending.join(templates).encode())
    benchmark = load_benchmark(root)
    assert benchmark.classnames == [name.rstrip("\r") for name in names] and benchmark.templates == templates


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_with_a_byte_order_mark_are_read_as_without(root, encoding):
    for file in ("classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"):
        (root / file).write_bytes((root / file).read_text().replace("cream", "crème").encode(encoding))
    (root / "dataset_type.txt").write_bytes("classification\n".encode(encoding))
    write_split(root / "val", [[(10, "1")]])
    with tarfile.open(root / "val" / "0.tar", "w") as tar:
        add(tar, "a.png", png(10))
        add(tar, "a.cls", "1\n".encode(encoding))
    benchmark = load_benchmark(root)
    assert benchmark.classnames == ["zero", "ice crème", "two {x}"] and benchmark.templates == ["a photo of {c}."]
    assert len(benchmark.split("test", to_tensor)) == 5 and benchmark.split("val", to_tensor)[0][1] == 1


@pytest.mark.parametrize(
    "file", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt", "dataset_type.txt"]
)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("2\n{c} crème\n".encode("latin1"), "line 2 holds byte 0xe8, expected UTF-8: convert"),
        ("{c}\n".encode("utf-16le"), "holds a zero character, expected UTF-8: convert"),
        ("\ufeff{c}".encode("utf-8-sig")[:3] + b"a\n\xff", "line 2 holds byte 0xff"),
    ],
    ids=["latin1", "utf-16 without mark", "mark and latin1"],
)
def test_a_text_file_in_another_encoding_is_named_in_one_line(root, file, content, named):
    (root / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} {named}") as error:
        load_benchmark(root).split("test", to_tensor)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [["", "far", "near"], ["near", "", "far"], ["near", " ", "far"]])
def test_a_class_with_an_empty_name_keeps_its_id_and_is_named(root, names, caplog):
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    assert load_benchmark(root).classnames == [name.strip() for name in names]
    assert f"the classes {[name.strip() for name in names].index('')} have an empty name" in caplog.text


def test_class_ids_are_numbers_of_a_bounded_length(root):
    write_split(root / "val", [[(10, "1" * 5000)]])
    with pytest.raises(UserError, match="sample s0000000: class is"):
        list(load_benchmark(root).split("val", to_tensor).batches(8))


def spoil_classnames(root):
    (root / "classnames.txt").write_text("zero\none\n")


def spoil_gap(root):
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n\nthe {c}\n")


def spoil_names(root):
    (root / "classnames.txt").write_text("\n \n")


def spoil_shard_number(root):
    (root / "test" / "nshards.txt").write_text("9" * 5000)


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
        (spoil_gap, r"templates\.txt line 2 is '', expected the placeholder"),
        (spoil_names, r"classnames\.txt has no lines"),
        (spoil_shard_number, r"nshards\.txt is missing or not a number"),
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
