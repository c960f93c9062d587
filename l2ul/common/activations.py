"""What a net's layers make of images: how alike two nets' features are (linear CKA), and a map of them (t-SNE)."""

from collections.abc import Callable, Iterable, Iterator
import contextlib

import torch
from torch import Tensor, nn

from l2ul.common.modes import eval_mode
from l2ul.data.folder import FolderImages
from l2ul.data.images import batches

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LARGEST = 65_536  # values of an image that a layer's features keep; beyond, positions are averaged


@contextlib.contextmanager
def hooked(model: nn.Module, names: Iterable[str], note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """`note` is told name, input and output of each of these layers as it runs, in inference and eval mode."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: note(name, inputs[0] if inputs else None, output)
        )
        for name in names
    ]
    try:
        with torch.inference_mode(), eval_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def module_names(model: nn.Module, kinds: type | tuple[type, ...]) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, kinds)]


def flat_features(output: Tensor) -> Tensor:
    """A layer's output (N, …) as (N, D), a copy: an activation behind the layer may overwrite the output."""
    return pooled(output).flatten(1).clone()


def pooled(features: Tensor) -> Tensor:
    """Features (N, …), averaged over positions where an image has more than LARGEST: (N, C, H, W) or (N, T, D)."""
    if features[0].numel() <= LARGEST or features.ndim not in (3, 4):
        return features
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)


def logits_and_inputs(
    model: nn.Module, images: Tensor, names: list[str], last: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each of these layers is given on the way, pooled, in the order of the names.

    last  a module whose output, as it is, comes after those: see `last_spatial_module`
    """
    found = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.update({name: pooled(inputs[0])})
        )
        for name in names
    ]
    keys: list[str | None] = [*names]
    if last is not None:
        keys.append(None)
        module = model.get_submodule(last)
        handles.append(module.register_forward_hook(lambda _, inputs, output: found.update({None: output})))
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [found[key] for key in keys]


def last_spatial_module(model: nn.Module, images: Tensor) -> str | None:
    """The module that gives the last features which still tell places apart, before they are pooled; None if none does.

    Maps (N, C, H, W) of more than one position, or tokens (N, T, D) of more than one.
    """
    seen = []

    def note(name: str, inputs: Tensor, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4):
            places = output.shape[2:] if output.ndim == 4 else output.shape[1:2]
            if places.numel() > 1:
                seen.append(name)

    with hooked(model, [name for name, _ in model.named_modules() if name], note):
        model(images)
    return seen[-1] if seen else None


def layers(model: nn.Module, images: Tensor | FolderImages) -> dict[str, int]:
    """The convolutions and linear layers that run, in the order they do, and how many features each gives an image."""
    sizes: dict[str, int] = {}
    first = next(batches(images, 1, next(model.parameters()).device))
    with hooked(
        model, module_names(model, WEIGHTED), lambda name, _, out: sizes.update({name: flat_features(out).shape[1]})
    ):
        model(first)
    return sizes
