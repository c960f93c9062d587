"""What a model calls the images of a data set, in one pass, and accuracies read from that."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common import distributed
from l2ul.common.bn_folding import folded
from l2ul.common.errors import Diverged, InputError
from l2ul.common.modes import eval_mode
from l2ul.data import images as image_sets
from l2ul.data.folder import FolderImages
from l2ul.data.images import Images, as_pixels, batches
from l2ul.objective import Forget

BATCH_SIZE = {"cpu": (256, 256), "mps": (512, 64), "cuda": (2048, 256)}  # images measured at once; large ones


def default_batch_size(device: torch.device, side: int) -> int:
    """Images measured at once where nobody says, of so many pixels a side."""
    return image_sets.default_batch_size(BATCH_SIZE, device, side)


def predict(
    model: nn.Module,
    images: Tensor | FolderImages,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    fold: bool = True,
    shared: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The class (N,) int64, on the CPU, that the model gives each image, in eval mode.

    images      uint8 or float in [0,1]
    batch_size  images measured at once, by default `default_batch_size`
    fold        whether batch-norm is folded into convolutions; for a few images the search takes longer than it saves
    shared      all processes of a torchrun ask this of the same model: each looks at some of the batches, and gets all
                classes, which are those that one process would find

    Raises Diverged if any logit is not finite: argmax would call those a class.
    """
    found = [torch.empty(0, dtype=torch.int64, device=next(model.parameters()).device)]
    options = {"batch_size": batch_size, "workers": workers, "fold": fold, "shared": shared, "on_device": True}
    for part in logits(model, images, **options):
        found.append(torch.where(part.isfinite().all(1), part.argmax(1), -1))
        if progress:
            progress(len(part) * (distributed.size() if shared else 1))
    classes = torch.cat(found)
    classes = distributed.all_gather(classes) if shared else classes.cpu()
    if (classes < 0).any():
        raise Diverged(f"{int((classes < 0).sum())} of {len(classes)} images got logits that are not finite")
    return classes


@torch.inference_mode()
def logits(
    model: nn.Module,
    images: Tensor | FolderImages,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    fold: bool = True,
    shared: bool = False,
    on_device: bool = False,
) -> Iterator[Tensor]:
    """The logits (n, C) of one batch of the images after the other; options as of `predict`, on the CPU by default.

    `shared`: of this process's batches alone. In eval mode, to be gone through to the end, or closed: until then layers
    are folded.
    """
    device = next(model.parameters()).device
    sample = as_pixels(images[torch.tensor([0])])
    if batch_size is None:
        batch_size = default_batch_size(device, sample.shape[-1])
    with folded(model, sample) if fold else eval_mode(model):
        for batch in batches(images, batch_size, device, workers, shared):
            found = model(batch)
            yield found if on_device else found.cpu()


def forgotten(model: nn.Module, images: Tensor, forget: Forget) -> Tensor:
    """Which of D_f (k,) bool, on its device, are forgotten as these images (k, 3, H, W): its own, or changed ones.

    Layer by layer: for few images it would take longer to find what can be folded. Raises Diverged as `predict` does.
    """
    return forget.is_forgotten(predict(model, images, fold=False).to(forget.labels.device))


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent of predictions (n,) that equal the labels (n,)."""
    return 100 * int((predictions == labels.to(predictions.device)).sum()) / len(labels)


def interval(predictions: Tensor, labels: Tensor) -> tuple[float, float]:
    """95 % interval (Wilson) in percent of the accuracy on the whole that these (n,) are a random sample of."""
    from scipy.stats import binomtest

    found = binomtest(int((predictions == labels).sum()), len(labels)).proportion_ci(0.95, method="wilson")
    return 100 * found.low, 100 * found.high


def complement(indices: Tensor, num_images: int) -> Tensor:
    """The indices of D_r, ascending: all of 0 … num_images - 1 that are not in D_f's `indices`."""
    kept = torch.ones(num_images, dtype=torch.bool)
    kept[indices.cpu()] = False
    return kept.nonzero().flatten()


def count_classes(model: nn.Module, images: Tensor | FolderImages) -> int:
    """How many logits the model gives for one of the images; InputError unless it takes it."""
    pixels = images[torch.tensor([0])]
    try:
        with torch.inference_mode(), eval_mode(model):
            found = model(as_pixels(pixels).to(next(model.parameters()).device))
    except (RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError) as error:
        size, why = " x ".join(map(str, pixels.shape[2:])), (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the model does not take images of {size} pixels, or gives no logits ({why})") from None
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = " x ".join(map(str, found.shape[1:])) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"the model gives {shape} for an image; expected a logit for each class")
    return found.shape[1]


def check_fit(model: nn.Module, images: Tensor | FolderImages, num_classes: int) -> None:
    """Raise InputError unless the model takes one of the images and gives `num_classes` logits for it."""
    classes = count_classes(model, images)
    if classes != num_classes:
        raise InputError(f"the model tells {classes} classes apart, the data set has {num_classes}")


def check_trained_on(images: Images, told: dict[str, object], source: str) -> None:
    """Raise InputError where a split is made here and weights tell (None: nothing) that they were trained on another.

    told  what the file of the weights says under the names of `images.settings` and train_sha256
    """
    if not images.train_sha256:
        return
    for name, value in images.settings.items():
        if told.get(name) not in (None, value):
            raise InputError(
                f"{source} was trained with --{name.replace('_', '-')} {told[name]}, not {value}; give that, or train "
                f"a classifier for {value}"
            )
    if told.get("train_sha256") not in (None, images.train_sha256):
        raise InputError(
            f"{source} was trained on other images of {images.name}, which may be among the test images here; "
            f"take the folder of images that it was trained with"
        )
