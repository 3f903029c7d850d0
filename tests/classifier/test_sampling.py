"""Sampling is uniform, pure and independent of the number of ranks; the label exchange before a step."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.overrides import TorchFunctionMode

import megacid_kernels.rows
from megacid import Margin, RowAdamW, RowSGD
from megacid.classifier import row_adamw, row_optimizer, row_state
from megacid.classifier.label_exchange import GatheredLabels, LabelExchange
from megacid.classifier.partial_fc import PartialFC
from megacid.classifier.sampling import Draw, hash_ids, sample_dims
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError
from megacid_kernels import Weights


@pytest.mark.parametrize(
    ("classes", "rate"), [(1, 1.0), (7, 0.3), (10, 0.9), (100, 0.1), (1001, 0.37), (50, 0.001), (997, 0.5)]
)
def test_shards_draw_exactly_what_one_process_draws(classes: int, rate: float) -> None:
    for step in range(40):
        draw = Draw.of_step(classes, rate, seed=3, step=step)
        whole = draw.classes(0, classes)
        assert len(whole) == draw.strata == max(1, round(rate * classes))
        assert torch.equal(whole, torch.unique(whole)) and int(whole[0]) >= 0 and int(whole[-1]) < classes
        for world in range(1, min(classes, 7) + 1):
            ranges = [shard_range(classes, rank, world) for rank in range(world)]
            parts = [draw.classes(start, stop) for start, stop in ranges]
            assert torch.equal(torch.cat(parts), whole), f"{world} ranks draw other classes than one"
            assert all(len(part) <= draw.max_count(stop - start) for part, (start, stop) in zip(parts, ranges))


def test_the_draw_is_a_pure_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> list[int]:
        torch.manual_seed(seed + step + 99)  # the global generator must not matter
        return Draw.of_step(500, 0.1, seed=seed, step=step).classes(0, 500).tolist()

    assert draw(1, 7) == draw(1, 7)
    assert draw(1, 7) != draw(1, 8)
    assert draw(1, 7) != draw(2, 7)


@pytest.mark.parametrize(("classes", "rate"), [(200, 0.25), (203, 0.7), (60, 1 / 60)])
def test_every_class_has_the_same_chance(classes: int, rate: float) -> None:
    steps, hits = 3000, torch.zeros(classes)
    for step in range(steps):
        hits[Draw.of_step(classes, rate, seed=0, step=step).classes(0, classes)] += 1
    chance = max(1, round(rate * classes)) / classes
    assert float(hits.sum()) == pytest.approx(steps * classes * chance)
    # z-scores of binomial counts: standard normal, so that 4.5 of them or a spread off by a third would be seen.
    z = (hits - steps * chance) / (steps * chance * (1 - chance)) ** 0.5
    assert float(z.abs().max()) < 4.5 and 0.75 < float(z.std()) < 1.3


def test_neighbours_do_not_exclude_each_other_permanently() -> None:
    """Two classes of one stratum are never drawn together: the strata must move from step to step."""
    together = torch.zeros(40, 40)
    for step in range(4000):
        drawn = torch.zeros(40)
        drawn[Draw.of_step(40, 0.5, seed=0, step=step).classes(0, 40)] = 1
        together += drawn[:, None] * drawn
    assert float(together.min()) > 200, "two classes are hardly ever drawn together"


def test_log_q_makes_the_sampled_sum_an_unbiased_estimate() -> None:
    classes, values = 103, torch.rand(103, generator=torch.Generator().manual_seed(0)).double() + 0.1
    sums = []
    for step in range(4000):
        draw = Draw.of_step(classes, 0.29, seed=0, step=step)
        ids = draw.classes(0, classes)
        sums.append((values[ids] * torch.exp(-draw.log_q(ids).double())).sum())
    mean, error = torch.stack(sums).mean(), torch.stack(sums).std() / len(sums) ** 0.5
    assert abs(float(mean - values.sum())) < 4 * float(error) < 0.02 * float(values.sum())


def test_hashes_are_non_negative_and_distinct_for_neighbours() -> None:
    keys = hash_ids(torch.arange(100_000), seed=0, step=0)
    assert int(keys.min()) >= 0 and len(keys.unique()) == 100_000
    ordered = keys.double() / 2**62
    assert abs(float(ordered.mean()) - 0.5) < 0.005


def test_feature_dimensions_follow_rate_and_step() -> None:
    a, b = (sample_dims(64, 0.5, seed=0, step=s, device=torch.device("cpu")) for s in (1, 2))
    assert len(a) == 32 and torch.equal(a, a.unique()) and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("width", "rate", "count"),
    [(768, 0.5, 384), (512, 0.3, 160), (768, 1e-6, 16), (512, 0.999, 512), (40, 0.99, 32), (47, 0.9, 47), (12, 0.5, 6)],
)
def test_the_number_of_feature_dimensions_is_a_multiple_of_16_where_that_many_exist(
    width: int, rate: float, count: int
) -> None:
    dims = sample_dims(width, rate, seed=0, step=3, device=torch.device("cpu"))
    assert len(dims) == count and int(dims.min()) >= 0 and int(dims.max()) < width


# ---- the label exchange ----

LABELS = [[4, 90, 4, -1], [], [55, 90, 0, 99, 31, 30], [-1]]  # by rank, of 100 classes


def exchanged(labels: list[list[int]], rate: float) -> GatheredLabels:
    exchange = LabelExchange(100, None)
    draw = Draw.of_step(100, rate, seed=0, step=5) if rate < 1 else None
    target = torch.tensor(labels[exchange.rank], dtype=torch.int64).reshape(-1, 1)
    first = exchange(target, None, draw, torch.device("cpu"))
    again = exchange(target, None, draw, torch.device("cpu"))  # with room for every label from the start
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, again))
    return first


@pytest.mark.parametrize("rate", [0.1, 0.002, 0.9, 1.0])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_are_the_drawn_classes_and_the_labels_of_all_ranks(world: int, rate: float) -> None:
    labels = [*LABELS[: world - 1], list(chain(*LABELS[world - 1 :]))]
    batches = run_ranks(exchanged, world, labels, rate) if world > 1 else [exchanged(labels, rate)]
    positives = {y for part in LABELS for y in part if y >= 0}
    drawn = set(Draw.of_step(100, rate, seed=0, step=5).classes(0, 100).tolist()) if rate < 1 else set(range(100))
    used: list[int] = []
    for rank, batch in enumerate(batches):
        start, stop = shard_range(100, rank, world)
        assert batch.target_Gl.flatten().tolist() == list(chain(*labels)) and batch.sizes == [
            len(part) for part in labels
        ]
        rows = torch.arange(stop - start) if batch.rows is None else batch.rows
        used += (rows + start).tolist()
        assert len(rows) <= batch.max_rows <= 100 // world + 1
        assert batch.num_positive == len({y for y in positives if start <= y < stop})
        if batch.rows is not None:
            assert [row + start in positives for row in batch.rows.tolist()] == batch.positive.tolist()
    assert used == sorted(drawn | positives)


def test_micro_batches_of_a_step_share_negatives_and_steps_do_not() -> None:
    head = PartialFC(400, 4, sample_rate=0.2)
    drawn = []
    for step, label in ((3, 7), (3, 11), (4, 7)):
        head.set_step(step)
        head.zero_grad()
        head(torch.randn(1, 4), torch.tensor([label])).backward()
        drawn.append(set(head.row_grad()[0].tolist()))
        assert label in drawn[-1] and 80 <= len(drawn[-1]) <= 81
    assert len(drawn[0] & drawn[1]) >= 79
    assert len(drawn[0] & drawn[2]) < 50


@pytest.mark.parametrize("interleaved", [False, True])
def test_micro_batches_add_up_on_the_union_of_their_rows(interleaved: bool) -> None:
    """forward, backward, forward, backward, and both forwards first, must give the same sum."""
    head = PartialFC(300, 4, sample_rate=0.05, scale=8.0)
    g = torch.Generator().manual_seed(0)
    parts = [(torch.randn(6, 4, generator=g), torch.randint(0, 300, (6,), generator=g)) for _ in range(3)]
    alone = []
    for x, y in parts:
        head(x, y).backward()
        alone.append(torch.zeros(300, 4).index_copy(0, *(t for t in (head.row_grad()[0], head.row_grad()[1]))))
        head.zero_grad()
    losses = [head(x, y) for x, y in parts] if interleaved else (head(x, y) for x, y in parts)
    for loss in losses:
        loss.backward()
    rows, grad = head.row_grad()
    used = torch.stack(alone).any(0).any(1).nonzero().flatten()
    assert torch.equal(rows, rows.unique()) and torch.isin(used, rows).all() and len(rows) <= 15 + 18
    torch.testing.assert_close(torch.zeros(300, 4).index_copy(0, rows, grad), sum(alone))


def test_labels_may_stay_on_the_host_and_are_left_as_they_are() -> None:
    head, labels = PartialFC(40, 4, sample_rate=0.2), torch.tensor([3, -1, 39])
    head(torch.randn(3, 4), labels)
    assert labels.tolist() == [3, -1, 39] and head.hits.nonzero().flatten().tolist() == [3, 39]


@pytest.mark.parametrize("value", [-2, 40, 2**40])
def test_a_label_out_of_range_is_named(value: int) -> None:
    with pytest.raises(UserError, match=rf"label {value} is out of range, expected -1 \(none\) or 0 to 39"):
        PartialFC(40, 4, sample_rate=0.2)(torch.randn(3, 4), torch.tensor([0, value, 39]))


def refused(kind: str) -> str:
    head = PartialFC(40, 4, sample_rate=0.2)
    here = head.class_start == 0
    emb, target = torch.randn(2, 4), torch.tensor([1, 30])
    if kind == "dtype" and here:
        target = target.int()
    if kind == "range" and here:
        target = torch.tensor([1, 40])
    if kind == "width" and here:
        emb = torch.randn(2, 5)
    if kind == "several" and here:
        target = target[:, None].expand(2, 2)
    if kind == "requires_grad" and here:
        emb.requires_grad_()
    if kind in ("float16", "bfloat16", "float64") and here:
        emb = emb.to(getattr(torch, kind))
    if kind == "integer" and here:
        emb = emb.long()
    if kind == "evaluation" and here:
        head.eval()
    if kind == "step" and here:
        head.set_step(7)
    teacher = emb.detach().double() if kind == "teacher" and here else emb.detach()
    weights = Weights(1.0, 0.5) if kind == "teacher" else Weights()
    try:
        with torch.set_grad_enabled(not (kind == "no_grad" and here)):
            head.discriminate(emb, target, teacher_BD=teacher, weights=weights)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "mine", "others"),
    [
        ("dtype", "labels are torch.int32", "rank 0 has invalid input"),
        ("range", "label 40 is out of range", "label 40 is out of range"),
        ("width", "embeddings have shape (2, 5)", "rank 0 has invalid input"),
        ("several", "[2, 1, 1] labels per sample", "[2, 1, 1] labels per sample"),
        ("integer", "embeddings are torch.int64", "rank 0 has invalid input"),
        *(
            (kind, message, message)
            for kind, message in (
                ("float16", "dtype of the embeddings: torch.float16 on rank 0, torch.float32 on rank 1"),
                ("bfloat16", "dtype of the embeddings: torch.bfloat16 on rank 0, torch.float32 on rank 1"),
                ("float64", "dtype of the embeddings: torch.float64 on rank 0, torch.float32 on rank 1"),
                ("teacher", "dtype of the teacher embeddings: torch.float64 on rank 0, torch.float32 on rank 1"),
                ("requires_grad", "requires_grad of the embeddings: yes on rank 0, no on rank 1"),
                ("no_grad", "grad mode: no on rank 0, yes on rank 1"),
                ("evaluation", "training mode of the classifier: no on rank 0, yes on rank 1"),
                ("step", "step: 7 on rank 0, 0 on rank 1"),
            )
        ),
    ],
)
def test_bad_input_on_one_rank_is_an_error_on_all_without_a_deadlock(kind: str, mine: str, others: str) -> None:
    messages = run_ranks(refused, 3, kind)
    assert mine in messages[0] and all(others in message for message in messages[1:])


def with_other_settings(options: dict[str, Any], weights: dict[str, float], evaluation: bool) -> str:
    other = dist.get_rank() == 1
    head = PartialFC(40, 4, **{"sample_rate": 0.2, **(options if other else {})}).train(not evaluation)
    emb = torch.randn(2, 4)
    given = Weights(**{"beta": 0.5, **(weights if other else {})})
    with pytest.raises(UserError) as error:
        head.discriminate(emb, torch.tensor([1, 30]), teacher_BD=emb, weights=given)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        ({}, {"beta": 0.25}, "beta: 0.5 on rank 0, 0.25 on rank 1"),
        ({}, {"gamma": 1e-9}, "gamma: 0.0 on rank 0, 1e-09 on rank 1"),
        ({}, {"temperature": 2.0}, "temperature: 1.0 on rank 0, 2.0 on rank 1"),
        ({"scale": 32.0}, {}, "scale: 64.0 on rank 0, 32.0 on rank 1"),
        ({"margin": Margin.arcface(0.5)}, {}, "margin: Margin("),
        ({"sample_rate": 0.3}, {}, "sample_rate: 0.2 on rank 0, 0.3 on rank 1"),
        ({"seed": 1}, {}, "seed: 0 on rank 0, 1 on rank 1"),
        ({"reduction": "sum"}, {}, "reduction: mean on rank 0, sum on rank 1"),
    ],
)
def test_a_setting_that_differs_between_ranks_is_named_on_every_rank(
    options: dict[str, Any], weights: dict[str, float], message: str
) -> None:
    first, *others = run_ranks(with_other_settings, 3, options, weights, "scale" in options)
    assert first.startswith(message) and others == [first] * 2


def with_own_steps(options: dict[str, Any], evaluation: bool) -> float:
    head = PartialFC(40, 4, **options).train(not evaluation)
    head.set_step(head.class_start)
    return float(head(torch.ones(2, 4), torch.tensor([1, 30])).detach())


def test_ranks_may_differ_in_a_step_number_that_nothing_depends_on() -> None:
    for options, evaluation in (({}, False), ({"sample_rate": 0.2}, True)):
        first, second = run_ranks(with_own_steps, 2, options, evaluation)
        assert first == second


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate is 0.0"),
        ({"feature_rate": 1.5}, "feature_rate is 1.5"),
        ({"impl": "triton"}, "expected 'auto' or 'torch'"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"reduction": "none"}, "reduction is 'none'"),
    ],
)
def test_senseless_options_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PartialFC(10, 4, **kwargs)


SYNCHRONISING = """item tolist numpy cpu __bool__ __int__ __float__ __index__ nonzero argwhere unique unique_consecutive
 masked_select bincount equal allclose is_nonzero""".split()


class Synchronisations(TorchFunctionMode):
    """Records the names of functions that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        indices = index if isinstance(index, tuple) else (index,)
        masked = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if name in SYNCHRONISING or masked:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [RowAdamW, RowSGD])
@pytest.mark.parametrize(
    "kwargs", [{}, {"log_q": True, "filter_threshold": 0.4, "feature_rate": 0.5}, {"sample_rate": 1.0}]
)
def test_a_step_of_the_head_reads_the_device_once(
    kwargs: dict, optimizer: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a device: norms, and no NumPy, which few CPU threads take for blocks of rows.
    for module in (megacid_kernels.rows, row_adamw, row_optimizer):
        monkeypatch.setattr(module, "is_on_host", lambda x: False)
    monkeypatch.setattr(row_state, "_has_few_cpu_threads", lambda x, most: False)
    head = PartialFC(500, 16, **{"sample_rate": 0.1, **kwargs})
    rows = optimizer(head)
    x, y = torch.randn(25, 16, requires_grad=True), torch.randint(0, 500, (25,))
    head(x, y).backward()  # the exchange learns the batch size
    head.zero_grad()
    with Synchronisations() as synchronisations:
        for _ in range(2):
            head(x, y).backward()
        rows.step(grad_scale=torch.tensor(0.5))
        rows.zero_grad()
    assert synchronisations.names == ["tolist", "tolist"], "one for each micro-batch"


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, {"log_q": True, "filter_threshold": 0.4, "feature_rate": 0.5}])
def test_a_step_of_the_head_synchronises_with_the_device_once(kwargs: dict) -> None:
    head = PartialFC(5000, 64, sample_rate=0.1, device="cuda", **kwargs)
    optimizer = RowAdamW(head)
    x, y = torch.randn(256, 64, device="cuda", requires_grad=True), torch.randint(0, 5000, (256,), device="cuda")

    def synchronisations(micro_batches: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(micro_batches):
                    head(x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    synchronisations(1)  # the exchange learns the batch size
    assert synchronisations(1) == 1
    assert synchronisations(3) == 3
