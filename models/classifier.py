"""A network with its input normalisation as the first layer: pixels in [0,1] in, logits out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from l2ul.common.errors import InputError

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


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
    not_read    files of the model's folder and entries of its weights that were not read
    notes       sentences on what was read from the file beside the weights: the input normalisation
    """

    def __init__(self, name: str, num_classes: int, net: nn.Module, preprocess: nn.Module):
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.source: str | None = None
        self.sha256: str | None = None
        self.metadata: dict[str, str] = {}
        self.not_read: list[str] = []
        self.notes: list[str] = []
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
        return logits_of(self.net(self.preprocess(pixels)))


def logits_of(output: object) -> Tensor:
    """Return the logits in the output of a network.

    They are the output itself, its attribute or entry `logits` (Hugging Face, networks with auxiliary heads), or the
    first entry of a tuple or list. Raises TypeError if none of these is a tensor.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(f"the network returned a {type(output).__name__} without logits")
    return logits


def check_weights(net: nn.Module, source: str) -> None:
    """Raise InputError if a network has lazy, quantised or integer weights, which cannot be unlearned.

    source  what the network is, as the start of the message
    """
    tensors = [*net.named_parameters(), *net.named_buffers()]
    lazy = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if lazy:
        raise InputError(
            f"{source} has lazy weights without a shape ({lazy}); replace lazy layers by layers with input sizes, or "
            f"pass a batch through it before it is returned"
        )
    quantised = [name for name, tensor in tensors if tensor.is_quantized]
    quantised += [name for name, parameter in net.named_parameters() if not parameter.is_floating_point()]
    quantised += [name for name, module in net.named_modules() if ".quantized" in type(module).__module__]
    small = [tensor for tensor in net.buffers() if tensor.dtype in INTEGERS]  # packed weights of quantised layers
    if quantised or sum(map(torch.numel, small)) > sum(map(torch.numel, net.parameters())):
        where = f" ({quantised[0]})" if quantised and quantised[0] else ""
        raise InputError(
            f"{source} has quantised or integer weights{where}, which have no gradient; unlearn the floating-point "
            f"model and quantise the result"
        )
