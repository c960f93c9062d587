"""Read inputs and outputs of a model's layers with forward hooks."""

from collections.abc import Callable, Iterable, Iterator
import contextlib

import torch
from torch import Tensor, nn

from l2ul.common.modes import eval_mode, removing

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LARGEST = 65_536  # features of a layer per image; larger ones are averaged over positions


@contextlib.contextmanager
def hooked(
    model: nn.Module, names: Iterable[str], hook: Callable[[str, Tensor | None, Tensor], object]
) -> Iterator[None]:
    """Call `hook(name, input, output)` for each of the named layers that runs inside the block.

    The model is in eval mode inside the block, and torch in inference mode.
    """
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: hook(name, inputs[0] if inputs else None, output)
        )
        for name in names
    ]
    with removing(handles), torch.inference_mode(), eval_mode(model):
        yield


def module_names(model: nn.Module, kinds: type | tuple[type, ...]) -> list[str]:
    """Return the names of the modules of these types."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def pooled(features: Tensor) -> Tensor:
    """Return features (N, C, H, W) or (N, T, D), averaged over positions if an image has more than LARGEST of them."""
    if features[0].numel() <= LARGEST or features.ndim not in (3, 4):
        return features
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)


def flat_features(output: Tensor) -> Tensor:
    """Return a layer's output (N, …) as pooled features (N, D).

    The result is a copy, because an in-place activation after the layer may overwrite the output.
    """
    return pooled(output).flatten(1).clone()


def logits_and_inputs(
    model: nn.Module,
    images: Tensor,
    names: list[str],
    last: str | None = None,
    reduce: Callable[[str, Tensor], object] = lambda name, inputs: pooled(inputs),
) -> tuple[Tensor, list]:
    """Return the logits of images (n, 3, H, W) and the reduced input of each named layer, in the order of the names.

    last    name of a module whose output, not reduced, is added to the end of the list; see `last_spatial_module`
    reduce  called with the name of a layer and its input; by default `pooled`
    """
    features: dict[str | None, object] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: features.update({name: reduce(name, inputs[0])})
        )
        for name in names
    ]
    keys: list[str | None] = [*names]
    if last is not None:
        keys.append(None)
        module = model.get_submodule(last)
        handles.append(module.register_forward_hook(lambda _, inputs, output: features.update({None: output})))
    with removing(handles):
        logits = model(images)
    return logits, [features[key] for key in keys]


def last_spatial_module(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of the last module whose output has several positions; None if there is none.

    Such outputs are feature maps (N, C, H, W) with H · W > 1 and tokens (N, T, D) with T > 1.
    """
    spatial = []

    def note(name: str, inputs: Tensor | None, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4):
            positions = output.shape[2:] if output.ndim == 4 else output.shape[1:2]
            if positions.numel() > 1:
                spatial.append(name)

    with hooked(model, [name for name, _ in model.named_modules() if name], note):
        model(images)
    return spatial[-1] if spatial else None


def run_names(model: nn.Module, names: Iterable[str], pixels: Tensor) -> list[str]:
    """Return those of the names whose modules run, in the order of their calls; `pixels` as in `layers`."""
    ran: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.setdefault(name))
        for name in names
    ]
    with removing(handles), torch.inference_mode(), eval_mode(model):
        model(pixels[:1])
    return list(ran)


def parameters_before(model: nn.Module, layer: str, pixels: Tensor) -> list[nn.Parameter]:
    """Return the parameters of the modules whose forward pass starts before that of a layer; `pixels` as in `layers`.

    Parameters that a module holds itself belong to it, not to its children.
    """
    names = run_names(model, module_names(model, nn.Module), pixels)
    modules = [model.get_submodule(name) for name in names[: names.index(layer)]]
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def layers(model: nn.Module, pixels: Tensor) -> dict[str, int]:
    """Return the convolutions and linear layers that run, in order, with the number of features each has per image.

    pixels  (n, 3, H, W) float in [0,1]; the first image is used
    """
    sizes: dict[str, int] = {}

    def note(name: str, inputs: Tensor | None, output: Tensor) -> None:
        sizes[name] = flat_features(output).shape[1]

    with hooked(model, module_names(model, WEIGHTED), note):
        model(pixels[:1])
    return sizes
