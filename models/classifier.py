"""A network with its input normalisation as the first layer: pixels in [0,1] in, logits out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Compute (x - mean) / std for each channel of x (N, C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A network `net` behind its preprocessing: takes pixels (N, 3, H, W) in [0,1], returns logits (N, num_classes).

    name        the name of the model, see `models.build`
    preprocess  layers that end with a Normalize
    source      where the weights came from; None for an untrained network
    sha256      hash of the weights, or of their file
    metadata    metadata of the file
    """

    def __init__(self, name: str, num_classes: int, net: nn.Module, preprocess: nn.Module):
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.source: str | None = None
        self.sha256: str | None = None
        self.metadata: dict[str, str] = {}
        self.preprocess = preprocess
        self.net = net

    @property
    def normalize(self) -> Normalize:
        """The normalisation layer."""
        return next(layer for layer in self.preprocess.modules() if isinstance(layer, Normalize))

    @torch.no_grad()
    def input_side(self, side: int) -> int:
        """Return the side of the network's input for images of (side, side) pixels: preprocessing may resize them."""
        return self.preprocess(torch.zeros(1, 3, side, side, device=self.normalize.mean.device)).shape[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.net(self.preprocess(pixels))
        return output if isinstance(output, Tensor) else output.logits  # Hugging Face, and nets with auxiliary heads
