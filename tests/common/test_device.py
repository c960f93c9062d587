"""The choice of the device."""

import pytest
import torch

from l2ul.common import device
from l2ul.common.errors import InputError


def test_the_chosen_device_must_exist():
    assert device.choose_device("cpu").type == "cpu"
    assert device.choose_device(None, no_cuda=True).type in ("cpu", "mps")
    with pytest.raises(InputError, match="contradict"):
        device.choose_device("cuda", no_cuda=True)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda is not available on this machine; expected one of"):
            device.choose_device("cuda")
