"""The training loop: resuming, bad states, precision, divergence, CUDA graphs, and what its steps cost."""

import collections
import dataclasses

from conftest import tiny_net
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2ul.common import choices, precision, seeds
from l2ul.common.errors import Diverged, InputError
from l2ul.data.augment import augment
from l2ul.data.images import Split
from l2ul.training import loop
from l2ul.training.recipe import Recipe

RECIPE = Recipe(epochs=4, lr=0.05, batch_size=16, crop_padding=1, flip=True)


@pytest.fixture(autouse=True)
def save_each_epoch(monkeypatch):
    monkeypatch.setattr(loop, "SAVING", 1.0)


def train(trained, state_file, epochs=None, recipe=RECIPE, resume=False, identity=None, device="cpu", **options):
    _, images, labels = trained
    model, split = tiny_net(5).to(device), Split(images, labels).to(device)

    def stop(row):
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    options |= {"state_file": state_file, "identity": identity, "resume": resume, "on_epoch": stop}
    return model, loop.fit(model, split, split, recipe, seed=0, **options)


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
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    with pytest.raises(InputError, match="bf16 needs a CUDA GPU, or a CPU with AMX or AVX512-BF16"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    _, exact = train(trained, tmp_path / "exact.pt")
    _, short = train(trained, tmp_path / "short.pt", recipe=dataclasses.replace(RECIPE, precision="bf16"))
    first, second = exact[0]["loss"], short[0]["loss"]
    assert first != second  # the products were rounded
    assert first == pytest.approx(second, rel=0.02)


def test_training_stops_when_the_loss_is_not_finite(trained, tmp_path):
    with pytest.raises(Diverged, match="loss is not finite"):
        train(trained, tmp_path / "s.pt", recipe=dataclasses.replace(RECIPE, lr=1e30))


def test_the_crops_of_an_epoch_are_those_of_its_batches(trained):
    _, images, labels = trained
    steps = list(loop._steps(Split(images, labels), 6, RECIPE, seeds.generator(3, "crops"), 0))
    generator = seeds.generator(3, "crops")
    order = torch.randperm(40, generator=generator).split(16)
    assert [step.batch_size for step in steps] == [16, 16, 8]
    for step, batch in zip(steps, order, strict=True):
        assert torch.equal(step.images, augment(images[batch], 1, True, generator, 6))
        assert torch.equal(step.labels, labels[batch])


def test_an_epoch_reads_from_the_device_once(trained, tmp_path):
    class Reads(TorchDispatchMode):
        counts = collections.Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[func] += 1
            return func(*args, **(kwargs or {}))

    model, images, labels = trained
    steps = loop._steps(Split(images, labels), 8, RECIPE, seeds.generator(3, "crops"), 0)
    optimizer = loop._optimizer(model, RECIPE)
    scheduler = loop._scheduler(optimizer, RECIPE, 40)
    with Reads() as mode:
        loop._train_epoch(
            lambda *batch: loop._gradients(model, RECIPE, *batch), steps, RECIPE, optimizer, scheduler, None
        )
    assert mode.counts[torch.ops.aten.convolution.default] == 2 * 3
    assert mode.counts[torch.ops.aten._local_scalar_dense.default] == 1


def test_the_state_is_not_saved_more_often_than_a_share_of_the_time_allows(trained, tmp_path, monkeypatch):
    now, saved = [0.0], []

    def save(state, file):
        file.touch()
        saved.append(len(state["history"]))
        now[0] += 1

    def predict(*arguments, **options):
        now[0] += 8  # seconds of an epoch
        return labels

    labels = trained[2]
    monkeypatch.setattr(loop, "SAVING", 1 / 20)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.torch, "save", save)
    monkeypatch.setattr(loop.accuracy, "predict", predict)
    train(trained, tmp_path / "state.pt", recipe=dataclasses.replace(RECIPE, epochs=9))
    assert saved == [1, 3, 5, 8]


def test_graphs_are_left_out_on_a_cpu(trained, tmp_path):
    plain, rows = train(trained, tmp_path / "plain.pt")
    other, same_rows = train(trained, tmp_path / "other.pt", graph=True)
    assert same_rows == rows
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", choices.PRECISIONS)
def test_training_with_real_graphs_equals_training_without(trained, tmp_path, precision):
    recipe = dataclasses.replace(RECIPE, epochs=6, precision=precision)
    plain, rows = train(trained, tmp_path / "plain.pt", recipe=recipe, device="cuda")
    graphed, same = train(trained, tmp_path / "graphed.pt", recipe=recipe, device="cuda", graph=True)
    assert [row["loss"] for row in same] == pytest.approx([row["loss"] for row in rows], rel=0.02)
    for one, other in zip(plain.parameters(), graphed.parameters(), strict=True):
        assert (one - other).abs().max() < 0.02
