"""Membership inference: scores computed by hand, attacks on artificial members, and metrics in records."""

import json
import math
from pathlib import Path

from conftest import FAST
import numpy as np
import pytest
import torch

from l2ul.metrics import membership, retrain_gap
from l2ul.metrics.columns import MEMBERSHIP_ATTACKS
import main_unlearn


def test_scores_equal_values_computed_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    found = membership.scores(p.log() + 3.0, torch.tensor([0, 1]))
    log = math.log
    expected = {
        "confidence": [0.7, 0.5],
        "loss": [log(0.7), log(0.25)],
        "entropy": [0.7 * log(0.7) + 0.2 * log(0.2) + 0.1 * log(0.1), 0.5 * log(0.25) + 0.5 * log(0.5)],
        "modified_entropy": [
            0.3 * log(0.7) + 0.2 * log(0.8) + 0.1 * log(0.9),
            0.75 * log(0.25) + 0.25 * log(0.75) + 0.5 * log(0.5),
        ],
    }
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx(values, rel=1e-5) for name, values in expected.items()
    }


def test_scores_of_confident_outputs_are_finite_and_ordered():
    logits = torch.tensor([[0.0, 50.0], [0.0, 100.0], [0.0, 200.0]])
    wrong = membership.scores(logits, torch.zeros(3, dtype=torch.int64))
    assert all(values.isfinite().all() for values in wrong.values())
    assert wrong["modified_entropy"].tolist() == pytest.approx([-100.0, -200.0, -400.0])
    right = membership.scores(logits, torch.ones(3, dtype=torch.int64))
    assert right["modified_entropy"].abs().max() < 1e-10


def test_advantage_is_the_better_of_both_directions():
    rng = np.random.default_rng(0)
    others = rng.normal(size=2000)
    assert membership.advantage(others[:500] + 20, others) == {"auc": 100.0, "tpr": 100.0}
    assert membership.advantage(others[:500] - 20, others) == {"auc": 100.0, "tpr": 100.0}
    guess = membership.advantage(rng.normal(size=2000), others)
    assert 50 <= guess["auc"] < 53
    assert guess["tpr"] < 3
    # 3 of 4 members score above every other image, and the fourth scores below all 200
    few = membership.advantage(np.array([5.0, 6.0, 7.0, -9.0]), np.linspace(0, 1, 200))
    assert few == {"auc": pytest.approx(75.0), "tpr": pytest.approx(75.0)}


def test_the_logistic_attack_finds_members_in_the_middle_of_a_range():
    rng = np.random.default_rng(0)
    others = rng.choice([-1.0, 1.0], size=(400, 1)) + 0.1 * rng.normal(size=(400, 1))
    members = 0.1 * rng.normal(size=(100, 1))
    assert membership.advantage(members[:, 0], others[:, 0])["auc"] < 65
    first = membership.logistic_scores(members, others)
    assert membership.advantage(*first)["auc"] > 99
    assert all(
        (one == other).all() for one, other in zip(first, membership.logistic_scores(members, others), strict=True)
    )
    same = membership.logistic_scores(rng.normal(size=(300, 2)), rng.normal(size=(300, 2)))
    assert membership.advantage(*same)["auc"] < 57  # each image is scored by a fit that excludes it


def test_rmia_equals_values_computed_by_hand():
    own = membership.label_log_probability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log() - 5.0, torch.tensor([0, 1]))
    assert own.exp().tolist() == pytest.approx([0.9, 0.2])
    ratios = membership.likelihood_ratio(own, torch.tensor([[0.5, 0.2], [0.3, 0.6]], dtype=torch.double).log())
    p = (1.3 * 0.4 + 0.7) / 2  # the references' mean is 0.4 for both images
    assert ratios.exp().tolist() == pytest.approx([0.9 / p, 0.2 / p])
    population = torch.tensor([8.0, 1.9, 1.0, 3.0]).log()
    assert membership.relative_scores(torch.tensor([2.0, 0.5, 8.5]).log(), population).tolist() == [0.5, 0.0, 1.0]
    near = membership.relative_scores(torch.tensor([1.01, 0.99]).log(), torch.tensor([1.0, 0.98]).log())
    assert near.tolist() == [1.0, 0.5]  # distinguished although no ratio is far from 1
    certain = membership.label_log_probability(torch.tensor([[0.0, 800.0]]), torch.tensor([0]))
    assert membership.likelihood_ratio(certain, certain[None]).isfinite().all()


def test_a_single_member_has_no_logistic_attack():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    found = membership.inference((logits[:1], labels[:1]), (logits[1:], labels[1:]))
    assert "logistic" not in found
    assert set(found) == set(MEMBERSHIP_ATTACKS) - {"logistic"}


def test_evaluate_adds_metrics_to_new_and_to_finished_runs(script, few_digits, tmp_path):
    arguments = ["--result-dir", tmp_path, *FAST, "--unlearn-k", 6, "--method", "before", "distill"]
    assert script(main_unlearn.main, *arguments)[0] == 0
    code, out, err = script(main_unlearn.main, *arguments, "--evaluate", "membership", "distance")
    assert code == 0, err
    assert "1 run to do, 0 done, 1 done that lack metrics" in out  # the model of `before` is the original one
    found = {record["method"]: record for record in map(json.loads, map(Path.read_text, tmp_path.glob("runs/*.json")))}
    for record in found.values():
        for attack in MEMBERSHIP_ATTACKS:
            assert 50 <= record[f"metric_mia_{attack}_auc"] <= 100
            assert 0 <= record[f"metric_mia_{attack}_tpr"] <= 100
    assert found["before"]["metric_distance"] == 0
    assert 0 < found["distill"]["metric_distance"] < 0.1
    again = script(main_unlearn.main, *arguments, "--evaluate", "distance", "membership")
    assert "0 runs to do" in again[1]
    code, _, err = script(main_unlearn.main, *arguments, "--evaluate", "luck")
    assert code == 2
    assert "luck" in err


def test_metrics_of_a_diverged_run_are_null(script, few_digits, tmp_path):
    arguments = [*FAST, "--method", "distill", "--distill-lr", 1e30, "--evaluate", "membership"]
    assert script(main_unlearn.main, "--result-dir", tmp_path, *arguments)[0] == 0
    (record,) = map(json.loads, map(Path.read_text, tmp_path.glob("runs/*.json")))
    assert record["status"] == "diverged"
    assert record["metric_mia_loss_auc"] is None


def test_probabilities_of_many_images_are_computed_in_parts(monkeypatch):
    """In double precision, those of 50,000 images and 21,841 classes would need 52 GB at once."""
    logits, labels, rows = torch.randn(20, 5), torch.arange(20) % 5, []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: rows.append(len(self)) or double(self))

    def values():
        scores = membership.scores(logits, labels)
        divergence = torch.tensor([retrain_gap.js_divergence(logits, logits.flip(0))])
        return torch.cat([*scores.values(), membership.label_log_probability(logits, labels), divergence])

    expected = values()
    rows.clear()
    for module in (membership, retrain_gap):
        monkeypatch.setattr(module, "ROWS", 8)
    assert torch.allclose(values(), expected, rtol=1e-12)
    assert max(rows) == 8
