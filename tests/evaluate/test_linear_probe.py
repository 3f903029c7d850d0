import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import megacid.evaluate.linear_probe as module
from megacid.errors import UserError
from megacid.evaluate.linear_probe import choose_strength, fit, hold_out
from megacid.evaluate.zero_shot import Predictions, top_classes

CLASSES, WIDTH = 5, 12


def clusters(n, noise, seed):
    """n unit rows around CLASSES fixed directions, and their classes."""
    centre_CD = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(CLASSES, (n,), generator=generator)
    feature_ND = centre_CD[label_N] + noise * torch.randn(n, WIDTH, generator=generator)
    return torch.nn.functional.normalize(feature_ND, dim=1), label_N


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_the_fit_is_the_minimiser_that_scikit_learn_finds(strength):
    feature_ND, label_N = clusters(200, 1.5, 0)
    probe = fit(feature_ND, label_N, num_classes=CLASSES, strength=strength)
    oracle = LogisticRegression(C=strength, max_iter=10_000, tol=1e-10).fit(
        feature_ND.double().numpy(), label_N.numpy()
    )
    ours = probe.scores(feature_ND).softmax(dim=1).numpy()
    assert probe.converged
    np.testing.assert_allclose(ours, oracle.predict_proba(feature_ND.double().numpy()), atol=1e-3)
    np.testing.assert_allclose(probe.weight.numpy(), oracle.coef_, atol=1e-3 * np.abs(oracle.coef_).max())


def test_the_fit_does_not_depend_on_how_the_rows_are_cut_into_chunks(monkeypatch):
    feature_ND, label_N = clusters(101, 1.5, 0)
    whole = fit(feature_ND, label_N, num_classes=CLASSES, strength=1.0)
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 7)
    cut = fit(feature_ND, label_N, num_classes=CLASSES, strength=1.0)
    torch.testing.assert_close(whole.weight, cut.weight, rtol=0, atol=1e-5)


def test_a_probe_on_separable_features_generalises_far_above_chance():
    train_ND, train_N = clusters(150, 0.4, 1)
    test_ND, test_N = clusters(150, 0.4, 2)
    strength, accuracies = choose_strength(train_ND, train_N, num_classes=CLASSES)
    assert accuracies[module.STRENGTHS.index(strength)] == max(accuracies)
    probe = fit(train_ND, train_N, num_classes=CLASSES, strength=strength)
    assert Predictions(top_classes(probe.scores(test_ND)), test_N).metrics()["acc1"] > 0.95  # chance: 0.2


def test_the_choice_of_strength_prefers_regularisation_on_noise_and_is_reproducible():
    feature_ND, label_N = clusters(120, 4.0, 3)
    first, accuracies = choose_strength(feature_ND, label_N, num_classes=CLASSES)
    assert (first, accuracies) == choose_strength(feature_ND, label_N, num_classes=CLASSES)
    assert first < module.STRENGTHS[-1] and len(set(accuracies)) > 1


def test_the_choice_of_strength_ends_after_two_that_are_worse_than_the_best(monkeypatch):
    accuracy = dict(zip(module.STRENGTHS, [0.2, 0.2, 0.5, 0.4, 0.5, 0.4, 0.3, 0.9, 0.9]))
    probe, tried = module.Probe(torch.zeros(2, 4).double(), torch.zeros(2).double(), 0, True), []
    monkeypatch.setattr(module, "fit", lambda *_, strength, **__: tried.append(strength) or probe)
    monkeypatch.setattr(module, "scored", lambda *_: {"acc1": accuracy[tried[-1]]})
    strength, accuracies = choose_strength(torch.randn(20, 4), torch.arange(20) % 2, num_classes=2)
    assert tried == list(module.STRENGTHS[:7])
    assert strength == module.STRENGTHS[2] and accuracies == [0.2, 0.2, 0.5, 0.4, 0.5, 0.4, 0.3]


def test_every_class_keeps_a_training_sample_when_some_are_held_out():
    label_N = torch.tensor([0] * 10 + [1] * 2 + [2])
    held_N = hold_out(label_N)
    assert [int(held_N[label_N == c].sum()) for c in range(3)] == [2, 1, 0]
    assert torch.equal(held_N, hold_out(label_N))


def test_a_train_split_without_two_of_a_class_is_refused():
    with pytest.raises(UserError, match="2 samples"):
        choose_strength(torch.randn(2, 4), torch.tensor([0, 1]), num_classes=2)


def test_metrics_weigh_samples_and_classes_as_defined():
    score_NC = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5, 0], [9.0, 1, 2, 3, 4, 5, 0], [1.0, 9, 2, 3, 4, 5, 0], [0.0, 1, 2, 3, 4, 5, 9]]
    )
    label_N = torch.tensor([0, 0, 0, 1])
    metrics = Predictions(top_classes(score_NC), label_N).metrics()
    # Class 0: 2 of 3 right, the third has rank 6 (of scores 9 5 4 3 2 1). Class 1: rank 6 as well.
    assert metrics["acc1"] == pytest.approx(0.5)
    assert metrics["acc5"] == pytest.approx(0.5)
    assert metrics["mean_per_class_recall"] == pytest.approx((2 / 3 + 0) / 2)
    assert Predictions(top_classes(torch.zeros(1, 3)), torch.tensor([2])).metrics()["acc5"] == 1.0
    assert top_classes(torch.zeros(1, 7)).tolist() == [[0, 1, 2, 3, 4]]  # ties: lower ids first
