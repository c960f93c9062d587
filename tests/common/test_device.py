"""The choice of the device, and independence of PyTorch's defaults for new tensors."""

import contextlib
import os

from conftest import CLASSES
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from l2ul import attack, importance, models
from l2ul.common import device
from l2ul.common.errors import InputError
from l2ul.data import datasets
from l2ul.data.images import Split
from l2ul.methods.settings import AttackSettings, Settings
from l2ul.metrics import accuracy, membership, robustness
from l2ul.objective import Forget
from l2ul.unlearn import unlearn


def test_the_chosen_device_must_exist():
    assert device.choose_device("cpu").type == "cpu"
    assert device.choose_device(None, no_cuda=True).type == "cpu"
    with pytest.raises(InputError, match="contradict"):
        device.choose_device("cuda", no_cuda=True)
    with pytest.raises(InputError, match="--device cuda is not available on this machine; expected one of"):
        device.choose_device("cuda")


def test_tests_and_the_processes_they_start_use_the_cpu():
    assert device.choose_device(None).type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.cuda
def test_tests_with_the_mark_use_the_gpu():
    assert device.choose_device(None).type == "cuda"


@pytest.mark.parametrize(
    ("others", "options", "threads"),
    [
        (0.2, {}, 4),
        (1.7, {}, 2),
        (9.0, {}, 1),
        (9.0, {"threads": 3}, 3),  # the user's choice
        (9.0, {"report": None}, 4),  # a caller that does not ask for it
    ],
)
def test_a_busy_machine_is_reported_and_its_other_processes_keep_their_cores(monkeypatch, others, options, threads):
    before, sentences = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "other_processes", lambda: others)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    torch.set_num_threads(4)
    try:
        device.choose_device("cpu", **{"report": sentences.append} | options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    if threads < 3:
        assert f"compute on 4 cores; using {threads} of 4 threads" in sentences[0]
    assert len(sentences) == (threads < 3)


def test_the_load_of_processes_that_have_ended_does_not_count(monkeypatch):
    monkeypatch.setattr(device.os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    monkeypatch.setattr(device, "SAMPLE_SECONDS", 0)
    for running, expected in (("1/200", 0.0), ("3/200", 2.0), ("9/200", 3.5)):
        text = f"3.50 0.00 0.00 {running} 77\n"
        monkeypatch.setattr(device.Path, "read_text", lambda path, content=text: content)
        assert device.other_processes() == expected


@contextlib.contextmanager
def defaults(dtype, place):
    torch.set_default_dtype(dtype)
    torch.set_default_device(place)
    try:
        yield
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (dtype, place)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def unlearned(model, images, labels, method, **settings):
    few = {"attack": AttackSettings(num_adv_images=2, iterations=2), "retain": Split(images, labels)}
    fast = Settings(max_passes=2, batch_size=2, distill_steps=2, distill_cycles=1, distill_mixes=4, **settings)
    return parameters_to_vector(
        unlearn(model, images, labels, method, num_classes=CLASSES, settings=fast, **few).model.parameters()
    )


CALLS = {
    "pgd_l2": lambda model, x, y: attack.pgd_l2(model, x, y, eps=1.0, alpha=0.5, steps=2, generator=torch.Generator()),
    "adversarial_set": lambda model, x, y: attack.adversarial_set(
        model, x, y, CLASSES, num_adv_images=2, eps=1.0, alpha=0.5, steps=2, seed=0
    )[0],
    "mas_importance": lambda model, x, y: importance.mas_importance(model, x)["head.weight"],
    "predict": lambda model, x, y: accuracy.predict(model, x),
    "as_used": lambda model, x, y: robustness.as_used(model, Forget(x.to(torch.float32) / 255, y)).copies,
    "inference": lambda model, x, y: membership.inference(
        (model(x.to(torch.float32) / 255).detach(), y), (model(x.flip(3).to(torch.float32) / 255).detach(), y)
    ),
    "datasets": lambda model, x, y: datasets.load("digits", "nowhere").train.images,
    **{
        f"unlearn {method}": lambda model, x, y, method=method: unlearned(model, x, y, method)
        for method in ("rawp", "oracle", "adv_imp", "distill", "random_labels", "jit")
    },
    "unlearn robust": lambda model, x, y: unlearned(model, x, y, "distill", robust=1, robust_images=0),
}


@pytest.mark.parametrize(("dtype", "place"), [(torch.float64, "cpu"), (torch.float32, "meta")])
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_defaults_of_torch(trained, name, dtype, place):
    model, images, labels = trained
    inputs = model, images[:4], labels[:4]
    expected = CALLS[name](*inputs)
    with defaults(dtype, place):
        result = CALLS[name](*inputs)
    if isinstance(expected, dict):
        assert result == expected
    else:
        assert (result.dtype, result.device) == (expected.dtype, expected.device)
        assert torch.equal(result, expected)


def test_models_are_in_float32_whatever_the_default(tmp_path):
    images = torch.rand(2, 3, 32, 32)
    expected = models.build("resnet20", 10).eval()
    models.save(expected, tmp_path / "weights.safetensors", {})
    with defaults(torch.float64, "cpu"):
        loaded = models.load("resnet20", 10, tmp_path / "weights.safetensors")
        assert models.build("resnet20", 10)(images).dtype == torch.float32
    assert torch.allclose(loaded(images), expected(images), rtol=1e-4)
