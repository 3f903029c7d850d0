"""How a call is cut into chunks or slabs: sizes of the default budget, and where slabs are the faster way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacid_kernels import LossSpec, Weights, discrimination_with_gradients
from megacid_kernels.engines.dispatch import check_precision, resolve
from megacid_kernels.plan import (
    Plan,
    Sizes,
    describe,
    make_plan,
    plan_chunks,
    plan_slabs,
    with_available_memory,
    work_of,
)

GIB = 1 << 30


def plan_of(batch: int, rows: int, width: int, gpu_gib: int, classes: int | None = None, **options: Any) -> Plan:
    """The plan of Triton's engine, without a GPU, for one with that memory."""
    classes = classes or rows
    options = {"weight_grad": "auto", "available_bytes": gpu_gib * GIB - 12 * classes * width} | options
    spec = LossSpec(num_classes=classes, max_rows=rows, **options)
    return make_plan(spec, Sizes(batch, rows, width), "triton", "cuda")


@pytest.mark.parametrize(
    ("shape", "gpu_gib", "chunks", "samples"),
    [
        # The bench's shapes, on GPUs of 80 and 141 GB.
        ((4096, 131_072, 512), 79, 1, 4096),
        ((8192, 131_072, 768), 79, 2, 4096),
        ((16_384, 1 << 20, 768), 79, 4, 4096),
        ((32_768, 1 << 20, 1024), 79, 8, 4096),
        ((16_384, 1 << 20, 768), 139, 4, 4096),
        ((32_768, 125_000, 512), 79, 8, 4096),
        # Five million classes: a quarter of what the shard leaves holds 2,451 samples.
        ((4096, 5_000_000, 512), 139, 2, 2048),
    ],
)
def test_chunks_have_4096_samples_where_they_fit(
    shape: tuple[int, int, int], gpu_gib: int, chunks: int, samples: int
) -> None:
    plan = plan_of(*shape, gpu_gib)
    assert (plan.kind, len(plan.chunks), plan.samples) == ("stored", chunks, samples)
    assert plan.bytes == 2 * samples * shape[1] <= plan.budget


def test_a_tenth_of_ten_million_classes_is_two_chunks_and_all_of_them_on_80_gb_are_slabs() -> None:
    sampled = plan_of(4096, 1_004_096, 512, 79, classes=10_000_000)
    assert (sampled.kind, len(sampled.chunks), sampled.samples) == ("stored", 2, 2048)
    assert plan_of(4096, 1_004_096, 512, 139, classes=10_000_000).samples == 4096
    # The shard leaves nothing, so the budget is 1 GiB: 78 chunks of 53 samples would update the 19 GiB of gradient.
    sizes, spec = Sizes(4096, 10_000_000, 512), LossSpec(num_classes=10_000_000)
    stored = plan_chunks(spec, sizes, "triton", "cuda")
    whole = plan_of(4096, 10_000_000, 512, 79)
    assert (len(stored.chunks), stored.samples) == (78, 53) and stored.budget == GIB
    assert (whole.kind, len(whole.slabs), whole.rows) == ("recomputed", 127, 79_104) and whole.bytes <= GIB
    assert plan_of(4096, 10_000_000, 512, 139) == whole
    slow, fast = (work_of(plan, spec, sizes, "triton") for plan in (stored, whole))
    assert slow.flop == 6 * 4096 * 10_000_000 * 512 and fast.flop == 8 * 4096 * 10_000_000 * 512
    assert slow.bytes > 11 * fast.bytes and slow.cost > 3.9 * fast.cost


def test_the_default_never_is_below_a_gibibyte_and_a_given_budget_is_kept() -> None:
    assert plan_of(4096, 5_000_000, 512, 24, weight_grad="stored").budget == GIB
    assert plan_of(256, 1000, 512, 79).budget == GIB
    assert plan_of(8192, 131_072, 768, 79, memory_budget_bytes=300 << 20).budget == 300 << 20
    # Wide rows: the gradient is larger than 4,096 samples' exponentials.
    assert plan_of(16_384, 1 << 20, 3072, 139).budget == 4 * (1 << 20) * 3072


@pytest.mark.parametrize(
    ("weights", "flop"),
    [(Weights(), 6), (Weights(1, 1), 10), (Weights(1, 1, 1), 12), (Weights(1, 1, 1, 2.0), 22), (Weights(0, 1), 4)],
)
def test_products_are_those_of_the_table_in_the_docs(weights: Weights, flop: int) -> None:
    spec, sizes = LossSpec(num_classes=1000, weights=weights), Sizes(64, 1000, 32)
    plan = plan_chunks(spec, sizes, "triton", "cuda")
    assert work_of(plan, spec, sizes, "triton").flop == flop * 64 * 1000 * 32


def test_traffic_counts_every_pass_over_rows_matrices_and_gradient() -> None:
    """alpha alone in Triton, S D = 1000 x 32, two chunks and ten slabs."""
    sizes, spec = Sizes(64, 1000, 32), LossSpec(num_classes=1000, memory_budget_bytes=2 * 32 * 1000)
    chunks = plan_chunks(spec, sizes, "triton", "cuda")
    assert len(chunks.chunks) == 2
    # Unit rows: 4 read, 4 written, and 2 x 2 read by two products of each chunk. Gradient: written, updated, its norm.
    rows, gradient = 8 + 2 * 4, 4 + 8 + 12
    assert work_of(chunks, spec, sizes, "triton").bytes == 32_000 * (rows + gradient) + 6 * 64_000
    slabs = plan_slabs(LossSpec(num_classes=1000, memory_budget_bytes=4000 + 15_000), sizes, "triton", "cuda")
    number = len(slabs.slabs)
    assert number > 5
    # Rows are made twice, and read by three products; every slab updates the gradient of x.
    expected = 32_000 * (16 + 6 + 4 + 12) + 6 * 64_000 + 8 * number * 64 * 32
    assert work_of(slabs, spec, sizes, "triton").bytes == expected
    # `each_slab`: rows made and read by one product, exponentials written and read by one, and the gradient.
    expected += 32_000 * (8 + 2 + 4 + 12) + 4 * 64_000
    again = work_of(slabs, spec, sizes, "triton", each_slab=True)
    assert (again.flop, again.bytes) == (12 * 64 * 32_000, expected)
    assert work_of(chunks, spec, sizes, "triton", each_slab=True) == work_of(chunks, spec, sizes, "triton")


@pytest.mark.parametrize("budget", [None, 1 << 28, 20_000])
def test_ranks_with_shards_of_different_sizes_choose_alike(budget: int | None) -> None:
    spec = LossSpec(num_classes=40_000_000, max_rows=10_000_001, available_bytes=20 * GIB, memory_budget_bytes=budget)
    if budget == 20_000:
        for rows in (10_000_001, 10_000_000, 1):
            with pytest.raises(ValueError, match="memory_budget_bytes is 20000, which allows chunks of 1 samples"):
                make_plan(spec, Sizes(4096, rows, 512), "triton", "cuda")
        return
    plans = [make_plan(spec, Sizes(4096, rows, 512), "triton", "cuda") for rows in (10_000_001, 10_000_000, 1)]
    assert {plan.kind for plan in plans} == {"recomputed"}


def test_pytorch_keeps_its_chunks() -> None:
    spec, sizes = LossSpec(num_classes=1 << 20), Sizes(512, 1 << 20, 512)
    for device in ("cpu", "cuda"):
        assert make_plan(spec, sizes, "torch", device).kind == "stored"
    assert make_plan(spec, sizes, "torch", "cpu").samples == 256


def test_a_plan_says_its_pieces_bytes_products_and_traffic() -> None:
    spec, sizes = LossSpec(num_classes=131_072), Sizes(8192, 131_072, 768)
    stored, slabs = plan_chunks(spec, sizes, "triton", "cuda"), plan_slabs(spec, sizes, "triton", "cuda")
    assert describe(stored, sizes, "triton", work_of(stored, spec, sizes, "triton")) == (
        "gradient stored, 2 chunks of 4096 samples x 131072 class rows, 1024.0 MiB within a budget of 1024.0; products "
        "4.95 TFLOP, predicted traffic 9.75 GiB (triton)"
    )
    recomputed = describe(slabs, sizes, "triton", work_of(slabs, spec, sizes, "triton"))
    assert recomputed.startswith("gradient recomputed, 3 slabs of 44544 class rows x 8192")


def test_the_memory_of_a_gpu_is_read_in_whole_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal GPUs may differ by pages, but their ranks must make equal chunks."""
    cuda, spec = torch.device("cuda"), LossSpec(num_classes=1000)
    for pages in (0, 37):
        properties = type("Properties", (), {"total_memory": 79 * GIB + 4096 * (200 + pages)})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert with_available_memory(spec, cuda, 1000, 64).available_bytes == 79 * GIB - 12 * 1000 * 64
        student = with_available_memory(spec, cuda, 1000, 64, reserved=5 * GIB)
        assert student.available_bytes == 74 * GIB - 12 * 1000 * 64
    given = LossSpec(num_classes=1000, memory_budget_bytes=1 << 20)
    assert with_available_memory(given, cuda, 1000, 64) is given
    assert with_available_memory(spec, torch.device("cpu"), 1000, 64) is spec


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="precision is 'bf16' with impl 'torch', expected 'auto' or 'fp32'"):
        discrimination_with_gradients(x, w, target, LossSpec(num_classes=3, precision="bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert resolve("auto", torch.device("cuda"), torch.float32) == "torch"
    for precision in ("auto", "fp16", "bf16"):
        with pytest.raises(ValueError, match=f"precision is '{precision}' on a GPU sm_75, expected 'fp32' or impl="):
            check_precision(precision, "triton", torch.device("cuda"))
    check_precision("fp32", "triton", torch.device("cuda"))


SETTINGS = torch.backends.cuda.matmul


def fp32_products() -> str:
    """ "tf32", or something else; torch < 2.9 has one setting."""
    if hasattr(SETTINGS, "fp32_precision"):
        return str(SETTINGS.fp32_precision)
    return "tf32" if SETTINGS.allow_tf32 else "ieee"


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("weight_grad", ["stored", "recomputed"])
def test_fp32_products_are_ieee_whatever_the_settings_are(weight_grad: str, tf32: bool) -> None:
    """Also those that `each_slab` makes later, and the user's setting comes back, also after an error."""
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    seen: list[str] = []

    def record(*_: Any) -> None:
        seen.append(fp32_products())

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    spec = LossSpec(num_classes=9, weight_grad=weight_grad)
    SETTINGS.allow_tf32 = tf32
    before = fp32_products()
    try:
        out = discrimination_with_gradients(x, w, target, spec, on_grad_x=record, on_grad_slab=record)
        if out.each_slab is not None:
            out.each_slab(record)
        assert seen and "tf32" not in seen
        with pytest.raises(KeyError):
            discrimination_with_gradients(x, w, target, spec, on_grad_x=fail)
        assert fp32_products() == before and SETTINGS.allow_tf32 is tf32
    finally:
        SETTINGS.allow_tf32 = False


@pytest.mark.skipif(not hasattr(SETTINGS, "fp32_precision"), reason="torch < 2.9")
def test_an_inherited_setting_stays_inherited() -> None:
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    before = torch.backends.fp32_precision, SETTINGS.fp32_precision
    try:
        SETTINGS.fp32_precision = "none"
        for parent in ("tf32", "ieee", "tf32"):
            torch.backends.fp32_precision = parent
            discrimination_with_gradients(x, w, target, LossSpec(num_classes=9))
            assert SETTINGS.fp32_precision == parent
    finally:
        torch.backends.fp32_precision, SETTINGS.fp32_precision = before
