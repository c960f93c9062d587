"""D_f from a folder, continual runs and the retain sample: complete commands on a few digits."""

import csv
import json

from conftest import FAST, ROOT
from helpers import load_records, without_costs
import numpy as np
from PIL import Image
import pytest
import torch

from l2ul import attack, models
from l2ul.metrics import accuracy
import main_unlearn


def steps(records):
    return {(r["method"], r["continual_step"]): r for r in records.values()}


CONTINUAL = ["--continual-step", 2, "--unlearn-k", 6, "--method", "before", "neggrad", "adv_imp", "--max-passes", 40]


def test_each_continual_step_starts_from_the_previous_model_with_its_own_images(run, tmp_path, few_digits, monkeypatch):
    attacked = []
    true_set = attack.adversarial_set

    def watch(model, images, *arguments, **options):
        attacked.append((len(images), options["first_position"]))
        return true_set(model, images, *arguments, **options)

    monkeypatch.setattr(attack, "adversarial_set", watch)
    code, out, err = run(*CONTINUAL)
    assert code == 0, err
    assert attacked == [(2, 0), (2, 2), (2, 4)]
    records = steps(load_records(tmp_path))
    assert set(records) == {(m, s) for m in ("before", "neggrad", "adv_imp") for s in (1, 2, 3)}
    for (method, step), record in records.items():
        assert (record["k"], record["continual_size"]) == (2 * step, 2)
        assert (record["acc_forget_earlier"] is None) == (step == 1)
        if method == "before":
            assert record["acc_forget"] == record["acc_forget_before"]
    for identity, record in load_records(tmp_path).items():
        indices = [int(line) for line in (tmp_path / "runs" / f"{identity}.txt").read_text().split()]
        assert len(indices) == record["k"]
        with np.load(tmp_path / "runs" / f"{identity}.npz") as kept:
            assert len(kept["forget_after"]) == 2
            assert len(kept["retain_after"]) == 40 - record["k"]
            if record["continual_step"] > 1:
                labels = few_digits.train.labels[indices[:-2]].numpy()
                assert 100 * (kept["forget_earlier_after"] == labels).mean() == record["acc_forget_earlier"]
    assert "earlier D_f %" in out


def test_an_interrupted_continual_run_continues_with_the_same_result(run, tmp_path):
    assert run(*CONTINUAL)[0] == 0
    whole = load_records(tmp_path)
    last = {i for i, r in whole.items() if r["continual_step"] == 3 and r["method"] != "before"}
    for identity in last:
        (tmp_path / "runs" / f"{identity}.json").unlink()
    code, out, _ = run(*CONTINUAL)
    assert code == 0
    assert "2 runs to do, 7 done" in out
    assert {i: without_costs(r) for i, r in load_records(tmp_path).items()} == {
        i: without_costs(r) for i, r in whole.items()
    }
    # if the models of earlier steps are missing, they are made again
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    for identity in last:
        (tmp_path / "runs" / f"{identity}.json").unlink()
    assert run(*CONTINUAL)[0] == 0
    assert {i: without_costs(r) for i, r in load_records(tmp_path).items()} == {
        i: without_costs(r) for i, r in whole.items()
    }


def test_the_steps_after_a_diverged_step_diverge_too(run, tmp_path):
    lost = ["--unlearn-lr", "1e30", "--bn", "eval", "--method", "adv"]
    code, out, err = run("--continual-step", 2, "--unlearn-k", 6, *lost)
    assert code == 0, err
    for (_, step), record in steps(load_records(tmp_path)).items():
        assert record["status"] == "diverged"
        assert (record["steps"] == 0) == (step > 1)
        assert record["acc_test"] is None
    assert "3 diverged" in out or out.count("1 diverged") == 3


def test_each_step_draws_its_own_noise(run, tmp_path):
    arguments = ["--method", "rawp", "--max-passes", 3, "--noise-growth", 1e-3]
    assert run("--continual-step", 2, "--unlearn-k", 4, *arguments)[0] == 0
    assert run("--unlearn-k", 2, *arguments, "--save-model")[0] == 0
    before = models.load("resnet20", 10, ROOT / "data/weights/digits_resnet20.safetensors")
    nets = [before]
    for record in sorted(load_records(tmp_path).items(), key=lambda item: item[1]["k"]):
        if record[1]["continual_step"]:
            nets.append(models.load("resnet20", 10, tmp_path / "models" / f"{record[0]}.safetensors"))
    weights = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
    first, second = weights[1] - weights[0], weights[2] - weights[1]
    assert torch.cosine_similarity(first, second, dim=0).abs() < 0.02
    (alone,) = [i for i, r in load_records(tmp_path).items() if r["continual_step"] is None]
    same = models.load("resnet20", 10, tmp_path / "models" / f"{alone}.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), nets[1].parameters(), strict=True))


def test_a_step_repeated_for_its_model_keeps_its_record(run, tmp_path):
    assert run(*CONTINUAL[:4], "--method", "neggrad")[0] == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    (last,) = [i for i, r in load_records(tmp_path).items() if r["continual_step"] == 3]
    (tmp_path / "runs" / f"{last}.json").unlink()
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    assert run(*CONTINUAL[:4], "--method", "neggrad")[0] == 0
    assert all(p.stat().st_mtime_ns == when for p, when in times.items() if last not in p.name)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == len(list((tmp_path / "models").glob("*.md"))) == 3


@pytest.fixture
def digits_folder(tmp_path, few_digits):
    """Save slightly changed test images in a folder per class, two of them in the folder of another class."""
    for i in range(8):
        label = int(few_digits.test.labels[i])
        label = (label + 1) % 10 if i in (2, 5) else label
        path = tmp_path / "images" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = few_digits.test.images[i].permute(1, 2, 0).numpy().copy()
        pixels[0, 0, 0] ^= 1  # so that it is not a test image
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def test_corrects_the_misclassified_images_of_a_folder(run, tmp_path, digits_folder, few_digits):
    weights = ROOT / "data/weights/digits_resnet20.safetensors"
    called = accuracy.predict(models.load("resnet20", 10, weights), few_digits.test.images[:8])
    assert torch.equal(called, few_digits.test.labels[:8])
    folder = next(digits_folder.iterdir()) / ".."  # recorded by its name
    arguments = ["--forget-dir", folder, "--goal", "relabel", "--method", "correct", "--max-passes", 100]
    code, out, err = run(*arguments, "--unlearn-k", 2, "--unlearn-lr", 0.02)
    assert code == 0, err
    ((identity, record),) = load_records(tmp_path).items()
    assert (record["k"], record["status"], record["acc_relabel"], record["acc_forget"]) == (2, "forgotten", 100.0, 0.0)
    assert record["acc_forget_before"] == 100  # the labels to move away from are the predictions
    assert record["forget_dir"] == "images"
    names = (tmp_path / "runs" / f"{identity}.txt").read_text().split()
    assert sorted(name.split("/")[1] for name in names) == ["2.png", "5.png"]
    with np.load(tmp_path / "runs" / f"{identity}.npz") as kept:
        assert len(kept["retain_after"]) == 40


def test_forgets_the_images_of_a_folder(run, tmp_path, digits_folder):
    code, _, err = run("--forget-dir", digits_folder, "--method", "neggrad", "--unlearn-k", 8)
    assert code == 0, err
    (record,) = load_records(tmp_path).values()
    assert record["acc_forget_before"] == 75  # two are in the folder of another class


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--forget-dir", "nowhere"], "--forget-dir nowhere does not hold images in a subfolder per class"),
        (["--forget-dir", "tests", "--forget-file", "x"], "leave out --forget-file and --relabel-file"),
        (["--forget-dir", "IMAGES", "--unlearn-k", 9], "--unlearn-k is 9, but"),
        (["--forget-dir", "IMAGES", "--unlearn-k", 3, "--goal", "relabel"], "has 2 images to forget"),
        (
            ["--forget-dir", "ODD"],
            "has a subfolder 'ten', which is no class of the data set; expected names such as '0'",
        ),
        (["--forget-dir", "RIGHT", "--goal", "relabel"], "classifies every image of"),
        (
            ["--forget-dir", "OWN"],
            "0.png is a training image of the data set; choose training images with --forget-file",
        ),
        (["--retain-sample", 1, "--unlearn-k", 39], "all of these images are to be forgotten; use a larger sample"),
        (["--continual-step", 4, "--unlearn-k", 6], "expected one multiple of the step, such as 16"),
        (["--continual-step", 4, "--unlearn-k", 4, 8], "expected one multiple of the step"),
        (["--continual-step", 5, "--forget-dir", "IMAGES"], "add --unlearn-k with a multiple of the step"),
        (["--method", "correct"], "method correct does not support the goal misclassify"),
        (["--retain-sample", 0], "expected a whole number of at least 1"),
        (["--adv-dtype", "int4"], "'int4' is not allowed; expected one of float32, float16, uint8; did you mean"),
    ],
)
def test_bad_forget_sets_are_rejected_in_a_sentence(script, tmp_path, digits_folder, few_digits, arguments, complaint):
    odd, right = tmp_path / "odd" / "ten", tmp_path / "right" / str(int(few_digits.test.labels[0]))
    for folder in (odd, right):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(next(digits_folder.glob("*/0.png")).read_bytes())
    own = tmp_path / "own" / str(int(few_digits.train.labels[0])) / "0.png"
    own.parent.mkdir(parents=True)
    Image.fromarray(few_digits.train.images[0].permute(1, 2, 0).numpy()).save(own)
    places = {"OWN": own.parent.parent, "IMAGES": digits_folder, "ODD": odd.parent, "RIGHT": right.parent}
    fast = FAST[2:] if "--forget-dir" in arguments else FAST  # without --unlearn-k: all images of the folder
    given = [places.get(word, word) for word in arguments]
    code, _, err = script(main_unlearn.main, "--result-dir", tmp_path, *fast, *given)
    assert (code, err.count("\n")) == (2, 1), err
    assert complaint in err
    assert not load_records(tmp_path)


def test_a_retain_sample_is_measured_in_place_of_d_r(run, tmp_path):
    assert run("--retain-sample", 10, "--method", "before", "neggrad", "--seed", 0, 1)[0] == 0
    for identity, record in load_records(tmp_path).items():
        assert record["retain_sample"] == 10
        assert record["retain_measured"] <= 10
        assert record["acc_retain_low"] < record["acc_retain"] <= record["acc_retain_high"] <= 100
        forgotten = {int(line) for line in (tmp_path / "runs" / f"{identity}.txt").read_text().split()}
        with np.load(tmp_path / "runs" / f"{identity}.npz") as kept:
            indices = kept["retain_indices"]
            assert len(indices) == len(kept["retain_after"]) == record["retain_measured"]
            assert not forgotten & set(indices.tolist())
    sampled = {r["acc_retain_before"] for r in load_records(tmp_path).values()}
    assert run("--method", "before")[0] == 0  # on all of D_r, which is another record
    whole = [r for r in load_records(tmp_path).values() if r["retain_sample"] is None]
    assert len(whole) == 1
    assert sampled
    assert whole[0]["acc_retain_low"] is None


def test_the_interval_is_wilsons():
    predictions, labels = torch.ones(20, dtype=torch.long), torch.cat([torch.ones(18), torch.zeros(2)]).long()
    z, n, p = 1.959964, 20, 0.9
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5,
    )
    assert accuracy.interval(predictions, labels) == pytest.approx((100 * (centre - half), 100 * (centre + half)), 1e-5)


def test_records_are_plain_json_and_curves_have_a_row_a_step(run, tmp_path):
    assert run("--method", "rawp", "--max-passes", 3)[0] == 0
    ((identity, record),) = load_records(tmp_path).items()
    json.dumps(record, allow_nan=False)
    with open(tmp_path / "runs" / f"{identity}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == record["steps"]
