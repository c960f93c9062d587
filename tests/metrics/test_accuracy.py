"""Predictions and accuracy."""

import pytest
import torch

from l2ul.data import forget_set
from l2ul.metrics import accuracy


def test_predictions_accuracy_and_complement():
    class Blue(torch.nn.Module):
        """Calls an image 1 where blue is brighter than red; nan for a black one."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0]))

        def forward(self, x):
            total = x.sum((1, 2, 3))
            return torch.stack([x[:, 0].mean((1, 2)), x[:, 2].mean((1, 2))], 1) * self.weight * (total / total)[:, None]

    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = 9
    images[torch.tensor([1, 4]), 2] = 200
    found = accuracy.predict(Blue(), images, batch_size=2)
    assert found.tolist() == [0, 1, 0, 0, 1]
    assert accuracy.accuracy(found, torch.tensor([0, 1, 1, 0, 0])) == pytest.approx(60)
    assert forget_set.complement(torch.tensor([3, 1]), 5).tolist() == [0, 2, 4]
    images[2] = 0
    with pytest.raises(ArithmeticError, match="1 of 5 images"):
        accuracy.predict(Blue(), images)
