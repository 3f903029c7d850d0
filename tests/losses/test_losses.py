"""The objective: weights, needed inputs, terms; in one process (several ranks: test_joint_gradients.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megacid.classifier import Margin, PartialFC
from megacid.errors import UserError
from megacid.losses import ClusterDistillation, Objective, affinity_loss, contrastive_loss, feature_mse, instance_loss


class Out(NamedTuple):
    image: Tensor
    text: Tensor
    logit_scale: Tensor


@dataclass
class Data:
    label: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None


def make(batch: int = 6, width: int = 4) -> tuple[Out, Data]:
    g = torch.Generator().manual_seed(0)
    v, t, v_T, t_T = (F.normalize(torch.randn(batch, width, generator=g)) for _ in range(4))
    out = Out(v.requires_grad_(), t.requires_grad_(), torch.tensor(9.0, requires_grad=True))
    return out, Data(torch.randint(0, 11, (batch,), generator=g), v_T, t_T)


def test_the_sum_is_the_weighted_sum_of_its_terms() -> None:
    out, data = make()
    cluster = ClusterDistillation(PartialFC(11, 4, scale=10.0, margin=Margin.arcface(0.3)), 0.5, 0.7, 0.3, 2.0)
    loss, terms = Objective(instance=2.0, cluster=0.4, contrastive=0.3, mse=0.2, cluster_loss=cluster)(out, data)
    assert set(terms) == {
        "instance",
        "cluster",
        "contrastive",
        "mse",
        "cluster/student_ce",
        "cluster/teacher_ce",
        "cluster/kl",
    }
    values = {name: float(value) for name, value in terms.items()}
    assert not any(value.requires_grad for value in terms.values())
    expected = 2 * values["instance"] + 0.4 * values["cluster"] + 0.3 * values["contrastive"] + 0.2 * values["mse"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    parts = 0.5 * values["cluster/student_ce"] + 0.7 * values["cluster/teacher_ce"] + 0.3 * values["cluster/kl"]
    assert values["cluster"] == pytest.approx(parts, rel=1e-6)
    assert values["instance"] == pytest.approx(
        instance_loss(out.image, out.text, data.teacher_image, data.teacher_text, out.logit_scale).item()  # type: ignore[arg-type]
    )
    both = (out.image - data.teacher_image).square().sum(1) + (out.text - data.teacher_text).square().sum(1)
    assert values["mse"] == pytest.approx(both.mean().item(), rel=1e-6)
    loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in out) and cluster.head.row_grad()[1].any()


def test_plain_clip_needs_no_teacher_no_label_and_no_classifier() -> None:
    out, _ = make()
    loss, terms = Objective(instance=0, cluster=0, contrastive=1.0)(out, Data())
    assert list(terms) == ["contrastive"]
    logits = 9.0 * out.image @ out.text.T
    target = torch.arange(6)
    torch.testing.assert_close(loss, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)


def test_affinity_alone_needs_no_classifier_and_uses_the_temperature_of_each_side() -> None:
    out, data = make()
    assert data.teacher_image is not None and data.teacher_text is not None
    objective = Objective(instance=0, cluster=0, affinity=2.0, temperature=0.5, affinity_temperature=0.2)
    loss, terms = objective(out, data)
    expected = affinity_loss(out.image, out.text, data.teacher_image, data.teacher_text, torch.tensor(2.0), 5.0)
    assert list(terms) == ["affinity"] and not objective.is_mean_over_samples
    assert loss.item() == pytest.approx(2 * terms["affinity"].item()) == pytest.approx(2 * expected.item())


def test_plain_classification_needs_labels_only() -> None:
    out, data = make()
    head = PartialFC(11, 4)
    objective = Objective(instance=0, cluster=1.0, cluster_loss=ClusterDistillation(head, 1.0, 0.0, 0.0))
    loss, terms = objective(out, Data(label=data.label))
    assert loss.item() == pytest.approx(head(out.image, data.label).item()) and set(terms) == {
        "cluster",
        "cluster/student_ce",
    }


@pytest.mark.parametrize(
    ("weights", "missing"),
    [
        ({"instance": 1.0, "cluster": 0.0}, "teacher_text"),
        ({"instance": 1.0, "cluster": 0.0}, "teacher_image"),
        ({"instance": 0.0, "cluster": 1.0}, "label"),
        ({"instance": 0.0, "cluster": 1.0}, "teacher_image"),
        ({"instance": 0.0, "cluster": 0.0, "mse": 1.0}, "teacher_image"),
        ({"instance": 0.0, "cluster": 0.0, "mse": 1.0}, "teacher_text"),
        ({"instance": 0.0, "cluster": 0.0, "affinity": 1.0}, "teacher_text"),
    ],
)
def test_a_missing_input_names_its_term_and_field(weights: dict[str, float], missing: str) -> None:
    out, data = make()
    setattr(data, missing, None)
    term = next(name for name, value in weights.items() if value > 0)
    with pytest.raises(UserError, match=rf"the {term} term needs batch\.{missing}"):
        Objective(**weights, cluster_loss=ClusterDistillation(PartialFC(11, 4)))(out, data)  # type: ignore[arg-type]


def test_teacher_of_another_width_is_refused() -> None:
    out, data = make()
    data.teacher_text = torch.randn(6, 5)
    with pytest.raises(UserError, match=r"text_T has shape \(6, 5\)"):
        Objective(cluster=0)(out, data)


def test_fixed_temperature_replaces_the_learned_scale() -> None:
    out, data = make()
    loss, _ = Objective(cluster=0, temperature=0.25)(out, data)
    loss.backward()
    assert out.logit_scale.grad is None
    expected = instance_loss(out.image, out.text, data.teacher_image, data.teacher_text, torch.tensor(4.0))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"instance": -1.0}, "instance term is -1.0"),
        ({"instance": 0.0, "cluster": 0.0}, "all loss weights are 0"),
        ({"cluster": 1.0}, "expected 0 without a classifier"),
        ({"cluster": 0.0, "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_senseless_objectives_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Objective(**kwargs)


def test_senseless_cluster_losses_are_refused() -> None:
    head = PartialFC(3, 2)
    for args, message in (
        ((0.0, 0.0, 0.0), "all 0"),
        ((1.0, -1.0, 0.0), "beta is -1.0"),
        ((1.0, 0.0, 1.0, 0.0), "temperature is 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            ClusterDistillation(head, *args)


def test_no_gradient_reaches_the_teacher_and_beta_alone_leaves_the_student_alone() -> None:
    out, data = make()
    teacher = data.teacher_image.clone().requires_grad_()  # type: ignore[union-attr]
    head = PartialFC(11, 4)
    loss, _ = ClusterDistillation(head, 0.0, 1.0, 0.0)(out.image, data.label, teacher)  # type: ignore[arg-type]
    loss.backward()
    assert teacher.grad is None and (out.image.grad is None or not out.image.grad.any()) and head.row_grad()[1].any()
    loss = ClusterDistillation(head)(out.image, data.label, teacher)[0] + feature_mse(out.image, teacher)  # type: ignore[arg-type]
    (loss + instance_loss(out.image, out.text, teacher, teacher, out.logit_scale)).backward()
    assert teacher.grad is None and out.image.grad.any()


def test_aligned_pairs_have_a_lower_loss_than_shuffled_ones() -> None:
    out, _ = make()
    aligned = contrastive_loss(out.image, out.image, out.logit_scale)
    assert aligned.item() < contrastive_loss(out.image, out.image.roll(1, 0), out.logit_scale).item()


def test_an_empty_batch_is_zero() -> None:
    empty, scale = torch.zeros(0, 4, requires_grad=True), torch.tensor(2.0)
    assert contrastive_loss(empty, empty, scale).item() == 0 and feature_mse(empty, empty).item() == 0
    assert PartialFC(3, 4)(empty, torch.zeros(0, dtype=torch.int64)).item() == 0
