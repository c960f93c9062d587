"""Out of memory: recognised in the errors of all libraries, answered with smaller batches, never taken for another."""

from conftest import tiny_net
import pytest
import torch
from torch import nn

from l2ul import attack
from l2ul.common.errors import is_out_of_memory
from l2ul.common.memory import smaller_batch
from l2ul.deletion import plausibility
from l2ul.metrics import accuracy, robustness
from l2ul.models.classifier import Classifier, Normalize
from l2ul.objective import Forget

MESSAGES = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "CUDA error: out of memory",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "GET was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to mmap 1024 bytes from file </torch_1>: Cannot allocate memory (12)",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_all_libraries_are_recognised(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_other_errors_are_not_about_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


@pytest.mark.parametrize(("size", "half"), [(256, 128), (100, 48), (20, 8), (9, 5), (8, 4), (3, 2), (2, 1)])
def test_a_batch_is_halved_to_a_multiple_of_eight(size, half):
    assert smaller_batch(size, MemoryError()) == half


def test_a_batch_of_one_or_another_error_is_not_answered():
    for size, error in ((1, MemoryError()), (8, RuntimeError("shapes differ"))):
        with pytest.raises(type(error)):
            smaller_batch(size, error)


def limited(model, most, error):
    """Let a model raise an error for batches of more than `most` images; return the list of sizes that it accepts."""
    sizes = []

    def check(module, inputs):
        if len(inputs[0]) > most:
            raise error
        sizes.append(len(inputs[0]))

    model.register_forward_pre_hook(check)
    return sizes


@pytest.mark.parametrize("most", [17, 8, 1])
def test_evaluation_goes_on_in_halves_with_the_same_predictions(trained, most):
    model, images, _ = trained
    expected = torch.cat(list(accuracy.logits(model, images)))
    sizes = limited(model, most, RuntimeError(MESSAGES[3]))
    result = torch.cat(list(accuracy.logits(model, images, batch_size=32)))
    assert torch.allclose(result, expected, atol=1e-5)
    assert sum(sizes) == len(images)
    assert max(sizes) <= most
    assert torch.equal(accuracy.predict(model, images, batch_size=32, shared=True), expected.argmax(1))


def test_evaluation_raises_what_is_not_about_memory_or_is_too_large_for_one_image(trained):
    model, images, _ = trained
    limited(model, 0, MemoryError())
    with pytest.raises(MemoryError):
        accuracy.predict(model, images)
    limited(model, -1, RuntimeError("shapes differ"))
    with pytest.raises((RuntimeError, MemoryError)):
        accuracy.predict(model, images)


def test_a_failed_batch_does_not_keep_its_memory(trained):
    model, images, _ = trained
    alive = []

    class Activations:
        def __del__(self):
            alive.remove(self.number)

    def grow(module, inputs):
        large = Activations()
        large.number = len(inputs[0])
        alive.append(large.number)
        if sum(alive) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(grow)
    assert len(accuracy.predict(model, images, batch_size=32)) == len(images)
    assert alive == []


def test_robustness_raises_out_of_memory_in_place_of_a_model_that_cannot_run(trained, monkeypatch):
    model, images, labels = trained
    changed = tiny_net()
    limited(changed, 0, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(robustness, "changed_weights", lambda model, form: changed)
    monkeypatch.setattr(robustness, "COPIES", 1)
    with pytest.raises(torch.OutOfMemoryError):
        robustness.as_used(model, Forget(images[:2] / 255, labels[:2]))


def test_the_search_for_other_readings_of_a_request_raises_out_of_memory():
    class Alternative:
        def compute(self, images):
            raise MemoryError

    with pytest.raises(MemoryError):
        plausibility._try(Alternative(), torch.rand(1, 3, 8, 8))


def test_default_batches_fit_the_input_of_the_network_where_the_model_enlarges_images(monkeypatch):
    enlarge = nn.Sequential(nn.Upsample(size=(80, 80)), nn.AdaptiveAvgPool2d(8), Normalize([0.5] * 3, [0.5] * 3))
    large = nn.Sequential(nn.Upsample(size=(80, 80)), Normalize([0.5] * 3, [0.5] * 3))
    net, images = nn.Sequential(nn.AdaptiveAvgPool2d(8), tiny_net()), torch.rand(10, 3, 8, 8)
    monkeypatch.setitem(accuracy.BATCH_SIZE, "cpu", (8, 4))
    monkeypatch.setitem(attack.BATCH_SIZE, "cpu", (24, 16))
    for preprocess, evaluated, attacked in ((enlarge, 8, 24), (large, 4, 16)):
        model = Classifier("tiny", 5, net, preprocess).eval()
        sizes = limited(model, 99, None)
        accuracy.predict(model, images)
        assert max(sizes) == evaluated
        sizes.clear()
        attack.adversarial_set(
            model, images, torch.zeros(10, dtype=torch.int64), 5, num_adv_images=4, eps=1.0, alpha=0.1, steps=1, seed=0
        )
        assert max(sizes) == attacked
