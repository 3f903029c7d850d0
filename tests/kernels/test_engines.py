"""Both engines under every plan: Triton against float64 and PyTorch, slabs and losses alone against a stored gradient,
the classifier's step through Triton, several ranks.

Without a GPU the comparisons run in Triton's interpreter, see `interpreter.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from interpreter import assert_holds_in_the_interpreter, on_devices
from torch import Tensor

from megacid import Margin, PartialFC, RowAdamW, RowSGD
from megacid.distributed.collectives import rank, world_size
from megacid.errors import UserError
from megacid_kernels import Discrimination, Gradients, LossSpec, Weights, discrimination_with_gradients
from megacid_kernels.engines import torch_engine, triton_engine
from megacid_kernels.engines.torch_engine import TorchBlock
from megacid_kernels.fused import INTERPRET, tiles_for
from megacid_kernels.fused.gemm import product_fp32
from megacid_kernels.fused.row_statistics import pitched, with_padding
from megacid_kernels.fused.tuning import TABLE_VARIABLE, as_json

in_pytorch = pytest.mark.skipif(INTERPRET, reason="runs in the outer process")

BATCH, CLASSES, WIDTH = 24, 150, 48
# Largest relative Frobenius error of the gradients, by the dtype of the first product's factors.
GATES = {"fp16": 2.5e-3, "bf16": 5e-3, "fp32": 5e-6}
# weights, labels per sample, bias, filter
TERMS: dict[str, tuple[Weights, int, bool, float | None]] = {
    "alpha": (Weights(), 1, False, None),
    "alpha, bias, filter": (Weights(), 1, True, 0.3),
    "several labels": (Weights(0.7), 3, False, 0.3),
    "alpha, beta": (Weights(0.5, 0.7), 1, True, None),
    "beta, several, filter": (Weights(0.0, 1.0), 3, False, 0.3),
    "all at temperature 1": (Weights(1.0, 0.5, 0.5), 1, False, 0.3),
    "all at temperature 2": (Weights(0.4, 0.6, 1.0, 2.0), 1, True, 0.3),
}


if not INTERPRET:

    def test_every_comparison_holds_in_the_interpreter() -> None:
        assert_holds_in_the_interpreter(__file__, timeout_s=500)


def inputs(labels: int, bias: bool, classes: int = CLASSES) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(7)
    w = torch.randn(classes, WIDTH, generator=g) * torch.logspace(-1, 1, classes)[:, None]
    target = torch.randint(-1, classes, (BATCH, labels), generator=g)
    target[0], target[5], target[9] = 3, 3, -1  # one class twice, a sample without any
    unit = w / w.norm(dim=1, keepdim=True)
    x = 5 * unit[target[:, 0].clamp_min(0)] + torch.randn(BATCH, WIDTH, generator=g)
    teacher = 6 * unit[target[:, -1].clamp_min(0)] + torch.randn(BATCH, WIDTH, generator=g)
    offset = torch.rand(classes, generator=g) * 2 if bias else None
    return {"x": x, "w": w, "target": target if labels > 1 else target[:, 0], "teacher": teacher, "bias": offset}


def in_float64(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}


def call(spec: LossSpec, given: dict[str, Tensor | None], device: str = "cpu", **options: Any) -> Gradients:
    moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in given.items()}
    x, w, target = (moved.pop(name) for name in ("x", "w", "target"))
    return discrimination_with_gradients(x, w, target, spec, **moved, **options)


def spec_of(name: str, **changes: Any) -> LossSpec:
    weights, _, _, threshold = TERMS[name]
    given = {"scale": 20.0, "margin": Margin(m2=0.3, m3=0.1), "weights": weights, "filter_threshold": threshold}
    return LossSpec(num_classes=CLASSES, **(given | changes))


def relative(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None
    return float((got.cpu().double() - expected.cpu().double()).norm() / expected.double().norm().clamp_min(1e-3))


def assert_near(got: Gradients, expected: Gradients, gate: float, what: str) -> None:
    for name, a, b in (
        ("x", got.x, expected.x),
        ("w", got.w, expected.w),
        ("raw", got.result.raw, expected.result.raw),
    ):
        error = relative(a, b)
        assert error <= gate, f"{what}: {name} is off by {error:.1e} of its norm, gate {gate:.1e}"


@on_devices
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_zero_rows_under_an_angle_are_those_of_float64(weight_grad: str, device: str) -> None:
    given = inputs(1, False)
    x, w, target = (given[name] for name in ("x", "w", "target"))
    assert x is not None and w is not None and target is not None
    x[[0, 2]], w[target[[2, 3]].clamp_min(0)], target[3] = 0.0, 0.0, 7
    exact = call(spec_of("alpha"), in_float64(given))
    got = call(spec_of("alpha", impl="triton", weight_grad=weight_grad), given, device)
    assert_near(got, exact, GATES["fp16"], "zero rows")


@on_devices
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp16") for name in TERMS), ("all at temperature 2", "bf16"), ("alpha, bias, filter", "fp32")],
)
def test_every_term_is_within_its_gate_of_float64(name: str, precision: str, device: str) -> None:
    given = inputs(*TERMS[name][1:3])
    exact = call(spec_of(name), in_float64(given))
    got = call(spec_of(name, impl="triton", precision=precision), given, device)
    assert_near(got, exact, GATES[precision], name)
    result, expected = got.result, exact.result
    torch.testing.assert_close(result.target_cosine.cpu().double(), expected.target_cosine, rtol=0, atol=1e-6)
    near = (result.largest_negative.cpu().double() - expected.largest_negative).nan_to_num(0, 0, 0).abs().max()
    assert float(near) < {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-6}[precision]
    assert torch.equal(result.removed.cpu(), expected.removed)
    if precision == "fp32":  # PyTorch's engine in float32 must pass the same gate
        assert_near(call(spec_of(name), given), exact, GATES["fp32"], name)


@on_devices
@pytest.mark.parametrize("name", ["alpha, bias, filter", "all at temperature 2"])
def test_chunks_slabs_and_losses_alone_change_nothing_but_the_order_of_sums(name: str, device: str) -> None:
    """In fp32, where the order of sums changes 1e-7; and two runs in fp16 are equal bit for bit."""
    given = inputs(*TERMS[name][1:3])
    whole = call(spec_of(name, impl="triton", precision="fp32"), given, device)
    budget = CLASSES * 4 * (75 if TERMS[name][0].gamma else 22)  # 17 samples
    chunks = spec_of(name, impl="triton", precision="fp32", memory_budget_bytes=budget)
    assert_near(call(chunks, given, device), whole, 2e-6, "chunks")
    slabs = spec_of(name, impl="triton", precision="fp32", weight_grad="recomputed", memory_budget_bytes=40_000)
    in_slabs = call(slabs, given, device)
    assert_near(in_slabs, whole, 2e-6, "slabs")
    # No chunk of 8 samples fits, so "auto" takes slabs, and returns the whole gradient.
    small = {"impl": "triton", "precision": "fp32", "memory_budget_bytes": budget * 9 // 20}
    auto, named = (call(spec_of(name, weight_grad=mode, **small), given, device) for mode in ("auto", "recomputed"))
    assert named.each_slab is not None and torch.equal(auto.w, named.w) and torch.equal(auto.x, named.x)
    assert auto.each_slab is None  # it would keep the rows and the matrices of the chunk
    with pytest.raises(ValueError, match="expected at least 8"):
        call(spec_of(name, weight_grad="stored", **small), given, device)
    alone = call(slabs, given, device, need_x=False, need_w=False)
    assert alone.x is None and alone.w is None
    torch.testing.assert_close(alone.result.raw, whole.result.raw, rtol=1e-6, atol=1e-6)
    assert torch.equal(alone.result.removed, whole.result.removed)
    if name != "alpha, bias, filter":
        return
    half = spec_of(name, impl="triton")
    first, again = (call(half, given, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first.result, first.x, first.w), (*again.result, again.x, again.w)))


@on_devices
def test_cosines_by_cublas_give_what_the_fused_product_gives(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, spec = inputs(1, True), spec_of("alpha, beta", impl="triton")
    fused = call(spec, given, device)
    architecture = "interpreter"
    if device == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    entry = dataclasses.replace(tiles_for(torch.device(device), torch.float16, WIDTH), matrix="in-place")
    (tmp_path / "table.json").write_text(as_json({(architecture, "float16", WIDTH): entry}))
    assert json.loads((tmp_path / "table.json").read_text())[0]["matrix"] == "in-place"
    monkeypatch.setenv(TABLE_VARIABLE, str(tmp_path / "table.json"))

    def with_nan(*given: Any) -> Tensor:  # memory may hold anything: the padding must not enter the products
        cos = pitched(*given)
        with_padding(cos).view(torch.int16).fill_(-1)  # NaN in fp16 and in bf16
        return cos

    monkeypatch.setattr(triton_engine, "pitched", with_nan)
    assert_near(call(spec, given, device), fused, 3e-3, "in place")


@on_devices
@pytest.mark.parametrize(("weight_grad", "budget", "pieces"), [("stored", CLASSES * 2 * 20, 2), ("recomputed", 0, 2)])
def test_gradient_products_of_any_number_of_rows_have_aligned_sizes(
    weight_grad: str, budget: int, pieces: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS is up to six times slower where the number of rows is no multiple of 8."""
    sizes: list[tuple[int, ...]] = []
    product = triton_engine.product_fp32

    def noted(a_mk: Tensor, b_kn: Tensor, total: Tensor | None = None) -> Tensor:
        sizes.append(tuple(a_mk.shape))
        assert total is None or len(total) == len(a_mk)
        return product(a_mk, b_kn, total)

    monkeypatch.setattr(triton_engine, "product_fp32", noted)
    spec = spec_of("alpha", impl="triton", weight_grad=weight_grad, memory_budget_bytes=budget or 50_000)
    grads = call(spec, inputs(1, False), device)
    assert grads.w is not None and grads.w.shape == (CLASSES, WIDTH) and CLASSES % 8 and grads.w.is_contiguous()
    assert len(sizes) == 2 * pieces, sizes
    for x_product, w_product in zip(sizes[::2], sizes[1::2]):
        assert x_product == w_product[::-1] and w_product[0] % 16 == 0, sizes


@on_devices
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_rows_read_in_place_equal_rows_passed_as_a_matrix(weight_grad: str, device: str) -> None:
    """Also: x's gradient is complete when announced; slabs cover the whole gradient and are reproduced bit for bit."""
    given = inputs(1, False)
    rows = torch.unique(torch.cat([given["target"].clamp_min(0), torch.arange(0, CLASSES, 2)]))  # type: ignore[union-attr]
    spec = spec_of("alpha", impl="triton", weight_grad=weight_grad, memory_budget_bytes=20_000)
    picked = call(spec, given | {"w": given["w"][rows]}, device, rows=rows.to(device))  # type: ignore[index]
    announced: list[Tensor] = []
    slabs: list[tuple[int, int, Tensor]] = []
    grads = call(
        spec, given, device, rows=rows.to(device), gather=True, on_grad_x=lambda grad: announced.append(grad.clone()),
        on_grad_slab=lambda start, stop, grad: slabs.append((start, stop, grad.clone())),
    )  # fmt: skip
    assert torch.equal(grads.x, picked.x) and torch.equal(announced[0], picked.x) and len(announced) == 1
    assert grads.w is None and torch.equal(torch.cat([grad for *_, grad in slabs]), picked.w)
    assert [start for start, *_ in slabs] == [0, *(stop for _, stop, _ in slabs[:-1])] and slabs[-1][1] == len(rows)
    assert (len(slabs) > 1) == (weight_grad == "recomputed") == (grads.each_slab is not None)
    if grads.each_slab is not None:
        again: list[Tensor] = []
        grads.each_slab(lambda start, stop, grad: again.append(grad.clone()))
        assert all(torch.equal(a, b) for a, (*_, b) in zip(again, slabs))


@on_devices
def test_empty_shards_and_batches_are_computed(device: str) -> None:
    given = inputs(1, False)
    empty_shard = given | {"w": given["w"][:0], "target": torch.full((BATCH,), -1)}  # type: ignore[index]
    for weight_grad in ("stored", "recomputed"):
        spec = spec_of("alpha", impl="triton", weight_grad=weight_grad)
        out = call(spec, empty_shard, device)
        assert float(out.result.loss) == 0 and out.w.shape == (0, WIDTH) and not out.x.any()
        empty = {k: None if t is None else t if k == "w" else t[:0] for k, t in given.items()}
        out = call(spec, empty, device)
        assert out.x.shape == (0, WIDTH) and not out.w.any()


@on_devices
def test_a_budget_too_small_for_tensor_cores_is_refused(device: str) -> None:
    with pytest.raises(
        ValueError, match="memory_budget_bytes is 900, which allows chunks of 3 samples with 150 class rows"
    ):
        call(spec_of("alpha", impl="triton", memory_budget_bytes=900), inputs(1, False), device)


@on_devices
@pytest.mark.parametrize(("has_mm", "has_addmm"), [(False, False), (True, False), (True, True)])
def test_products_of_16_bits_are_those_of_float64_with_any_torch(
    has_mm: bool, has_addmm: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks along the long side of either factor. (On a CPU there is one implementation.)"""
    from megacid_kernels.fused import gemm

    if (has_mm and not gemm._HAS_MM) or (has_addmm and not gemm._HAS_ADDMM):
        pytest.skip("this torch has no such product")
    for name, value in (("_HAS_MM", has_mm), ("_HAS_ADDMM", has_addmm), ("_BLOCK_BYTES", 4 * 60)):
        monkeypatch.setattr(gemm, name, value)
    g = torch.Generator().manual_seed(0)
    for m, k, n in ((3, 50, 7), (50, 3, 7)):
        a = torch.randn(m, k, generator=g).bfloat16().to(device)
        b = torch.randn(n, k, generator=g).bfloat16().to(device).T
        total = torch.ones(m, n, device=device)
        expected = a.double() @ b.double()
        torch.testing.assert_close(product_fp32(a, b).double(), expected, rtol=1e-5, atol=1e-5)
        assert product_fp32(a, b, total) is total
        torch.testing.assert_close(total.double(), expected + 1, rtol=1e-5, atol=1e-5)


@on_devices
@pytest.mark.parametrize(("optimizer", "lazy", "moments"), [(RowAdamW, "decay", "bf16"), (RowSGD, "none", "fp32")])
def test_steps_of_the_classifier_through_triton_are_those_in_pytorch(
    optimizer: Any, lazy: str, moments: str, device: str
) -> None:
    given, results = inputs(1, False), []
    recomputed = {"impl": "triton", "weight_grad": "recomputed", "memory_budget_bytes": 20_000}
    padded = {"impl": "triton", "static_shapes": True}
    for options in ({"impl": "torch"}, {"impl": "triton"}, recomputed, padded, recomputed | padded):
        head = PartialFC(CLASSES, WIDTH, sample_rate=0.4, init=given["w"], scale=20.0, device=device, **options)  # type: ignore[arg-type]
        rows = optimizer(head, lr=0.02, lazy=lazy, moments=moments)
        x = given["x"].to(device).requires_grad_()  # type: ignore[union-attr]
        for step in range(2):
            head.set_step(step)
            loss = head(x, given["target"])
            loss.backward()
            norm = head.grad_norm_sq()
            rows.step(grad_scale=torch.tensor(0.5, device=device))
            rows.zero_grad()
        results.append((loss.detach().cpu(), norm.cpu(), x.grad.cpu(), head.weight.cpu()))
    for got in results[1:]:
        torch.testing.assert_close(got[:2], results[0][:2], rtol=1e-3, atol=1e-4)
        assert relative(got[2], results[0][2]) < 2.5e-3 and relative(got[3], results[0][3]) < 1e-3
    assert all(relative(got[3], results[1][3]) < 1e-4 for got in results[2:])


# ---- PyTorch's engine, and ranks -----------------------------------------------------------------------------------


@in_pytorch
@pytest.mark.parametrize("name", list(TERMS))
def test_in_pytorch_slabs_and_losses_alone_equal_a_stored_gradient(name: str) -> None:
    given = in_float64(inputs(*TERMS[name][1:3]))
    whole = call(spec_of(name), given)
    for budget in (30_000, 1_000_000):
        spec = spec_of(name, weight_grad="recomputed", memory_budget_bytes=budget)
        assert_near(call(spec, given), whole, 1e-12, f"slabs within {budget} bytes")
        alone = call(spec, given, need_x=False, need_w=False)
        torch.testing.assert_close(tuple(alone.result), tuple(whole.result), rtol=1e-12, atol=1e-12)


@in_pytorch
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
@pytest.mark.parametrize("name", list(TERMS))
def test_in_pytorch_tiles_equal_whole_matrices(name: str, weight_grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, spec = in_float64(inputs(*TERMS[name][1:3])), spec_of(name, weight_grad=weight_grad)
    whole = call(spec, given)
    monkeypatch.setattr(torch_engine, "_CPU_TILE_ROWS", 40)
    for budget in (None, 200_000):  # all samples or chunks of them, tiles of all rows or of slabs
        got = call(dataclasses.replace(spec, memory_budget_bytes=budget), given)
        assert_near(got, whole, 1e-12, f"tiles within {budget} bytes")
        torch.testing.assert_close(tuple(got.result), tuple(whole.result), rtol=1e-12, atol=1e-12)


@in_pytorch
@pytest.mark.parametrize(
    ("weight_grad", "budget", "pieces"), [("stored", CLASSES * 4 * 12, 5), ("recomputed", 15_000, 3)]
)
def test_the_gradient_of_x_is_announced_before_the_last_product_of_w(
    weight_grad: str, budget: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its reduction over the ranks can overlap that product. One product per chunk or slab."""
    events: list[str] = []
    multiply = TorchBlock.add_gradient

    def noted(block: TorchBlock, *given: Any) -> Tensor:
        events.append("w")
        return multiply(block, *given)

    monkeypatch.setattr(TorchBlock, "add_gradient", noted)
    spec = spec_of("alpha", weight_grad=weight_grad, memory_budget_bytes=budget)
    grads = call(spec, inputs(1, False), on_grad_x=lambda grad: events.append("x"))
    assert events == ["w"] * (pieces - 1) + ["x", "w"]
    assert_near(grads, call(spec_of("alpha"), inputs(1, False)), 1e-6, weight_grad)


@in_pytorch
@pytest.mark.parametrize("feature_rate", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", [RowAdamW, RowSGD])
def test_a_recomputed_gradient_trains_like_a_stored_one(optimizer: Any, feature_rate: float) -> None:
    given, results = inputs(1, False), []
    for weight_grad in ("stored", "recomputed"):
        head = PartialFC(
            CLASSES, WIDTH, sample_rate=0.6, init=given["w"], scale=20.0, weight_grad=weight_grad,
            memory_budget_bytes=12_000, feature_rate=feature_rate,
        )  # fmt: skip
        rows = optimizer(head, lr=0.02, lazy="decay")
        for step in range(3):
            head.set_step(step)
            (0.3 * head(given["x"], given["target"])).backward()  # type: ignore[arg-type]
            parts: list[tuple[Tensor, Tensor]] = []
            head.for_each_row_grad(lambda *part: parts.append(part))  # noqa: B023
            ids, grad = head.row_grad()
            assert torch.equal(torch.cat([part[0] for part in parts]), ids) and (len(parts) > 1) == (
                weight_grad == "recomputed"
            )
            torch.testing.assert_close(head.grad_norm_sq(), grad.square().sum())
            rows.step(grad_scale=0.7)
            rows.zero_grad()
        results.append((head.weight, grad, rows.state_rows()))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-6)


@in_pytorch
def test_a_recomputed_gradient_refuses_a_second_backward() -> None:
    given = inputs(1, False)
    head = PartialFC(CLASSES, WIDTH, init=given["w"], weight_grad="recomputed")
    head(given["x"], given["target"]).backward()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r'second backward .* use one micro-batch per step, or weight_grad "stored"'):
        head(given["x"], given["target"]).backward()  # type: ignore[arg-type]


def on_a_rank(options: dict[str, Any], train: bool) -> tuple[Discrimination, Tensor | None, Tensor]:
    """(result, gradient of the global batch's embeddings of this rank, gradient of its rows); uneven batches."""
    given = inputs(1, False, classes=53)
    head = PartialFC(53, WIDTH, init=given["w"], scale=20.0, sample_rate=0.7, grad_reduction="sum", **options)
    cut = {1: [0, 24], 2: [0, 15, 24], 4: [0, 3, 13, 13, 24]}[world_size()]
    mine = slice(cut[rank()], cut[rank() + 1])
    x = given["x"][mine].clone().requires_grad_()  # type: ignore[index]
    with torch.set_grad_enabled(train):
        weights = Weights(0.5, 0.4, 0.8, 2.0)
        out = head.discriminate(x, given["target"][mine], teacher_BD=given["teacher"][mine], weights=weights)  # type: ignore[index]
    if train:
        out.loss.backward()
    return Discrimination(*(part.detach() for part in out)), x.grad, head.row_grad()[1]


IN_PYTORCH = [
    pytest.param(
        world,
        {"weight_grad": weight_grad, "memory_budget_bytes": budget},
        id=f"{weight_grad}-{world}",
        marks=in_pytorch,
    )
    for world in (2, 4)
    for weight_grad, budget in (("stored", 2000), ("recomputed", 9000))
]
IN_TRITON = [
    pytest.param(
        world, {"impl": "triton", "weight_grad": weight_grad, "memory_budget_bytes": budget},
        id=f"triton-{weight_grad}-{world}", marks=pytest.mark.skipif(not INTERPRET, reason="runs in the interpreter"),
    )
    for world, weight_grad, budget in ((2, "recomputed", 10_000), (4, "stored", 40_000))
]  # fmt: skip


@pytest.mark.parametrize(("world", "options"), IN_PYTORCH + IN_TRITON)
def test_ranks_equal_one_process(world: int, options: dict[str, Any]) -> None:
    """Gradients, and the loss alone."""
    expected = on_a_rank({}, True)
    gate = GATES["fp16"] if INTERPRET else 2e-6
    trained, alone = (run_ranks(on_a_rank, world, options, train) for train in (True, False))
    for part in (*trained, *alone):
        torch.testing.assert_close(part[0].loss, expected[0].loss, rtol=gate, atol=gate)
        torch.testing.assert_close(part[0].target_cosine, expected[0].target_cosine, rtol=1e-5, atol=1e-5)
    assert relative(torch.cat([part[1] for part in trained]), expected[1]) < gate
    assert relative(torch.cat([part[2] for part in trained]), expected[2]) < gate


# ---- what needs a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_memory_stays_within_the_matrix_and_the_gradient() -> None:
    """At most 2 b C + 4 C D bytes and 5 %; the loss alone at ten million classes within 1 GiB."""
    batch, classes, width = 4096, 131072, 512
    x, w = (torch.randn(n, width, device="cuda") for n in (batch, classes))
    target = torch.randint(classes, (batch,), device="cuda")

    def peak(spec: LossSpec, w: Tensor, **options: Any) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        discrimination_with_gradients(x, w, target, spec, **options)
        return torch.cuda.max_memory_allocated() - before

    assert peak(LossSpec(num_classes=classes), w) <= 1.05 * (2 * batch * classes + 4 * classes * width)
    budget = 1 << 28
    slab = peak(
        LossSpec(num_classes=classes, weight_grad="recomputed", memory_budget_bytes=budget),
        w,
        on_grad_slab=lambda *_: None,
    )
    assert slab <= 1.05 * budget + 40 * batch * width
    if torch.cuda.mem_get_info()[0] > 24 << 30:
        del w
        w = torch.randn(10_000_000, width, device="cuda")
        assert peak(LossSpec(num_classes=len(w)), w, need_x=False, need_w=False) <= 1 << 30


@pytest.mark.gpu
def test_matrices_beyond_2_to_the_31_entries_are_reached() -> None:
    batch, classes, width = 4096, (1 << 19) + 24, 128
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(classes, width, device="cuda", generator=g)
    target = torch.randint(classes - 50, classes, (batch,), device="cuda", generator=g)
    x = w[target] + torch.randn(batch, width, device="cuda", generator=g)
    whole = discrimination_with_gradients(x, w, target, LossSpec(num_classes=classes, memory_budget_bytes=8 << 30))
    parts = discrimination_with_gradients(x, w, target, LossSpec(num_classes=classes, memory_budget_bytes=1 << 29))
    plain = discrimination_with_gradients(x, w, target, LossSpec(num_classes=classes, impl="torch"))
    assert_near(parts, whole, 1e-3, "chunks")
    assert_near(whole, plain, GATES["fp16"], "PyTorch")
    again = discrimination_with_gradients(x, w, target, LossSpec(num_classes=classes, memory_budget_bytes=8 << 30))
    assert torch.equal(whole.x, again.x) and torch.equal(whole.w, again.w)
