"""Stock open_clip must predict from an export what tools/eval.py measures on the run itself."""

import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import image_transform_v2
from PIL import Image

from megacid.checkpoint.saver import Saver
from megacid.errors import UserError, run_tool
from megacid.evaluate.datasets import load_benchmark
from megacid.evaluate.execution import Execution
from megacid.evaluate.export import export_student, student_from_run
from megacid.evaluate.zero_shot import class_embeddings, zero_shot
from megacid.models.clip import load_clip, preprocess_cfg, tokenizer_for
from megacid.models.student import build_student, loaded_student
from megacid.storage.metadata import read_meta

ROOT = Path(__file__).resolve().parents[2]
NAME = "export-test"
CLASSNAMES = ("red", "green", "blue", "yellow", "pink", "white", "black")
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (250, 120, 160), (230, 230, 230), (20, 20, 20))
CLASSES = len(CLASSNAMES)


def picture(label, generator):
    """40 x 36 pixels of one colour with so much noise that a barely trained model errs now and then."""
    noise = 90 * torch.randn(9, 10, 3, generator=generator)
    pixels = (torch.tensor(COLOURS[label]) + noise).clamp(0, 255).byte().numpy()
    return Image.fromarray(pixels).resize((40, 36))


@pytest.fixture(scope="module")
def trained():
    """A student after a few steps of CLIP training on colours: neither random nor constant."""
    student = build_student("digits-student", embed_dim=96, seed=5)
    transform, tokenizer = image_transform_v2(preprocess_cfg(student), is_train=False), tokenizer_for(student)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    text = tokenizer([f"a photo of something {name}." for name in CLASSNAMES])
    for _ in range(40):
        image = torch.stack([transform(picture(label, generator)) for label in range(CLASSES)])
        out = student(image, text)
        logits = out.logit_scale * out.image @ out.text.T
        loss = sum(torch.nn.functional.cross_entropy(side, torch.arange(CLASSES)) for side in (logits, logits.T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        student.clip.get_parameter("logit_scale").fill_(9.0)  # above the bound of training
    return student


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (root / split).mkdir()
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for row in range(60):
                buffer = io.BytesIO()
                picture(row % CLASSES, generator).save(buffer, "png")
                for name, data in (
                    (f"s{row:04d}.cls", str(row % CLASSES).encode()),
                    (f"s{row:04d}.png", buffer.getvalue()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (root / split / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("\n".join(CLASSNAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of something {c}.\na {c} thing\n")
    return root


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export_student(trained, out, name=NAME, source={"run": "test", "step": 1})
    return out


@pytest.fixture(scope="module")
def expected(trained, dataset):
    """The run's own zero-shot predictions."""
    return zero_shot(loaded_student(trained, "memory"), load_benchmark(dataset), Execution(batch_size=16)).top[:, 0]


def stock_predictions(model, transform, tokenizer, dataset):
    """Zero-shot predictions by open_clip alone; megacid only reads the images."""
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
    assert len(expected.unique()) == CLASSES  # a constant prediction would prove nothing
    assert model.logit_scale.shape == () and model.logit_scale.item() == pytest.approx(4.60517)


def test_the_pt_predicts_in_stock_open_clip_what_the_run_predicts(exported, dataset, expected):
    code = (
        "import sys, torch, open_clip\n"
        "directory, name, out = sys.argv[1:]\n"
        "open_clip.add_model_config(f'{directory}/{name}.json')\n"
        "model, _, transform = open_clip.create_model_and_transforms(name, pretrained=f'{directory}/{name}.pt')\n"
        "torch.save(model.state_dict(), out)\n"
    )
    # In its own process, without the architectures that megacid registers.
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
    embeddings = class_embeddings(loaded_student(trained, "memory"), benchmark)
    for clip in (load_clip(f"local-dir:{exported}"), load_clip(NAME, str(exported / f"{NAME}.pt"))):
        torch.testing.assert_close(class_embeddings(clip, benchmark), embeddings)
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


class EngineOfOneRank:
    """The part of the engine that `Saver` uses, for a student outside DeepSpeed; `offset` distinguishes checkpoints."""

    def __init__(self, student, offset):
        self.student, self.offset = student, offset

    def named_state(self):
        for name, parameter in self.student.named_parameters():
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            yield name, {"param": parameter.detach() + self.offset, **moments}

    def named_buffers(self):
        return {}


@pytest.fixture
def run(trained, tmp_path):
    """A run directory with two checkpoints, the newer one damaged."""
    directory = tmp_path / "digits-run"
    directory.mkdir()
    block = {"model": "digits-student", "embed_dim": 96, "image_size": None, "context_length": None}
    (directory / "config.json").write_text(json.dumps({"resolved": {"megacid": {"student": block}}}))
    for step in (10, 20):
        Saver(directory, keep_last=3).save(step, EngineOfOneRank(trained, step - 10), {}, (0, 0), {})
    victim = next((directory / "step-00000020").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:1000])
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
    with pytest.raises(UserError, match="not a run directory"):
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
    assert set(results) == {"zeroshot_classification", "linear_probe", "knn"}
    label_N = torch.arange(60) % CLASSES
    zero = results["zeroshot_classification"]
    assert zero["metrics"]["acc1"] == pytest.approx((expected == label_N).double().mean().item())
    assert set(zero["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert (zero["dataset"], zero["model"], zero["language"]) == ("noise", exported.name, "en")
    assert isinstance(zero["pretrained"], str)
    assert zero["metrics"]["acc1"] > 3 / CLASSES
    # `clip_benchmark build` makes one column of every metric: CLIP_benchmark's own names, and no nested value.
    probe = results["linear_probe"]["metrics"]
    assert set(probe) >= {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"} and "acc1" not in probe
    nearest = results["knn"]["metrics"]
    assert set(nearest) >= {"knn_acc1", "knn_acc5", "knn_mean_per_class_recall"} and nearest["knn_acc1"] > 3 / CLASSES
    values = (*probe.values(), *nearest.values(), *zero["metrics"].values())
    assert not any(isinstance(value, dict | list) for value in values)
    assert probe["lp_acc1"] > 3 / CLASSES and probe["converged"] is True and probe["train_samples"] > 0


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("eval", ["--model", "local-dir:/nowhere", "--dataset-root", "SET"], "/nowhere"),
        ("eval", ["--model", "local-dir:/nowhere", "--dataset-root", "SET", "--tasks", "zeroshot"], "zeroshot"),
        ("eval", ["--run", "/nowhere", "--dataset-root", "/no-set"], "/no-set"),
        ("eval", ["--model", "local-dir:/nowhere", "--dataset-root", "SET", "--ema"], "--ema is set without --run"),
        ("export", ["--run", "/nowhere"], "/nowhere"),
        ("export", ["--run", "/nowhere", "--step", "newest"], "newest"),
    ],
)
def test_tools_answer_a_bad_call_with_one_sentence_and_code_2(name, arguments, named, dataset, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    arguments = [str(dataset) if argument == "SET" else argument for argument in arguments]
    assert run_tool(lambda: main([*arguments, "--out", str(tmp_path)])) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and named in message and message.count("\n") == 1


def test_export_tool_writes_the_newest_valid_checkpoint_under_the_name_of_the_run(run, trained, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]
    assert main(["--run", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "step 10" in capsys.readouterr().out
    saved = torch.load(tmp_path / "out" / "digits-run.pt", weights_only=True)["state_dict"]
    assert torch.equal(saved["visual.proj"], trained.clip.state_dict()["visual.proj"])
    assert read_meta(tmp_path / "out", "export")["source"]["step"] == 10
