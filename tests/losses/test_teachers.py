"""Several teachers: the terms equal a float64 reference, and what equal teachers and widths must give."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_counter import CollectiveCounter
from harness import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from megacid.distributed.collectives import rank, world_size
from megacid.errors import UserError
from megacid.losses import Objective, affinity_loss

BATCH, WIDTHS, TEMPERATURES = 9, (3, 5), (0.2, 0.07)
CUTS = {1: [0, 9], 2: [0, 3, 9]}
TERMS: dict[str, tuple[dict[str, float], int]] = {  # name -> (weights, width of the student)
    "affinity of a narrower student": ({"affinity": 1.0}, 4),
    "all": ({"affinity": 0.7, "instance": 0.5, "mse": 0.3}, 8),
}


class Inputs:
    """Pixels and words of the whole batch, towers of a student, unit embeddings of two teachers; all float64."""

    def __init__(self, width: int) -> None:
        g = torch.Generator().manual_seed(2)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.x = {"image": normal(BATCH, 6), "text": normal(BATCH, 5)}
        self.teachers = {kind: [normalize(normal(BATCH, w)) for w in WIDTHS] for kind in self.x}
        self.student = {kind: normal(x.shape[1], width).requires_grad_() for kind, x in self.x.items()}
        self.student["scale"] = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def matrix(self, kind: str) -> Tensor:
        return torch.cat(self.teachers[kind], 1) / len(WIDTHS) ** 0.5

    def embedding(self, kind: str) -> Tensor:
        return normalize(self.x[kind] @ self.student[kind])


def reference(weights: dict[str, float], width: int) -> dict[str, Tensor]:
    """Loss, terms and gradients of one process, from the formulas of docs/method.md."""
    inputs = Inputs(width)
    v_S, t_S, scale = inputs.embedding("image"), inputs.embedding("text"), inputs.student["scale"].exp()
    terms = {}
    both = zip(inputs.teachers["image"], inputs.teachers["text"], TEMPERATURES)
    z = scale * v_S @ t_S.T
    terms["affinity"] = sum(
        -((p / tau).softmax(dim) * z.log_softmax(dim)).sum() / BATCH / 2 / len(WIDTHS)
        for p, tau in ((v @ t.T, tau) for v, t, tau in both)
        for dim in (0, 1)
    )
    if "instance" in weights:
        v_T, t_T, own = inputs.matrix("image"), inputs.matrix("text"), torch.arange(BATCH)
        pairs = [(v_S, t_T), (t_T, v_S), (t_S, v_T), (v_T, t_S)]
        terms["instance"] = sum(torch.nn.functional.cross_entropy(scale * a @ b.T, own) for a, b in pairs) / 2
        terms["mse"] = ((v_S - v_T).square() + (t_S - t_T).square()).sum() / BATCH
    loss = sum(weights[name] * terms[name] for name in weights)
    loss.backward()
    return {"loss": loss, **{n: terms[n] for n in weights}, **{n: p.grad for n, p in inputs.student.items()}}


def step(weights: dict[str, float], width: int) -> dict[str, Tensor]:
    """The same by `Objective` on this rank's part of the batch, in float64; gradients after the engine's mean."""
    inputs = Inputs(width)
    own = slice(*CUTS[world_size()][rank() : rank() + 2])
    out = SimpleNamespace(
        image=inputs.embedding("image")[own],
        text=inputs.embedding("text")[own],
        logit_scale=inputs.student["scale"].exp(),
    )
    batch = SimpleNamespace(teacher_image=inputs.matrix("image")[own], teacher_text=inputs.matrix("text")[own])
    zero = {"instance": 0.0, "cluster": 0.0}
    objective = Objective(**zero | weights, affinity_temperature=TEMPERATURES, teacher_widths=WIDTHS)  # type: ignore[arg-type]
    loss, terms = objective(out, batch)  # type: ignore[arg-type]
    loss.backward()
    grads = {name: p.grad for name, p in inputs.student.items() if p.grad is not None}
    for grad in grads.values():
        if world_size() > 1:
            dist.all_reduce(grad)
        grad /= world_size()
    return {"loss": loss.detach(), **terms, **grads}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", TERMS)
def test_loss_and_gradients_are_those_of_float64(case: str, world: int) -> None:
    expected = reference(*TERMS[case])
    for got in run_ranks(step, world, *TERMS[case]):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                got[name], value.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def gathers_of_a_step() -> list[int]:
    """Sizes of what is gathered: the sizes of the batches, two matrices of the teachers, two of the student."""
    with CollectiveCounter() as counter:
        step(*TERMS["all"])
    return sorted(call.size for call in counter.calls if call.kind == "all_gather")


def test_teachers_are_gathered_together_once() -> None:
    sizes = run_ranks(gathers_of_a_step, 2)
    assert sizes[0] == sizes[1] == [2 * 8] + 4 * [2 * 6 * sum(WIDTHS) * 8]  # gathers pad to the largest batch


def test_affinity_is_the_mean_over_the_teachers() -> None:
    inputs = Inputs(4)
    v, t, scale = inputs.embedding("image"), inputs.embedding("text"), inputs.student["scale"].exp()
    singles = [
        affinity_loss(v, t, v_T, t_T, scale, 1 / tau)
        for v_T, t_T, tau in zip(inputs.teachers["image"], inputs.teachers["text"], TEMPERATURES)
    ]
    got = run_objective(v, t, scale, inputs.matrix("image"), inputs.matrix("text"), TEMPERATURES, WIDTHS, affinity=1.0)
    torch.testing.assert_close(got, torch.stack(singles).mean(), rtol=1e-13, atol=0)


def run_objective(
    v: Tensor, t: Tensor, scale: Tensor, v_T: Tensor, t_T: Tensor, temperatures: Any, widths: Any, **weights: float
) -> Tensor:
    options: dict[str, Any] = {"instance": 0.0, "cluster": 0.0} | weights
    objective = Objective(affinity_temperature=temperatures, teacher_widths=widths, **options)
    out = SimpleNamespace(image=v, text=t, logit_scale=scale)
    return objective(out, SimpleNamespace(teacher_image=v_T, teacher_text=t_T))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("term", ["affinity", "instance", "mse"])
def test_equal_teachers_give_the_loss_of_one(term: str, count: int) -> None:
    """For the student [u, ..., u] / sqrt(K) and K teachers t, each term is that of the student u and one teacher t."""
    inputs = Inputs(5)
    scale, students = inputs.student["scale"].exp(), [inputs.embedding(kind) for kind in ("image", "text")]
    teachers = [inputs.teachers[kind][1] for kind in ("image", "text")]
    one = run_objective(*students, scale, *teachers, 0.1, (), **{term: 1.0})
    repeated = [torch.cat([x] * count, 1) / count**0.5 for x in (*students, *teachers)]
    several = run_objective(*repeated[:2], scale, *repeated[2:], 0.1, (5,) * count, **{term: 1.0})
    torch.testing.assert_close(several, one, rtol=1e-13, atol=0)


def test_teachers_that_do_not_fit_the_settings_are_refused() -> None:
    with pytest.raises(UserError, match="affinity_temperature has 3 values, expected one, or 2: one for each teacher"):
        Objective(cluster=0, affinity_temperature=(0.1, 0.2, 0.3), teacher_widths=(3, 5))
    with pytest.raises(UserError, match=r"affinity_temperature is \(0.1, 0.0\), expected > 0"):
        Objective(cluster=0, affinity_temperature=(0.1, 0.0), teacher_widths=(3, 5))
    x, scale = torch.eye(4), torch.tensor(2.0)
    with pytest.raises(UserError, match="the teacher's images have width 4 and its texts 5, expected one width"):
        affinity_loss(x, x, x, torch.eye(4, 5), scale, 5.0)
    with pytest.raises(UserError, match="the teachers' embeddings have width 4, expected 8, the sum of 3, 5"):
        run_objective(x, x, scale, x, x, 0.1, (3, 5), affinity=1.0)
    with pytest.raises(UserError, match=r"image_T has shape \(4, 8\), expected the student's \(4, 4\)"):
        run_objective(x, x, scale, torch.eye(4, 8), torch.eye(4, 8), 0.1, (3, 5), instance=1.0, affinity=1.0)


def refusals_of_other_samples(teachers: int, students: int) -> list[str]:
    """What the terms with a teacher say on this rank to other numbers of rows than the student's."""
    x_S, x_T, scale = torch.eye(students, 4), torch.eye(teachers, 4), torch.tensor(2.0)
    calls: list[Callable[[], Tensor]] = [lambda: affinity_loss(x_S, x_S, x_T, x_T, scale, 5.0)]
    for weights in ({"affinity": 1.0}, {"instance": 1.0}, {"mse": 1.0}):
        calls.append(lambda w=weights: run_objective(x_S, x_S, scale, x_T, x_T, 0.1, (), **w))  # type: ignore[misc]
    found = []
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("teachers", [2, 4])
def test_a_teacher_of_other_samples_is_refused_on_every_rank(teachers: int) -> None:
    results = run_ranks(refusals_of_other_samples, 2, teachers, 3)
    assert results[0] == results[1]
    said = f"image_T has {teachers} rows, expected the student's 3: pass those of the same samples"
    assert results[0][:3] == [said] * 3 and f"has shape ({teachers}, 4), expected" in results[0][3]
