"""What a classifier returns: logits, or probabilities whose logarithms are logits. Other outputs are refused."""

import copy

import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError, Wording, is_out_of_memory, worded
from l2ul.common.modes import eval_mode

LOGITS, PROBABILITIES = "logits", "probabilities"
SMALLEST = 1e-30  # probabilities below this count as this: softmax rounds small ones to 0, which has no logarithm
SUM_TOLERANCE = 5e-3  # of the sum of a row of probabilities, for 16-bit outputs
BATCH = 64  # images on which outputs are judged
WIDE = 100.0  # of noise that separates bounded outputs from small logits: added to pixels, or a factor of weights


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Return the logarithms of probabilities (n, C): logits up to a constant per image, exact above `SMALLEST`."""
    return probabilities.float().clamp_min(SMALLEST).log()


def output_kind(outputs: Tensor) -> str:
    """Return LOGITS or PROBABILITIES for the outputs (n, C) of a classifier.

    Outputs of LogSoftmax are logits. Rows without negative values that sum to 1 are outputs of Softmax. Raises
    InputError for whole numbers, for values in [0,1] whose rows do not sum to 1 (Sigmoid), and for probabilities that
    are all exactly 0 or 1.
    """
    if not outputs.is_floating_point():
        raise InputError(
            f"the model returns whole numbers ({str(outputs.dtype).removeprefix('torch.')}), not logits",
            "return the output of its last linear layer",
        )
    values = outputs.detach().float()
    if not values.isfinite().all() or values.min() < 0 or values.max() > 1 + SUM_TOLERANCE:
        return LOGITS
    if not values.any():
        raise InputError("the model returns 0 for every class of every image", "check its weights and its output layer")
    if ((values.sum(1) - 1).abs() > SUM_TOLERANCE).any():
        raise InputError(
            "the model returns values between 0 and 1 that do not sum to 1 over the classes, as a Sigmoid does",
            "return logits, without the Sigmoid at the end, if each image has exactly one class",
        )
    if ((values == 0) | (values == 1)).all():
        raise InputError(
            "the model returns only zeros and ones, one class per image",
            "return logits, the output of its last linear layer",
        )
    return PROBABILITIES


@torch.no_grad()
def adapt(classifier: nn.Module, pixels: Tensor) -> str:
    """Set `classifier.outputs` to the kind of its outputs for pixels (n, C, H, W) in [0,1], and return it.

    A classifier with the outputs PROBABILITIES returns their logarithms from then on; its network stays as it is.
    Raises InputError as `output_kind` does, and if only the outputs in eval mode are probabilities.
    """
    classifier.outputs = LOGITS
    with eval_mode(classifier):
        outputs = classifier(pixels[:BATCH])
        kind = LOGITS if _is_unbounded(classifier, pixels[:BATCH], outputs) else output_kind(outputs)
    if kind == PROBABILITIES:
        if outputs.dtype in (torch.float16, torch.bfloat16):
            name = str(outputs.dtype).removeprefix("torch.")
            raise InputError(
                f"the model returns probabilities in {name}, which round small ones to 0",
                "return its logits",
                "convert them to float32 before the softmax",
            )
        few = pixels[:BATCH] if len(pixels) > 1 else pixels.repeat(2, 1, 1, 1)  # batch-norm needs two values
        if output_kind(copy.deepcopy(classifier).train()(few)) != kind:  # a copy: batch-norm updates its statistics
            raise InputError(
                "the model returns probabilities in eval mode and other values in train mode", "return logits in both"
            )
    classifier.outputs = kind
    return kind


def check_single_label(logits: Tensor) -> None:
    """Raise InputError if logits (n, C) look like those of a multi-label model."""
    if is_multi_label(logits):
        raise InputError(
            "several classes have a sigmoid above 0.5 on most images, as in a multi-label model trained with binary "
            "cross-entropy, whose largest logit is not its prediction",
            "give a classifier of images with one label each",
            worded("add {} if it is one", Wording("--single-label", "single_label=True")),
        )


def is_multi_label(logits: Tensor) -> bool:
    """Return whether logits (n, C) look like those of independent binary decisions, several of them positive.

    On most images at least two classes have a sigmoid above 0.5, nearly all others one below 0.2, and softmax does not
    decide between the first.
    """
    if logits.shape[1] < 4:
        return False
    positive = logits > 0
    others = (~positive).sum(1)
    clear = (logits.sigmoid() < 0.2).sum(1) >= 0.8 * others
    several = (positive.sum(1) >= 2) & (others >= logits.shape[1] / 2)
    return int((several & clear & (logits.softmax(1).amax(1) < 0.9)).sum()) > len(logits) / 2


def _is_unbounded(classifier: nn.Module, pixels: Tensor, outputs: Tensor) -> bool:
    """Return whether outputs that lie in [0,1] leave it for images, or weights, of a far wider range, as logits may.

    A classifier that is hardly trained can return logits between 0 and 1 for every image. A Sigmoid never leaves [0,1].
    Wide weights are for models that normalise their features, such as transformers: these are bounded in the pixels.
    """
    if not outputs.is_floating_point() or not outputs.any() or outputs.min() < 0 or outputs.max() > 1:
        return False
    generator = torch.Generator().manual_seed(0)

    def wide_noise(values: Tensor) -> Tensor:
        return WIDE * torch.randn(values.shape, generator=generator).to(values)

    def leaves(wide: Tensor) -> bool:  # False for NaN
        return bool((wide.float().min() < -SUM_TOLERANCE) | (wide.float().max() > 1 + SUM_TOLERANCE))

    if leaves(classifier(pixels + wide_noise(pixels))):
        return True
    changed = copy.deepcopy(classifier)
    for weights in changed.parameters():
        weights.mul_(wide_noise(weights))
    try:
        return leaves(changed(pixels))
    except Exception as error:  # a forward may refuse such weights
        if is_out_of_memory(error):
            raise
        return False
