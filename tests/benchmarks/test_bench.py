"""tools/bench.py: wrong results end it, what was not measured meets no limit, and its float64 reference is right."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import classifier_providers, contrastive, head, head_gpu, measure, optimizer, suite, training_step
from benchmarks.classifier_providers import Shape
from benchmarks.float64_reference import exact_on_sample, sample_of
from benchmarks.head_peers import Case, Provider, loss_and_gradients
from benchmarks.suite import Limit
from megacid.classifier import head_step
from megacid.errors import UserError
from megacid_kernels.margin import Margin
from megacid_kernels.reference import discrimination_reference

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: resets the peak memory


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "bench", raising=False)
    import bench

    return bench


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, few calls, no separate processes: this runs the suites' code and is no measurement."""
    for module in (optimizer, contrastive, head_gpu):
        monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(measure, "_TURN_S", 0.0)

    def here(module: str, request: dict[str, Any], environment: Any) -> dict[str, Any]:
        answer: dict[str, Any] = importlib.import_module(module).answer(json.loads(json.dumps(request)))
        return answer

    monkeypatch.setattr(measure, "ask_process", here)
    if not CLEAR_REFS.exists():
        monkeypatch.setattr(measure, "peak_extra_bytes", lambda run, device: run() is None or 1)


def call(tool: ModuleType, *options: str) -> int:
    return int(tool.main(["--threads", str(torch.get_num_threads()), "--device", "cpu", *options]))


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_a_wrong_gradient_of_the_classifier_is_refused_before_any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = classifier_providers.Provider.row_grad
    classifier_providers.check_accuracy(["eager", "eager-tuned", "megacid"], CPU)
    monkeypatch.setattr(
        classifier_providers.Provider, "row_grad", lambda self: (right(self)[0], right(self)[1] * 1.001)
    )
    with pytest.raises(UserError, match="weight gradient of megacid on 1000 rows differs from float64"):
        classifier_providers.check_accuracy(["megacid"], CPU)


def test_the_provider_with_graphs_trains_as_the_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no graphs: what is captured is computed again."""
    captured: list[int] = []
    monkeypatch.setattr(head_step, "graph_pool", lambda weight: captured.append(1))
    monkeypatch.setattr(head_step, "capture", lambda function, pool: (function(), lambda: None))
    shape, losses = Shape(4000, 8, 20, 0.1), []
    for name in ("megacid", classifier_providers.GRAPH):
        weight = classifier_providers.class_rows(shape)
        provider = classifier_providers.make_provider(name, shape, weight, CPU, train=True)
        losses.append(float(provider.run(0)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and captured == [1]


def test_the_products_alone_are_computed_in_the_chunks_of_the_classifier() -> None:
    shape = Shape(40_000, 8, 500)
    weight = classifier_providers.class_rows(shape)
    products = classifier_providers.Products(shape, weight)
    assert len(products.chunks) > 1
    cosines = products.x.double() @ weight.double().T
    for got, exact in zip(products.compute(), (cosines @ weight.double(), cosines.T @ products.x.double())):
        assert measure.relative_error(got, exact) < 1e-5


def test_a_wrong_optimizer_step_is_refused(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    case = optimizer.Case(Shape(300, 16, 8, 0.2), CPU)
    monkeypatch.setattr(optimizer, "DECAY", 0.06)
    made = optimizer.rows_step(case, "adamw", "fp32")
    monkeypatch.setattr(optimizer, "DECAY", 0.05)
    with pytest.raises(UserError, match=r"first adamw step of rows .* differs from float64"):
        optimizer.check_accuracy("rows", case, "adamw", made)


def test_a_wrong_instance_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contrastive.PROVIDERS, "megacid", lambda *t: contrastive.materialised(*t[:4], t[4] * 1.001))
    with pytest.raises(UserError, match="of megacid differs from float64"):
        contrastive.check_accuracy(["megacid"], CPU)


@pytest.mark.parametrize("margin", [0.3, 0.0])
def test_float64_on_a_sample_is_the_reference(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.float64_reference._BLOCK_BYTES", 8 * 24 * 100)  # several blocks of classes
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (24, 310))
    target = torch.randint(310, (24,), generator=generator)
    target[1] = target[0]
    rows, classes = sample_of(target, 310, 12, seed=0)
    exact = exact_on_sample(x, w, target, rows, classes, scale=20.0, margin=margin, normalise=True)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss, _ = discrimination_reference(x, w, target, margin=Margin.cosface(margin), scale=20.0)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    assert set(classes.tolist()) & set(target.tolist()), "no label among the sampled classes"
    for value, want in ((exact.loss, loss.detach()), (exact.grad_x, x.grad[rows]), (exact.grad_w, w.grad[classes])):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-13)


# ---- the GPU's suite head, with the providers that a CPU can run ---------------------------------------------------

ON_CPU = [
    "cublas-3gemm",
    "cublas-1gemm",
    "eager",
    "eager-sync-free",
    "torch-eager",
    "torch-lce-tuned",
    "liger",
    "megacid-torch",
]


def small_case(block: str) -> Case:
    case_of = {case.block: case for case in head_gpu.cases(Shape(300, 64, 24), "init", 2 * 300 * 10, CPU)}
    return case_of[block]  # type: ignore[index]


@pytest.mark.parametrize("block", ["margin", "plain"])
def test_head_providers_agree_with_float64_and_are_timed(block: str, quick: None) -> None:
    timer = measure.timer_of(suite_args("head"))
    rows = {row["provider"]: row for row in head_gpu.measure_case(small_case(block), ON_CPU, timer, rounds=1)}
    assert set(rows) == {name for name in ON_CPU if block in head_gpu.PROVIDERS[name].blocks}
    for name, row in rows.items():
        if "skipped" in row:
            assert name in ("liger", "torch-lce-tuned") and row["skipped"].startswith("not installed"), row
            continue
        assert len(row["seconds"]) == 7 and row["tflops"] > 0
        assert row["same_bits"] == 1.0 or not name.startswith("megacid"), "ours promises equal bits"
        if not name.startswith("cublas"):
            assert row["dx_error"] < (1e-5 if name in ("eager", "megacid-torch") else 2e-2)
            assert row["dw_error"] < (1e-5 if name in ("eager", "megacid-torch") else 2e-2)


def test_the_products_alone_are_the_products(quick: None) -> None:
    case = small_case("plain")
    assert case.chunk == 10, "chunks: 10, 10 and 4 samples"
    grad_x, grad_w = head_gpu.PROVIDERS["cublas-3gemm"].make(case).run()
    x, w = (rows.detach() for rows in case.folded)
    matrix = (x @ w.T).double()
    assert measure.relative_error(grad_x, matrix @ w.double()) < 1e-5
    assert measure.relative_error(grad_w, matrix.T @ x.double()) < 1e-5


def _off(case: Case, factor: float) -> Any:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return discrimination_reference(x, w, case.target, margin=Margin.cosface(case.margin), scale=64.0)[0] * factor

    return loss_and_gradients(loss, case.x, case.w)


def test_an_inaccurate_head_of_ours_ends_the_bench_and_a_peers_is_shown(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    timer = measure.timer_of(suite_args("head"))
    wrong = Provider(lambda case: _off(case, 1.01), ("margin",), "one per cent off")
    monkeypatch.setitem(head_gpu.PROVIDERS, "torch-eager", wrong)
    (row,) = head_gpu.measure_case(small_case("margin"), ["torch-eager"], timer, rounds=1)
    assert row["accurate"] == 0.0 and row["dx_error"] == pytest.approx(0.01, rel=0.01)
    monkeypatch.setitem(head_gpu.PROVIDERS, "megacid-torch", wrong)
    with pytest.raises(UserError, match=r"dx_error 1\.0e-02 .* of megacid-torch at 300 x 64.*no speed is printed"):
        head_gpu.measure_case(small_case("margin"), ["megacid-torch"], timer, rounds=1)


def head_report(
    speeds: dict[str, float], *, shape: str = "131072,512,4096,1.0", block: str = "margin", extra: float = 1.0
) -> Any:
    """Seconds by provider, and the extra memory of all as a multiple of 2bC + 4CD."""
    matrix = 2 * 4096 * 131_072 + 4 * 131_072 * 512
    rows = [
        {"shape": shape, "block": block, "provider": name, "seconds": [each] * 3, "peak_extra_bytes": extra * matrix}
        for name, each in speeds.items()
    ]
    return {"suite": "head", "arguments": {"device": "cuda", "budget_gib": 20.0}, "results": rows, "machine": {}}


@pytest.mark.parametrize(
    ("speeds", "extra", "missed"),
    [
        (
            {"cublas-3gemm": 1.0, "megacid-fused": 1.3, "megacid-in-place": 1.19, "eager": 9.0, "eager-sync-free": 6.3},
            1.04,
            [],
        ),
        ({"cublas-3gemm": 1.0, "megacid-fused": 1.26, "eager": 9.0}, 1.0, ["cuBLAS"]),
        ({"cublas-3gemm": 1.0, "megacid-fused": 1.2, "eager": 9.0, "eager-sync-free": 5.9}, 1.0, ["eager"]),
        ({"cublas-3gemm": 1.0, "megacid-fused": 1.2, "eager": 9.0}, 1.06, ["memory"]),
        ({"megacid-fused": 1.2}, 1.0, ["cuBLAS", "eager"]),
    ],
)
def test_limits_of_the_head_on_a_gpu(speeds: dict[str, float], extra: float, missed: list[str]) -> None:
    limits = head.check(head_report(speeds, extra=extra))
    assert len(limits) == 3
    words = ("cuBLAS", "memory", "eager")
    assert [next(word for word in words if word in limit.what) for limit in limits if not limit.met] == missed


def test_a_peer_counts_by_its_faster_form_and_one_not_installed_meets_no_limit() -> None:
    report = head_report({"megacid-fused": 1.0, "liger": 3.0, "liger-tuned": 0.9, "torch-lce": 2.0}, block="plain")
    for name, reason in (("cce", "not installed: x"), ("cce-unfiltered", "out of memory")):
        row = {"shape": "131072,512,4096,1.0", "block": "plain", "provider": name, "skipped": reason}
        report["results"].append(row)
    limits = {limit.what.split()[-1]: limit for limit in head.check(report)}
    assert limits["torch-lce"].met and not limits["liger"].met and not limits["cce"].met
    report["results"][-2]["skipped"] = "its chunks would take 99 s"  # slower than every peer that finishes
    assert "cce" not in {limit.what.split()[-1] for limit in head.check(report)}


# ---- memory and bits ---------------------------------------------------------------------------------------------

KNOWN_PEAK = """
import torch
from benchmarks.measure import peak_extra_bytes
kept = torch.ones(32 << 18)

def iterate(mib):
    torch.ones(mib << 18)  # freed at once: the peak is the larger one, not the sum
    buffer = torch.ones(mib << 17)
    torch.ones(mib << 17)

iterate(256)  # a warm-up larger than the measured iteration must not hide it
cpu = torch.device("cpu")
print(peak_extra_bytes(lambda: iterate(64), cpu), peak_extra_bytes(lambda: None, cpu))
"""


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's memory statistics")
def test_extra_memory_finds_a_known_peak() -> None:
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")])}
    environment = {**os.environ, **measure.RETURN_FREED, **paths}
    done = subprocess.run([sys.executable, "-c", KNOWN_PEAK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, nothing = map(int, done.stdout.split())
    assert peak == pytest.approx(64 << 20, rel=0.1)
    assert nothing < 8 << 20, "the warm-up's 256 MiB must not show; huge pages round up"


def test_a_separate_process_answers_or_its_last_error_is_the_reason() -> None:
    request = {"name": "megacid", "shape": [64, 16], "device": "cpu", "threads": 1}
    answer = measure.ask_process("benchmarks.contrastive", request, measure.RETURN_FREED)
    assert list(answer) == ["peak_extra_bytes"]
    assert "No module named" in measure.ask_process("json.nothing", {}, {})["skipped"]


def test_a_digest_sees_one_bit_and_its_place() -> None:
    x = torch.arange(1000.0)
    y, z = x.clone(), x.flip(0)
    y.view(torch.int32)[17] ^= 1
    assert measure.digest([x]) == measure.digest([x.clone()])
    assert len({measure.digest([each]) for each in (x, y, z, x.bfloat16())}) == 4


# ---- reports, comparison, calls ----------------------------------------------------------------------------------


def suite_args(name: str, **options: Any) -> Any:
    return argparse.Namespace(suite=name, device="cpu", clock="wall", threads=1, **options)


def test_what_is_not_a_number_meets_no_limit() -> None:
    assert [Limit("x", value, 1.0, True).met for value in (1.0, 0.9, None, float("nan"))] == [True, False, False, False]
    assert [Limit("x", value, 1.0, False).met for value in (1.0, 1.1, None, float("nan"))] == [
        True,
        False,
        False,
        False,
    ]


def test_figures_are_named_by_what_was_not_measured() -> None:
    rows = [
        {"shape": "1,2", "k": 4, "seconds": [3.0, 1.0, 2.0], "peak": 5.0, "of_it": None},
        {"shape": "1,2", "k": 8, "skipped": "no room", "seconds": [1.0]},
    ]
    assert suite.figures(rows) == {"shape 1,2, k 4: seconds": 2.0, "shape 1,2, k 4: peak": 5.0}


def cpu_report(name: str, speed: float, memory: float) -> Any:
    """A report in which megacid is `speed` times as fast as eager and takes `memory` of its extra memory."""
    eager = {"shape": "10,4,2,1.0", "provider": "eager", "seconds": [speed] * 5, "peak_extra_bytes": 1000.0}
    ours = {"shape": "10,4,2,1.0", "provider": "megacid", "seconds": [1.0] * 5, "peak_extra_bytes": 1000 * memory}
    return {"suite": name, "results": [eager, ours], "arguments": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("name", "speed", "memory", "met"),
    [
        ("head", 1.6, 0.3, True),
        ("head", 1.4, 0.3, False),
        ("head", 1.6, 0.4, False),
        ("step", 4.1, 2.0, True),
        ("step", 3.9, 0.1, False),
    ],
)
def test_limits_of_the_classifier_on_a_cpu(name: str, speed: float, memory: float, met: bool) -> None:
    report = cpu_report(name, speed, memory)
    assert all(limit.met for limit in (head if name == "head" else training_step).check(report)) is met
    report["results"][0] = {"shape": "10,4,2,1.0", "provider": "eager", "skipped": "needs 99 GiB"}
    assert not any(limit.met for limit in training_step.check(report)), "an unmeasured limit is met"


def test_optimizer_limits_need_a_gpu_and_contrastive_limits_large_batches() -> None:
    rows = [
        {"shape": "9,4,2,0.1", "optimizer": "adamw", "provider": "kernel", "moments": "fp32", "copy_fraction": 0.74}
    ]
    assert [limit.met for limit in optimizer.check({"arguments": {"device": "cuda"}, "results": rows})] == [False]
    assert optimizer.check({"arguments": {"device": "cpu"}, "results": rows}) == []
    rows = [
        {"shape": f"{g},4", "provider": "megacid", "peak_extra_bytes": share * 4 * g * g}
        for g, share in ((512, 9.0), (8192, 0.9), (16_384, 1.1))
    ]
    assert [limit.met for limit in contrastive.check({"results": rows})] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "head", "--shapes", "10,4,2"], "classes,width,batch,rate"),
        (["--suite", "step", "--shapes", "10,4,2,1.5"], "rate at most 1"),
        (["--suite", "contrastive", "--shapes", "10"], "batch,width"),
        (["--suite", "head", "--repeats", "3"], "at least 5"),
        (["--suite", "head", "--compare", "/nowhere.json"], "is not a result of this tool"),
        (["--suite", "scale", "--check"], "suite scale has no limits"),
        (["--suite", "head", "--analytic", "--check"], "measures nothing"),
        (["--suite", "head", "--providers", "eager"], "has no effect with --device cpu"),
        (["--suite", "head", "--analytic", "--repeats", "1", "--geometry", "init"], "--geometry is given"),
        (["--suite", "head", "--threads", "0"], "--threads is 0"),
    ],
)
def test_a_bad_call_names_what_was_expected(tool: ModuleType, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(tool, *options)


def test_the_head_on_a_gpu_refuses_unknown_providers_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    args = suite_args("head", providers=["egaer"], geometry="init", budget_gib=20.0)
    with pytest.raises(UserError, match="has 'egaer', expected some of cublas-3gemm"):
        head_gpu.run(args, [Shape(10, 4, 2)])
    with pytest.raises(UserError, match="takes all rows"):
        head_gpu.run(args, [Shape(10, 4, 2, 0.5)])


def test_a_gpu_that_is_not_there_is_named(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        tool.main(["--suite", "head", "--device", "cuda"])


def test_computed_costs_are_labelled_and_stay_out_of_reports(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert call(tool, "--suite", "head", "--analytic", "--json", str(out)) == 0
    assert json.loads(out.read_text())["results"] == []
    output = capsys.readouterr().out
    assert "Nothing in these two tables was measured" in output
    # 6 x 4096 x 131072 x 512 FLOP at 780 TFLOP/s
    assert "| 131,072 x 512, batch 4096, 131,072 rows | 1.65 | 2.11 |" in output


def test_every_suite_says_what_it_is(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for name, module in tool.MODULES.items():
        with pytest.raises(SystemExit) as end:
            tool.main(["--suite", name, "--help"])
        suite_module = importlib.import_module(f"benchmarks.{module}")
        assert end.value.code == 0 and suite_module.HELP in capsys.readouterr().out
        assert callable(suite_module.run) and callable(suite_module.check)


def test_step_once_compared_with_itself(
    tool: ModuleType, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out.json", ["--suite", "step", "--shapes", "3000,16,8,0.5"]
    monkeypatch.setitem(training_step.LIMITS, "step", (math.inf, None))
    assert call(tool, *options, "--json", str(out), "--check") == 1
    rows = {row["provider"]: row for row in json.loads(out.read_text())["results"]}
    assert list(rows) == ["eager", "eager-tuned", "megacid"]
    assert all(len(row["seconds"]) == 7 and "peak_extra_bytes" in row for row in rows.values())
    assert "MISSED" in capsys.readouterr().out
    old = suite.read_report(out, "step")
    with pytest.raises(UserError, match="is of suite step, expected scale"):
        suite.read_report(out, "scale")
    old["arguments"]["repeats"] = 9
    suite.print_comparison(json.loads(out.read_text()), old)
    differences, figures = capsys.readouterr().out.split("compared with the earlier file")
    assert differences.splitlines()[0] == "compare: --repeats was 9, is 7" and "provider megacid: seconds" in figures


@pytest.mark.parametrize(
    ("name", "options", "providers"),
    [
        ("head", ["--shapes", "2000,16,8,1"], {"eager", "eager-tuned", "megacid", "3gemm"}),
        ("scale", ["--shapes", "2000,16,8,0.5"], {"eager", "megacid"}),
        ("optimizer", ["--shapes", "2000,16,8,0.2"], {"rows", "rows-decay", "kernel", "dense", "dense-S"}),
        ("contrastive", ["--shapes", "64,16"], {"megacid", "materialised"}),
    ],
)
def test_each_suite_once(
    tool: ModuleType, tmp_path: Path, quick: None, name: str, options: list[str], providers: set[str]
) -> None:
    out = tmp_path / "out.json"
    assert call(tool, "--suite", name, *options, "--json", str(out)) == 0
    rows = json.loads(out.read_text())["results"]
    assert {row["provider"] for row in rows} == providers
    for row in rows:
        assert ("skipped" in row) == (row["provider"] == "kernel"), row
        assert "skipped" in row or min(row["seconds"]) > 0
