"""Pretraining: a run that was stopped ends as one that was not, and nothing is saved under a wrong name."""

import dataclasses
import json

from conftest import tiny_net
import pytest
import torch

from l2ul.common import choices, device
from l2ul.common import precision as precisions
from l2ul.common.errors import Diverged, InputError
from l2ul.data import datasets
from l2ul.data import datasets as data
from l2ul.data.augment import augment
from l2ul.data.forget_set import choose_forget
from l2ul.data.images import Split
from l2ul.training import command as main_pretrain
from l2ul.training import loop
from l2ul.training.loop import Recipe
from models import checkpoint

RECIPE = Recipe(epochs=4, lr=0.05, batch_size=16, crop_padding=1, flip=True)


def train(trained, state_file, epochs=None, recipe=RECIPE, resume=False, identity=None):
    _, images, labels = trained
    model, split = tiny_net(5), Split(images, labels)

    def stop(row):
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    rows = loop.fit(
        model, split, split, recipe, seed=0, state_file=state_file, identity=identity, resume=resume, on_epoch=stop
    )
    return model, rows


@pytest.mark.parametrize("schedule", choices.SCHEDULES)
def test_a_stopped_run_ends_as_one_that_was_not(trained, tmp_path, schedule):
    recipe = dataclasses.replace(RECIPE, schedule=schedule)
    whole, rows = train(trained, tmp_path / "whole.pt", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        train(trained, tmp_path / "state.pt", epochs=2, recipe=recipe)
    again, resumed_rows = train(trained, tmp_path / "state.pt", recipe=recipe, resume=True)
    assert rows == resumed_rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_state_of_another_recipe_is_refused(trained, tmp_path):
    train(trained, tmp_path / "state.pt")
    with pytest.raises(InputError, match="is from another recipe"):
        train(trained, tmp_path / "state.pt", recipe=dataclasses.replace(RECIPE, lr=0.01), resume=True)
    with pytest.raises(InputError, match="is from another recipe, net or data set"):
        train(trained, tmp_path / "state.pt", resume=True, identity={"excluded": [3]})


def test_damaged_state_is_said_to_be(trained, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        train(trained, tmp_path / "state.pt", resume=True)


def test_bf16_needs_units_for_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(precisions, "has_amx", lambda: False)
    with pytest.raises(InputError, match="bf16 needs a CUDA GPU, or a CPU with AMX"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    monkeypatch.setattr(precisions, "has_amx", lambda: True)
    _, exact = train(trained, tmp_path / "exact.pt")
    _, short = train(trained, tmp_path / "short.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    first, second = exact[0]["loss"], short[0]["loss"]
    assert first != second  # the products were rounded
    assert first == pytest.approx(second, rel=0.02)


def test_a_lost_loss_ends_it(trained, tmp_path):
    with pytest.raises(Diverged, match="no longer finite"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, lr=1e30))


def test_crops_are_each_images_own_and_mirrored_half_the_time():
    rows, columns = torch.meshgrid(torch.arange(1, 7), torch.arange(1, 7), indexing="ij")
    image = torch.stack([rows, columns, rows * 10 + columns]).to(torch.uint8)
    images = image.expand(400, -1, -1, -1)
    found = augment(images, 2, True, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    mirrored, places = 0, set()
    for one in found:
        inside = one[2] > 0
        assert torch.equal(one[2][inside], (one[0] * 10 + one[1])[inside])  # channels move together
        steps = one[1][:, 1:].int() - one[1][:, :-1].int()
        backwards = (steps[inside[:, 1:] & inside[:, :-1]] == -1).all().item()
        mirrored += backwards
        places.add((int(one[0].max()), int(one[0][one[0] > 0].min()), int(one[1].max()), int(one[1][one[1] > 0].min())))
    assert 150 < mirrored < 250
    assert len(places) == 25
    same = augment(images[:3], 0, False, torch.Generator())
    assert torch.equal(same, images[:3])


def test_script_saves_where_unlearning_looks_and_excludes_under_another_name(script, tmp_path, monkeypatch):
    digits = datasets.load("digits", tmp_path)
    few = dataclasses.replace(digits, train=Split(*_head(digits.train, 96)), test=Split(*_head(digits.test, 32)))
    monkeypatch.setattr(data, "load", lambda *arguments, **options: few)

    def call(*arguments):
        recipe = Recipe(epochs=9, lr=0.1, crop_padding=2, flip=False)
        main = lambda: main_pretrain.main("main_pretrain_x.py", "Train.", "digits", "resnet20", recipe)  # noqa: E731
        return script(main, "--data-dir", tmp_path, "--epochs", 1, "--batch-size", 64, *arguments)

    code, out, err = call("--lr", "1e-3")
    assert code == 0, err
    usual = tmp_path / "weights" / "digits_resnet20.safetensors"
    assert usual.exists()
    assert f"D_test {out.split('D_test ')[-1]}" in out
    assert not list(usual.parent.glob("*.training.pt"))
    metadata = checkpoint.read(usual)[1]
    assert (metadata["lr"], metadata["epochs"], metadata["dataset"]) == ("0.001", "1", '"digits"')
    assert "exists already" in call("--lr", "1e-3")[1]
    assert "was trained with lr 0.001, not 0.1; add --rerun" in call("--lr", 0.1)[2]
    (tmp_path / "out.txt").write_text("5\n1\n")
    assert call("--exclude", tmp_path / "out.txt")[0] == 0
    assert "exists already" in call("--exclude", tmp_path / "out.txt")[1]
    (retrained,) = usual.parent.glob("digits_resnet20_without_2_*.safetensors")
    assert checkpoint.read(retrained)[1]["excluded"] == "[5, 1]"
    assert call("--exclude-k", 3, "--exclude-seed", 7)[0] == 0
    (chosen,) = usual.parent.glob("digits_resnet20_without_3_*.safetensors")
    assert json.loads(checkpoint.read(chosen)[1]["excluded"]) == choose_forget(96, 3, 7).tolist()
    for arguments, expected in (
        (["--exclude", tmp_path / "none.txt"], 2),
        (["--exclude", tmp_path / "out.txt", "--exclude-k", 3], 2),
        (["--exclude-k", 96], 2),
        (["--output", tmp_path / "net.pt"], 2),
        (["--model", "hf:somewhere"], 2),
        (["--lr", "1e30", "--rerun"], 1),
    ):
        code, _, err = call(*arguments)
        assert (code, err.count("\n")) == (expected, 1)


def _head(split, count):
    return split.images[:count], split.labels[:count]


def test_device_choices():
    assert device.choose_device("cpu").type == "cpu"
    assert device.choose_device(None, no_cuda=True).type in ("cpu", "mps")
    with pytest.raises(InputError, match="contradict"):
        device.choose_device("cuda", no_cuda=True)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda is not there on this machine; expected one of"):
            device.choose_device("cuda")
