"""Batch-norm folded into the convolution right before it, for as long as a net is only asked for its logits."""

from collections.abc import Iterator
import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from l2ul.common.modes import evaluating

Pair = tuple[str, str]  # names of a convolution and of the batch-norm that takes what it gives, and nothing else does


def foldable(model: nn.Module, pixels: Tensor) -> list[Pair]:
    """The pairs of a model that can be folded without changing its logits.

    pixels  (1, 3, H, W) in [0,1], that the model takes

    Found by looking at what each layer is given, and proved on a copy in double precision whose batch-norms have
    random statistics. A net that such a copy cannot be made of, or whose logits would change, has none.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return []
    try:
        probe = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
        _randomise(probe)
        sample = pixels[:1].detach().cpu().double()
        pairs, expected = _adjacent(probe, sample)
        with folded(probe, pairs):
            found = probe(sample)
    except Exception:  # whatever somebody's own net may raise: it is then used as it is
        return []
    scale = expected.abs().max().clamp_min(1e-12)
    return pairs if (found - expected).abs().max() <= 1e-7 * scale else []


@contextlib.contextmanager
def folded(model: nn.Module, pairs: list[Pair]) -> Iterator[None]:
    """Inside the block each pair is one convolution, of the weights as they are now; put back afterwards.

    In eval mode, as batch-norm is then an affine map of each channel. Weights must not change inside the block.
    """
    originals = {name: model.get_submodule(name) for pair in pairs for name in pair}
    with evaluating(model):
        try:
            with torch.no_grad():
                for convolution, norm in pairs:
                    model.set_submodule(convolution, fuse_conv_bn_eval(originals[convolution], originals[norm]))
                    model.set_submodule(norm, nn.Identity())
            yield
        finally:
            for name, module in originals.items():
                model.set_submodule(name, module)


def _adjacent(model: nn.Module, pixels: Tensor) -> tuple[list[Pair], Tensor]:
    """Pairs of which the second is given the very tensor that the first gave, each called once; and the logits."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no identity is given out twice
    calls: list[str] = []
    pairs: list[Pair] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(names[module])
        if type(module) is nn.Conv2d:
            made[id(output)] = names[module], output
        elif id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], names[module]))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [module.register_forward_hook(watch) for module in names if type(module) in kinds]
    logits = model(pixels)
    for handle in handles:
        handle.remove()
    return [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)], logits


def _randomise(model: nn.Module) -> None:
    """Give each batch-norm statistics and weights that no wrong folding could get past."""
    generator = torch.Generator().manual_seed(0)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)

    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2))
            if module.affine:
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
