"""The benchmark runs to its end, and its released order of work computes what the released scripts compute."""

from dataclasses import replace
import json
import sys

from conftest import CLASSES, ROOT, tiny_net
import pytest
import torch

from l2ul import attack, importance
from l2ul.methods import robust
from l2ul.unlearn import Settings, unlearn


@pytest.fixture(scope="module")
def released():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import released

    return released


@pytest.fixture
def speed(released):
    import speed

    return speed


def test_measures_every_part_and_records_it(speed, script, few_digits, tmp_path, monkeypatch):
    import parts

    monkeypatch.setattr(parts, "DRAWS", 2)  # examples for each image
    small = ["--pairs", 32, "--released-pairs", 32, "--iterations", 1, "--steps", 1, "--step-k", 2]
    small += ["--adv-batch-size", 4, "--eval-images", 4]
    record = tmp_path / "speed.json"
    code, out, err = script(
        speed.main, "--dataset", "digits", "--model", "resnet20", "--repeats", 2, "--cut", 10_000, *small,
        "--workers-of-loader", 0, "--output", record,
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(record.read_text())
    names = [item["item"] for item in told["items"]]
    assert names[:5] == ["attack", "step neggrad", "step adv", "step adv_imp", "evaluation"]
    assert names[-1] == "table row, k = 16 64 128 256 (from the parts)"
    assert all(item["ratio"] > 0 for item in told["items"])
    assert told["items"][0]["of the floor"] > 0
    assert all(len(seconds) == 2 for seconds in told["seconds"]["attack"].values())
    assert [line.split(":")[0] for line in out.splitlines()[-len(names) :]] == names
    assert "attack: " in out.splitlines()[-len(names)]


def test_a_row_is_what_its_parts_cost(speed):
    costs = {"attack": (2.0, 1.0), "step neggrad": (3.0, 2.0), "step adv": (5.0, 4.0), "step adv_imp": (7.0, 6.0)}
    costs |= {"evaluation": (0.2, 0.1)}
    found = {name: {"released": [slow], "ours": [fast]} for name, (slow, fast) in costs.items()}
    steps = {(method, k): k // 16 for method in speed.METHODS for k in (16, 32)}
    row = speed.table_row(found, steps, (16, 32))
    # pairs · 100 iterations, 1 + 2 steps of each method, passes over 60,000 images: 12 against 7
    assert row["released"] == pytest.approx(48 * 20 * 100 * 2 + 3 * (3 + 5 + 7) + 12 * 60_000 * 0.2)
    assert row["ours"] == pytest.approx(32 * 20 * 100 * 1 + 3 * (2 + 4 + 6) + 7 * 60_000 * 0.1)


def test_steps_come_from_the_records(speed):
    steps = speed.steps_on_record()
    assert steps["neggrad", 16] > 0
    assert steps["adv", 256] == pytest.approx(4 * steps["adv", 64], abs=2)


def test_the_attack_acted_out_is_the_attack(released):
    model, generator = tiny_net().double(), torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (5,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        start = torch.rand_like(x) - x
        torch.manual_seed(3)
        found = released._pgd(model, x, targets, 1.0, 0.1, 8)
    assert torch.allclose(found, attack.pgd_l2(model, x, targets, eps=1.0, alpha=0.1, steps=8, start=start), atol=1e-9)


@pytest.mark.parametrize("method", ["neggrad", "adv", "adv_imp"])
def test_the_steps_acted_out_are_the_steps(released, trained, method):
    model, images, labels = trained
    model.features[7].p = 0.0  # dropout draws from other streams
    forget, few = (images[:4], labels[:4]), images[4:12].float() / 255
    adv = (few, labels[4:12]) if method != "neggrad" else None
    omega = importance.mas_importance(model, forget[0]) if method == "adv_imp" else None
    settings = Settings(unlearn_lr=1e-3, batch_size=4, adv_batch_size=8, max_passes=3)
    ours = unlearn(model, *forget, method, adv=adv, importance=omega, settings=settings)
    assert ours.steps == 3
    theirs = released.as_built(model)
    held = importance.held_weights(omega) if omega else None
    sizes = {"batch_size": 4, "adv_batch_size": 8, "lr": 1e-3, "device": torch.device("cpu")}
    steps = released.steps(theirs, released.PilImages(*forget), adv, held, **sizes)
    assert [next(steps) for _ in range(3)] == [row["acc_forget"] for row in ours.curve]
    for found, expected in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    counted = released.importance(released.as_built(model), released.PilImages(*forget), torch.device("cpu"))
    for name, value in importance.mas_importance(model, forget[0]).items():
        assert torch.allclose(counted[name], value, atol=1e-5 * value.max().clamp_min(1))


def test_the_steps_of_distill_are_compared_and_recorded(released, script, few_digits, tmp_path, monkeypatch):
    import distill_steps

    few = {"distill_mixes": 4, "distill_forget": 4, "robust_pool": 4, "robust_images": 4}
    usual = distill_steps.variants
    monkeypatch.setattr(
        distill_steps,
        "variants",
        lambda *options: {name: replace(settings, **few) for name, settings in usual(*options).items()},
    )
    monkeypatch.setattr(distill_steps, "precisions", lambda device: ("fp32",))
    monkeypatch.setattr(distill_steps, "BATCH", 4)
    monkeypatch.setattr(robust, "ITERATIONS", 2)
    record = tmp_path / "steps.json"
    small = ("--unlearn-k", 2, "--steps", 1, "--repeats", 2, "--output", record)
    code, out, err = script(distill_steps.main, "--dataset", "digits", "--model", "resnet20", *small)
    assert code == 0, err
    content = json.loads(record.read_text())
    assert set(content["seconds"]) == {
        "robust=0, fp32",
        "robust=0, fp32, frozen",
        "robust=1, fp32",
        "robust=1, fp32, frozen",
        "synthesis of an image, fp32",
    }
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in content["seconds"].values())
    slow, fast = (content["seconds"][name] for name in ("robust=1, fp32", "robust=0, fp32"))
    expected = sorted(one / other for one, other in zip(slow, fast, strict=True))
    median, least, most = content["ratios"]["robust=1, fp32 / robust=0, fp32"]
    assert [least, most] == pytest.approx(expected)
    assert median == pytest.approx(sum(expected) / 2)
    assert f"robust=1, fp32 / robust=0, fp32: {median:.2f}" in out
    assert len(content["ratios"]) == 6
