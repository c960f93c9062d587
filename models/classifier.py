"""A net with its input normalisation in front: pixels in [0,1] in, logits out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std a channel; x (N, C, H, W) in [0,1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """What is unlearned.

    `name`, `num_classes` and, where weights were loaded, `source`, `sha256` and the file's `metadata` describe it.
    """

    def __init__(self, name: str, num_classes: int, net: nn.Module, preprocess: nn.Module):
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.source: str | None = None
        self.sha256: str | None = None
        self.metadata: dict[str, str] = {}
        self.preprocess = preprocess  # the last layer of it is a Normalize
        self.net = net

    @property
    def normalize(self) -> Normalize:
        return next(layer for layer in self.preprocess.modules() if isinstance(layer, Normalize))

    @torch.no_grad()
    def input_side(self, side: int) -> int:
        """Pixels a side of what the net is given for images of (side, side): its own preprocessing may resize."""
        return self.preprocess(torch.zeros(1, 3, side, side, device=self.normalize.mean.device)).shape[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.net(self.preprocess(pixels))
        return output if isinstance(output, Tensor) else output.logits  # Hugging Face, and nets with auxiliary heads
