"""Nested tensors that reach a GPU in one copy. The copy itself is counted in `test_cuda.py`."""

import torch

from l2ul.common import nested


def test_gathered_tensors_are_one_tensor_from_which_they_are_spread():
    small, none = torch.tensor([[True, False, True]]), torch.empty(0, 4)
    values = [torch.arange(3), [torch.tensor(0.5), [small, torch.rand(2, 5)[:, ::2]]], none, torch.arange(7) > 3]
    (packed,) = nested.gather(values)
    assert (packed.dtype, packed.ndim) == (torch.uint8, 1)
    first, (number, (mask, strided)), empty, last = nested.spread([packed], values)
    for one, other in zip(nested.flat(values), (first, number, mask, strided, empty, last), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert nested.gather([[]]) == []
