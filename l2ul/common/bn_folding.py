"""Fold each batch-norm into the convolution before it while a model only computes logits."""

from collections.abc import Iterator
import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from l2ul.common.modes import eval_mode, frozen_copy, removing

Pair = tuple[str, str]  # names of a convolution and of the batch-norm that alone reads its output
KNOWN = "_l2ul_foldable"  # attribute of a model: the result of `foldable`, which copies of the model share


@contextlib.contextmanager
def folded(model: nn.Module, sample: Tensor) -> Iterator[None]:
    """Replace each foldable pair of layers by one convolution inside the block, and restore the layers afterwards.

    sample  (n, 3, H, W) in [0,1], an input that the model accepts

    The model is in eval mode inside the block, where batch-norm is an affine map of each channel. The folded
    convolutions use the weights as they are when the block starts: do not change weights inside it.
    """
    with _folded(model, foldable(model, sample)):
        yield


def fold(model: nn.Module, sample: Tensor) -> None:
    """Replace each foldable pair of layers by one convolution for good, in a model whose weights no longer change.

    sample  (n, 3, H, W) in [0,1], an input that the model accepts
    """
    _fuse(model, foldable(model, sample))


def foldable(model: nn.Module, sample: Tensor) -> tuple[Pair, ...]:
    """Return the pairs of layers that can be folded without changing the logits.

    sample  (n, 3, H, W) in [0,1], an input that the model accepts

    The pairs are found by tracing a forward pass, and verified on a copy in double precision whose batch-norms have
    random statistics. The result is empty if the model cannot be copied or if folding would change its logits. It is
    stored on the model, so that the search runs once for a model and its copies; it is repeated after a layer is
    replaced, or for images of another size.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return ()
    key = tuple(sample.shape[1:]), tuple((name, type(module)) for name, module in model.named_modules())
    known = getattr(model, KNOWN, None)
    if known is None or known[0] != key:
        known = key, _verified_pairs(model, sample)
        setattr(model, KNOWN, known)
    return known[1]


def _verified_pairs(model: nn.Module, sample: Tensor) -> tuple[Pair, ...]:
    try:
        probe = frozen_copy(model).cpu().double()
        _randomise(probe)
        sample = sample[:1].detach().cpu().double()
        pairs, expected = _adjacent(probe, sample)
        with _folded(probe, pairs):
            logits = probe(sample)
    except Exception:  # a model of the user's own may raise anything; it is then used without folding
        return ()
    scale = expected.abs().max().clamp_min(1e-12)
    return tuple(pairs) if (logits - expected).abs().max() <= 1e-7 * scale else ()


@contextlib.contextmanager
def _folded(model: nn.Module, pairs: tuple[Pair, ...] | list[Pair]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for pair in pairs for name in pair}
    with eval_mode(model):
        try:
            _fuse(model, pairs)
            yield
        finally:
            for name, module in originals.items():
                model.set_submodule(name, module)


@torch.no_grad()
def _fuse(model: nn.Module, pairs: tuple[Pair, ...] | list[Pair]) -> None:
    for pair in pairs:
        convolution, norm = map(model.get_submodule, pair)
        fused = copy.copy(convolution)  # fuse_conv_bn_eval copies the weights as well, which takes longer than to fuse
        fused._parameters = {}
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        fused.weight, fused.bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        model.set_submodule(pair[0], fused)
        model.set_submodule(pair[1], nn.Identity())


def _adjacent(model: nn.Module, pixels: Tensor) -> tuple[list[Pair], Tensor]:
    """Return the pairs whose second layer alone reads the output of the first, each called once, and the logits."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that no id is used twice
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
    with removing(handles):
        logits = model(pixels)
    return [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)], logits


def _randomise(model: nn.Module) -> None:
    """Give each batch-norm random statistics and weights, with which a wrong folding changes the logits."""
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
