"""What stock open_clip makes of an export must be what tools/eval.py measures on the run itself."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megacid.checkpoint.store import make_stage, publish, read_meta, write_tensors
from megacid.config import UserError
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.export import export_student, student_from_run
from megacid.evaluate.zero_shot import class_embeddings, zero_shot
from megacid.student import build_student, load_clip, loaded_student

ROOT = Path(__file__).resolve().parents[2]
NAME = "export-test"
CLASSES = 7


@pytest.fixture(scope="module")
def trained():
    """A student whose every tensor differs from what any seed gives, with its own embedding width and a hot logit_scale."""
    student = build_student("digits-student", embed_dim=96, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        student.clip.get_parameter("logit_scale").fill_(9.0)
    return student


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 coloured noise pictures; the classes are arbitrary, what matters is that predictions agree one by one."""
    root = tmp_path_factory.mktemp("set")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (root / split).mkdir()
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for row in range(60):
                pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((40, 36)).save(buffer, "png")
                for name, data in (
                    (f"s{row:04d}.cls", str(row % CLASSES).encode()),
                    (f"s{row:04d}.png", buffer.getvalue()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (root / split / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("\n".join("zero one two three four five six".split()) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of the digit {c}.\nthe number {c}\n")
    return root


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export_student(trained, out, name=NAME, source={"run": "test", "step": 1})
    return out


@pytest.fixture(scope="module")
def expected(trained, dataset):
    """The run's own zero-shot predictions."""
    return zero_shot(loaded_student(trained, "memory"), load_benchmark(dataset), batch_size=16).top[:, 0]


def stock_predictions(model, transform, tokenizer, dataset):
    """Zero-shot with nothing of megacid but the reader of the pictures."""
    benchmark = load_benchmark(dataset)
    templates = [template.replace("{c}", "{}") for template in benchmark.templates]
    model.eval()
    with torch.no_grad():
        class_DC = open_clip.build_zero_shot_classifier(model, tokenizer, benchmark.classnames, templates)
        images = torch.cat([image for image, _ in benchmark.split("test", transform).batches(16)])
        return (model.encode_image(images, normalize=True) @ class_DC).argmax(dim=1)


def test_the_directory_predicts_in_stock_open_clip_what_the_run_predicts(exported, dataset, expected):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    assert torch.equal(stock_predictions(model, transform, tokenizer, dataset), expected)
    assert len(expected.unique()) > 1  # a model that always says the same class would prove nothing
    assert model.logit_scale.shape == () and model.logit_scale.item() == pytest.approx(4.60517)


def test_the_pt_predicts_in_stock_open_clip_what_the_run_predicts(exported, dataset, expected):
    code = (
        "import sys, torch, open_clip\n"
        "directory, name, out = sys.argv[1:]\n"
        "open_clip.add_model_config(f'{directory}/{name}.json')\n"
        "model, _, transform = open_clip.create_model_and_transforms(name, pretrained=f'{directory}/{name}.pt')\n"
        "torch.save(model.state_dict(), out)\n"
    )
    # In a process of its own, so that nothing that megacid registered can help.
    out = exported.parent / "from_pt.pt"
    subprocess.run([sys.executable, "-c", code, str(exported), NAME, str(out)], check=True, capture_output=True)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}", load_weights=False)
    model.load_state_dict(torch.load(out, weights_only=True))
    assert torch.equal(
        stock_predictions(model, transform, open_clip.get_tokenizer(f"local-dir:{exported}"), dataset), expected
    )


def test_the_pt_is_weights_only_safe_and_holds_the_student_alone(exported, trained):
    content = torch.load(exported / f"{NAME}.pt", weights_only=True)
    assert set(content) == {"epoch", "name", "state_dict"}
    assert set(content["state_dict"]) == set(trained.clip.state_dict())
    assert content["state_dict"]["logit_scale"].shape == ()
    assert all(value.dtype == torch.float32 for value in content["state_dict"].values())


def test_both_artefacts_load_through_load_clip_with_the_same_class_embeddings(exported, trained, dataset):
    open_clip.add_model_config(exported / f"{NAME}.json")
    benchmark = load_benchmark(dataset)
    wanted = class_embeddings(loaded_student(trained, "memory"), benchmark)
    for clip in (load_clip(f"local-dir:{exported}"), load_clip(NAME, str(exported / f"{NAME}.pt"))):
        torch.testing.assert_close(class_embeddings(clip, benchmark), wanted)
        assert clip.embed_dim == 96


def test_meta_is_written_last_and_removed_first(trained, tmp_path, monkeypatch):
    export_student(trained, tmp_path, name=NAME, source={"run": "old"})
    assert read_meta(tmp_path, "export")["source"] == {"run": "old"}

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("megacid.evaluate.export.write_json_atomic", no_space)
    with pytest.raises(OSError, match="no space"):
        export_student(trained, tmp_path, name=NAME, source={"run": "new"})
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(tmp_path, "export")


@pytest.mark.parametrize("name", ["../x", "", "ViT-B-32", "my-siglip"])
def test_names_that_would_break_or_be_taken_for_another_model_are_refused(trained, tmp_path, name):
    with pytest.raises(UserError, match="export name"):
        export_student(trained, tmp_path / "out", name=name, source={})
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A run directory with two checkpoints, the newer one damaged; only the reader of its tensors is replaced."""
    directory = tmp_path / "digits-run"
    directory.mkdir()
    block = {"model": "digits-student", "embed_dim": 96, "image_size": None, "context_length": None}
    (directory / "config.json").write_text(json.dumps({"resolved": {"megacid": {"student": block}}}))
    for step in (10, 20):
        stage = make_stage(directory, step)
        tensors = {key: value + (step - 10) for key, value in trained.clip.state_dict().items()}
        publish(directory, stage, step, [write_tensors(stage, "student.safetensors", tensors)], {}, keep_last=3)
    (directory / "step-00000020" / "student.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(
        "megacid.evaluate.export.load_student_tensors", lambda path: load_file(path / "student.safetensors")
    )
    return directory


def test_the_newest_valid_checkpoint_is_used_and_a_damaged_one_is_named(run, trained):
    student, step = student_from_run(run)
    assert step == 10
    assert torch.equal(student.clip.state_dict()["visual.proj"], trained.clip.state_dict()["visual.proj"])
    with pytest.raises(UserError, match="step-00000020"):
        student_from_run(run, 20)
    with pytest.raises(UserError, match="step-00000030"):
        student_from_run(run, 30)


def test_a_run_whose_configuration_does_not_fit_or_is_missing_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        student_from_run(tmp_path)
    config = run / "config.json"
    config.write_text(config.read_text().replace("96", "64"))
    with pytest.raises(UserError, match="does not fit"):
        student_from_run(run)


def tool(name, *arguments):
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_eval_writes_what_clip_benchmark_reads_and_says_how_it_probed(exported, dataset, expected, tmp_path):
    done = tool(
        "eval",
        "--model",
        f"local-dir:{exported}",
        "--dataset-root",
        dataset,
        "--out",
        tmp_path,
        "--dataset-name",
        "noise",
    )
    assert done.returncode == 0, done.stderr
    results = {
        result["task"]: result for result in (json.loads(f.read_text()) for f in sorted(tmp_path.glob("*.json")))
    }
    assert set(results) == {"zeroshot_classification", "linear_probe"}
    label_N = torch.arange(60) % CLASSES
    zero = results["zeroshot_classification"]
    assert zero["metrics"]["acc1"] == pytest.approx((expected == label_N).double().mean().item())
    assert set(zero["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert (zero["dataset"], zero["model"], zero["language"]) == ("noise", exported.name, "en")
    assert isinstance(zero["pretrained"], str)
    assert "L-BFGS" in results["linear_probe"]["probe"]["fit"]


def test_tools_answer_a_bad_call_with_one_sentence_and_code_2(dataset, tmp_path):
    for name, arguments, named in (
        ("eval", ("--model", "local-dir:/nowhere", "--dataset-root", dataset, "--out", tmp_path), "/nowhere"),
        ("export", ("--run", tmp_path / "none", "--out", tmp_path), "none"),
    ):
        done = tool(name, *arguments)
        assert done.returncode == 2 and done.stderr.count("error:") == 1 and named in done.stderr
        assert "Traceback" not in done.stderr
