"""A network with its input normalisation as the first layer: pixels in [0,1] in, logits out."""

from collections.abc import Mapping, Sequence
import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from l2ul.common.errors import InputError
from l2ul.common.modes import eval_mode, removing
from l2ul.models.outputs import LOGITS, PROBABILITIES, log_probabilities

PROBE_SIDE = 32  # pixels of the image with which `input_channels` reaches the first layer
NO_VIEW = "view size is not compatible"  # torch's error where code calls `view` on a channels-last tensor
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
    """A network `net` behind its preprocessing: takes pixels (N, C, H, W) in [0,1], returns logits (N, num_classes).

    C is `channels`: 3, or 1 for grey images.

    name        the name of the model, see `models.build`
    preprocess  layers that end with a Normalize
    source      where the weights came from; None for an untrained network
    sha256      hash of the weights, or of their file
    metadata    of the file, see `checkpoint.read`
    not_read    files of the model's folder and entries of its weights that were not read
    notes       sentences on what was read from the file beside the weights: the input normalisation
    outputs     what the network returns, see `models.outputs.adapt`: of probabilities, the logarithms are logits
    contiguous  whether the network gets its inputs in the default memory format. It is set when its code turns out to
                call `view` on tensors that are channels-last, the faster format, which is used otherwise
    """

    def __init__(self, name: str, num_classes: int, net: nn.Module, preprocess: nn.Module):
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.source: str | None = None
        self.sha256: str | None = None
        self.metadata: dict[str, object] = {}
        self.not_read: list[str] = []
        self.notes: list[str] = []
        self.outputs = LOGITS
        self.contiguous = False
        self.preprocess = preprocess
        self.net = net

    @property
    def normalize(self) -> Normalize:
        """The normalisation layer."""
        return next(layer for layer in self.preprocess.modules() if isinstance(layer, Normalize))

    @property
    def channels(self) -> int:
        """The channels of the images that the network takes."""
        return self.normalize.mean.numel()

    @torch.no_grad()
    def input_side(self, side: int) -> int:
        """Return the side of the network's input for images of (side, side) pixels: preprocessing may resize them."""
        return self.preprocess(torch.zeros(1, self.channels, side, side, device=self.normalize.mean.device)).shape[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        inputs = self.preprocess(pixels)
        try:
            output = logits_of(self.net(inputs.contiguous() if self.contiguous else inputs))
        except RuntimeError as error:
            if self.contiguous or NO_VIEW not in str(error):
                raise
            with torch.inference_mode(False):  # the weights may be trained later
                self.net.to(memory_format=torch.contiguous_format)
            self.contiguous = True
            return self(pixels)
        return log_probabilities(output) if self.outputs == PROBABILITIES else output


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


class _FirstLayer(Exception):
    """Ends a forward pass at the first layer: its arguments are the layer and the shape of its input."""


def input_channels(net: nn.Module) -> int:
    """Return the channels of the images that a network takes: 3 if it accepts them, else those of its first layer.

    The first layer is the first convolution or linear layer that a forward pass reaches. A network that flattens images
    takes one channel if its inputs are one square of pixels and not three.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    convolution = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    if convolution is not None and convolution.in_channels == 3:
        return 3
    first = _first_layer(net, layers)
    if first is None:
        return 1 if convolution is not None and convolution.in_channels == 1 else 3
    layer, shape = first
    if isinstance(layer, nn.Conv2d):
        return 3 if shape[1] == layer.in_channels else layer.in_channels
    pixels = layer.in_features
    is_flat = shape == (1, 3 * PROBE_SIDE**2) and pixels != shape[1]
    is_three = pixels % 3 == 0 and math.isqrt(pixels // 3) ** 2 == pixels // 3
    return 1 if is_flat and not is_three and math.isqrt(pixels) ** 2 == pixels else 3


def _first_layer(net: nn.Module, layers: Sequence[nn.Module]) -> tuple[nn.Module, tuple[int, ...]] | None:
    """Return the first of the layers that a forward pass of a colour image reaches, and the shape of its input."""

    def stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _FirstLayer(layer, tuple(inputs[0].shape))

    weight = next(iter(net.parameters()), torch.empty(0))
    handles = [layer.register_forward_pre_hook(stop, prepend=True) for layer in layers]
    try:
        with removing(handles), torch.no_grad(), eval_mode(net):
            net(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, dtype=weight.dtype, device=weight.device))
    except _FirstLayer as reached:
        return reached.args
    except Exception:  # the network may be the user's own and raise anything, for example at the size of the image
        return None
    return None


def first_colour_convolution(net: nn.Module) -> str | None:
    """Return the name of the first convolution if it takes colour images; else None."""
    layers = ((name, layer) for name, layer in net.named_modules() if type(layer) is nn.Conv2d)
    name, layer = next(layers, (None, None))
    return name if layer is not None and layer.in_channels == 3 and layer.groups == 1 else None


def make_grey(net: nn.Module) -> None:
    """Replace the first convolution, which takes colour images, by an untrained one that takes grey images."""
    name = first_colour_convolution(net)
    old = net.get_submodule(name)
    sizes = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(1, old.out_channels, bias=old.bias is not None, **sizes)
    net.set_submodule(name, new)
    if hasattr(net, "in_chans"):  # timm derives the input of a network from it
        net.in_chans = 1
    if getattr(net, "transform_input", False):  # torchvision's Inception nets would select colours
        net.transform_input = False


def statistics(
    channels: int, default: Sequence[float], choice: tuple[str, object], what: str = "the model"
) -> Sequence[float]:
    """Return the mean or std of a network's input, one value per channel.

    default  of the family of the network; used only if it has a value per channel or equal values
    choice   a source, for messages, and its values; with None, the default is used

    Raises InputError if these values do not have the right number or there are none.
    """
    source, values = choice
    if values is not None:
        numbers = list(values) if isinstance(values, list | tuple) else []
        if len(numbers) != channels or not all(isinstance(value, int | float) for value in numbers):
            count = f"{len(numbers)} value{'s' * (len(numbers) != 1)}"
            raise InputError(
                f"{source} has {count}, but {what} takes images of {channels} channel{'s' * (channels > 1)}",
                "give one value per channel",
            )
        return numbers
    if len(default) == channels:
        return default
    if len(set(default)) == 1:
        return [default[0]] * channels
    raise InputError(
        f"{what} takes images of {channels} channel{'s' * (channels > 1)} and its weights define no normalisation",
        "give it with --mean and --std",
    )


def check_weights(net: nn.Module, source: str) -> None:
    """Raise InputError if a network has lazy, complex, quantised or integer weights, which cannot be unlearned.

    source  what the network is, as the start of the message
    """
    tensors = [*net.named_parameters(), *net.named_buffers()]
    lazy = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if lazy:
        raise InputError(
            f"{source} has lazy weights without a shape ({lazy})",
            "replace lazy layers by layers with input sizes",
            "pass a batch through it before it is returned",
        )
    of_complex = next((name for name, parameter in net.named_parameters() if parameter.is_complex()), None)
    if of_complex:
        raise InputError(
            f"{source} has complex weights ({of_complex})",
            "store them as real numbers, as torch.view_as_real returns them",
        )
    quantised = [name for name, tensor in tensors if tensor.is_quantized]
    quantised += [name for name, parameter in net.named_parameters() if not parameter.is_floating_point()]
    quantised += [name for name, module in net.named_modules() if ".quantized" in type(module).__module__]
    small = [tensor for tensor in net.buffers() if tensor.dtype in INTEGERS]  # packed weights of quantised layers
    if quantised or sum(map(torch.numel, small)) > sum(map(torch.numel, net.parameters())):
        where = f" ({quantised[0]})" if quantised and quantised[0] else ""
        raise InputError(
            f"{source} has quantised or integer weights{where}, which have no gradient",
            "unlearn the floating-point model and quantise the result",
        )
