"""The choice of the device."""

import os

import pytest

from l2ul.common import device
from l2ul.common.errors import InputError


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
