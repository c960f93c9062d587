"""Fused optimizers: gradients whose strides differ from those of the weights in dimensions of size 1."""

import pytest
import torch
from torch import nn

from l2ul.common.fused_optimizers import fused


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_gradients_get_the_strides_of_their_weights(kind):
    weights = [nn.Parameter(torch.arange(6.0).view(3, 2, 1, 1)) for _ in range(2)]
    optimizers = kind(weights[:1], lr=0.1), fused(kind, weights[1:], lr=0.1)
    for one, optimizer in zip(weights, optimizers, strict=True):
        one.grad = torch.empty(3, 2, 1, 1, memory_format=torch.channels_last).copy_(1 - one.detach())
        assert one.grad.stride() != one.stride()
        memory = one.grad.data_ptr()
        optimizer.step()
    assert weights[1].grad.stride() == weights[1].stride()
    assert weights[1].grad.data_ptr() == memory
    assert torch.allclose(weights[0], weights[1])
