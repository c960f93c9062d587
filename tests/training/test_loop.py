"""The training loop: resuming, bad states, precision and divergence."""

import dataclasses

from conftest import tiny_net
import pytest
import torch

from l2ul.common import choices, precision
from l2ul.common.errors import Diverged, InputError
from l2ul.data.images import Split
from l2ul.training import loop
from l2ul.training.recipe import Recipe

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
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(trained, tmp_path, schedule):
    recipe = dataclasses.replace(RECIPE, schedule=schedule)
    whole, rows = train(trained, tmp_path / "whole.pt", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        train(trained, tmp_path / "state.pt", epochs=2, recipe=recipe)
    again, resumed_rows = train(trained, tmp_path / "state.pt", recipe=recipe, resume=True)
    assert rows == resumed_rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_state_of_another_training_is_not_resumed(trained, tmp_path):
    train(trained, tmp_path / "state.pt")
    with pytest.raises(InputError, match="is from another recipe"):
        train(trained, tmp_path / "state.pt", recipe=dataclasses.replace(RECIPE, lr=0.01), resume=True)
    with pytest.raises(InputError, match="is from another recipe, model or data set"):
        train(trained, tmp_path / "state.pt", resume=True, identity={"excluded": [3]})


def test_a_damaged_state_is_reported(trained, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        train(trained, tmp_path / "state.pt", resume=True)


def test_bf16_needs_hardware_support_and_rounds_the_products(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_amx", lambda: False)
    with pytest.raises(InputError, match="bf16 needs a CUDA GPU, or a CPU with AMX"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    monkeypatch.setattr(precision, "has_amx", lambda: True)
    _, exact = train(trained, tmp_path / "exact.pt")
    _, short = train(trained, tmp_path / "short.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    first, second = exact[0]["loss"], short[0]["loss"]
    assert first != second  # the products were rounded
    assert first == pytest.approx(second, rel=0.02)


def test_training_stops_when_the_loss_is_not_finite(trained, tmp_path):
    with pytest.raises(Diverged, match="loss is not finite"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, lr=1e30))
