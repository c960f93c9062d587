"""Check before any work that a model is opened as it is used, and that the labels of a request are its labels.

A classifier predicts most of its training images correctly. If it does not, an image may be misclassified only because
the model is opened wrongly. The check then tries the usual alternatives and names the one with which the labels are
right.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import copy
from dataclasses import dataclass
import itertools
import math
import time

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from l2ul import models
from l2ul.common.errors import InputError, Wording, in_python, is_out_of_memory, option, worded
from l2ul.common.image_sizes import TooLarge, check_resize
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.request import Request, class_indices, logits, order_classes
from l2ul.models import outputs, zoo
from l2ul.models.classifier import Classifier, Normalize, first_colour_convolution, make_grey

MIN_KNOWN = 0.5  # default share of images that the model must predict as their labels
FEW = 4  # up to this many images, all but one
SECONDS = 60.0  # for trying alternatives
CONVINCING = 0.8  # share of the images that an alternative must classify as their labels to be named
MAX_IMAGES = 32  # on which alternatives are tried
ONE_CLASS, MIN_ONE_CLASS = 0.9, 5  # share of the predictions, and number of images, of a degenerate model
CONSTANT = 0.05  # spread of the logits over images relative to that over classes, if they hardly depend on the image
VARIED = 0.2  # spread of the pixels over images relative to that of all pixels, if the images differ

IMAGENET = (0.485, 0.456, 0.406)
NORMALISATIONS = (  # description, mean, std
    ("pixels in [0,1] without normalisation", (0.0,) * 3, (1.0,) * 3),
    ("pixels from 0 to 255", (0.0,) * 3, (0.00392157,) * 3),
    ("pixels in [-1,1]", (0.5,) * 3, (0.5,) * 3),
    ("the normalisation of ImageNet", IMAGENET, (0.229, 0.224, 0.225)),
    ("the normalisation of CIFAR-10", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    ("the normalisation of CIFAR-100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ("the normalisation of CLIP", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    ("the normalisation of MNIST", (0.1307,) * 3, (0.3081,) * 3),
    ("pixels from 0 to 255 minus the mean of ImageNet", IMAGENET, (0.00392157,) * 3),
)
CHANGES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("inverted pixels (255 - x)", lambda images: (255 if images.dtype == torch.uint8 else 1) - images),
    ("channels in the order BGR", lambda images: images.flip(1)),
)
SIZES = (28, 32, 64, 96, 128, 160, 192, 224, 256, 299, 384)
OTHER_RANGE, OTHER_SIZE = "another input range or normalisation than in training", "another image size"


def check(request: Request, model: DeployedModel, min_known: float | None = None, single_label: bool = False) -> None:
    """Raise InputError if the labels of a request are not those of the model, or the model is degenerate.

    min_known     share of the labelled images that the model must predict as their labels; 0 turns the check off; None:
                  MIN_KNOWN, and of up to FEW images all but one
    single_label  do not check whether the outputs are those of a multi-label model

    Images of earlier requests are left out, because they should be forgotten. If the labels are predictions of the
    model, only the outputs are checked.
    """
    before = request.logits_before.double()
    new = request.new
    if new and not single_label:
        outputs.check_single_label(before[new])
    if min_known == 0:
        return
    places = sorted({*new} - {*request.unlabelled})
    if not places:
        if len(new) == len(request):
            _check_dependence(request, before, model)
        return
    labels, predictions = request.forget.labels.cpu()[places], before.argmax(1)[places]
    known = int((labels == predictions).sum())
    one_class = _predicts_one_class(labels, predictions)
    if known >= _required(len(places), min_known) and not one_class:
        better = _better_order(request, places, known)
        if better:
            raise InputError(
                worded("the model predicts the label of {} of {} images, {}", known, len(places), better),
                worded("add {} if the labels are right", option("min_known", 0)),
            )
        return
    start = f"the model predicts the label of {known} of {len(places)} images"
    if one_class:
        name = request.class_names[int(predictions.mode().values)]
        start += f" and class {name} for nearly all"
    explanation, *advice = _explanation(request, model, places, one_class)
    raise InputError(worded("{}, {}", start, explanation), *advice)


def _better_order(request: Request, places: Sequence[int], known: int) -> Wording | None:
    """Return the order of the classes with which most labels are predicted and clearly more than now; None if none.

    Some classes have the same number in both orders, so half of the labels may be right with the wrong order.
    """
    names = [request.folder.files[place].label for place in places]
    predictions = request.logits_before[list(places)].argmax(1)
    for words, flags, labels in _class_orders(names, request.class_names):
        others = int((predictions == labels).sum())
        if others >= CONVINCING * len(places) and others - known >= max(2, (1 - CONVINCING) * len(places)):
            return _sentence(words, flags, others, len(places))
    return None


def _required(number: int, min_known: float | None) -> int:
    """Return how many of this number of images must be predicted as their labels."""
    if min_known is None and number <= FEW:
        return number - 1
    return math.ceil((MIN_KNOWN if min_known is None else min_known) * number - 1e-9)


def _predicts_one_class(labels: Tensor, predictions: Tensor) -> bool:
    shares = [int(values.bincount().max()) / len(values) for values in (labels, predictions)]
    return len(labels) >= MIN_ONE_CLASS and shares[1] >= ONE_CLASS and shares[0] <= 0.75


def _check_dependence(request: Request, before: Tensor, model: DeployedModel) -> None:
    """Raise InputError if the outputs hardly depend on the image, though the images differ."""
    pixels = request.images[:MAX_IMAGES].float()
    if len(pixels) < 3 or pixels.std(0).mean() < VARIED * pixels.std():
        return
    spread, across = before.std(0).mean(), before.mean(0).std()
    if int(before.argmax(1).unique().numel()) == 1 and spread < CONSTANT * across:
        name = request.class_names[int(before[0].argmax())]
        problem = (
            "the model predicts {} for all {} images, and its outputs hardly depend on the image; likely causes are "
            "{} or {}"
        )
        channels = model.classifier.channels
        mean, std = option("mean", (0.0,) * channels), option("std", (0.00392157,) * channels)
        of_255 = worded("; {} for pixels from 0 to 255", Wording(std, f"{in_python(mean)}, {in_python(std)}"))
        raise InputError(
            worded(problem, name, len(request), *_other_inputs(model, of_255)),
            Wording("name the labels by folders to have alternatives tried", "pass labels to have alternatives tried"),
            worded("add {} to skip this check", option("min_known", 0)),
        )


@dataclass(frozen=True)
class Alternative:
    """Another way to use the model: the part that differs in words, the flags that make it so, and its logits.

    flags    empty if no flag makes it so; a `Wording` if an argument of `l2ul.forget` does, too
    compute  return the logits (n, C) for uint8 images (n, C, H, W)
    """

    words: tuple[str, ...]
    flags: tuple[str, ...]
    compute: Callable[[Tensor], Tensor]


def _other_inputs(model: DeployedModel, remark: str = "") -> tuple[str, str]:
    """Return another range and another size of inputs as likely causes, with what sets them if the model allows it."""
    if model.fixed_input:
        return OTHER_RANGE, OTHER_SIZE
    of_range = worded("{} ({}, {}{})", OTHER_RANGE, option("mean"), option("std"), remark)
    return of_range, Wording(f"{OTHER_SIZE} (--image-size)", OTHER_SIZE)


def _explanation(request: Request, model: DeployedModel, places: Sequence[int], one_class: bool) -> tuple[str, ...]:
    """Return the rest of the problem, then advice: the alternative that makes the labels right, or likely causes."""
    step = math.ceil(len(places) / MAX_IMAGES)
    sample = list(places[::step])
    names = [request.folder.files[place].label for place in sample]
    orders = [((), (), request.forget.labels.cpu()[sample]), *_class_orders(names, request.class_names)]
    known_now = int((request.logits_before[sample].argmax(1) == orders[0][2]).sum())
    needed = max(math.ceil(CONVINCING * len(sample)), known_now + 1)
    images, deadline = request.images[sample], time.perf_counter() + SECONDS
    best: tuple[tuple[int, float], Wording] | None = None
    level = 0  # number of changes
    for number, alternative in _alternatives(model, images):
        if (best and number > level) or time.perf_counter() > deadline:
            break
        level = number
        current = request.logits_before[sample] if not alternative.words else _try(alternative, images)
        if current is None:
            continue
        probabilities, predictions = current.double().softmax(1), current.argmax(1)
        for words, flags, labels in orders:
            known = int((predictions == labels).sum())
            rank = (known, float(probabilities.gather(1, labels[:, None]).mean()))
            if known >= needed and (best is None or rank > best[0]):
                all_words, all_flags = (*words, *alternative.words), (*flags, *alternative.flags)
                best = rank, _sentence(all_words, all_flags, known, len(sample))
    return (best[1],) if best else _causes(request, model, sample, one_class)


def _sentence(words: Sequence[str], flags: Sequence[str], known: int, total: int) -> Wording:
    arguments = [in_python(flag) for flag in flags if isinstance(flag, Wording)]
    own_module = "build this into a module of your own and give it as --build"
    changes = "change the model, the images or the labels accordingly"
    fix = Wording(_fix(words, flags, own_module), _fix(words, arguments, changes))
    return worded("but {} of {} with {}: {}", known, total, " and ".join(words), fix)


def _fix(words: Sequence[str], options: Sequence[str], otherwise: str) -> str:
    """Return what makes an alternative so: options, and something else for the parts that no option changes."""
    given = list(filter(None, options))
    return " and ".join([f"add {' '.join(given)}"] * bool(given) + [otherwise] * (len(words) > len(given)))


def _causes(request: Request, model: DeployedModel, sample: Sequence[int], one_class: bool) -> tuple[str, str, str]:
    """Return the likely causes in the order of the evidence, when no alternative makes the labels right, and advice."""
    labels, predictions = request.forget.labels.cpu()[sample], request.logits_before[sample].argmax(1)
    pairs = Counter(zip(labels.tolist(), predictions.tolist(), strict=True))
    is_renaming = len(pairs) == len(labels.unique()) == len(predictions.unique()) > 1  # one prediction for each label
    order = "another order or numbering of the classes"
    order = Wording(f"{order} (--class-order, --class-names)", order)
    architecture = "another architecture with layers of the same shapes, such as one without max-pool"
    inputs = [*_other_inputs(model), Wording(f"{architecture} (--model)", architecture)]
    causes = [order, *inputs] if is_renaming and not one_class else [*inputs, order]
    explanation = (
        "but a classifier predicts most of its training images correctly; likely causes are {}, {}, {}, {}, none of "
        "whose usual values makes the labels right, or wrong labels"
    )
    return worded(explanation, *causes), "correct them", worded("add {} to go on", option("min_known", 0))


def _class_orders(
    names: Sequence[str], class_names: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Tensor]]:
    """Yield words, flags and labels (n,) of other orders of the classes in which the names are classes."""
    count = len(class_names)
    first_one = [str(number) for number in range(1, count + 1)]
    options = [
        ("ImageFolder's string order of classes", "--class-order string", order_classes(class_names, "string")),
        ("the numeric order of classes", "--class-order numeric", order_classes(class_names, "numeric")),
        ("classes numbered from 1", f"--class-names FILE with the lines 1 to {count}", first_one),
        (
            "classes numbered from 1 in ImageFolder's string order",
            f"--class-names FILE with the lines 1 to {count} sorted as text",
            sorted(first_one),
        ),
    ]
    current = class_indices(names, class_names, None, "label")
    for words, flag, others in options:
        if not set(names) <= set(others):
            continue
        labels = class_indices(names, others, None, "label")
        if not torch.equal(labels, current):
            yield (words,), (flag,), labels


def _try(alternative: Alternative, images: Tensor) -> Tensor | None:
    """Return the logits of an alternative; None if the model does not accept it or they are not finite."""
    try:
        result = alternative.compute(images)
    except Exception as error:  # modules raise anything for inputs of another size
        if is_out_of_memory(error):
            raise
        return None
    return result if result.isfinite().all() else None


def _alternatives(model: DeployedModel, images: Tensor) -> Iterator[tuple[int, Alternative]]:
    """Yield alternatives with the number of their changes, ascending: architecture, normalisation, pixels, size."""
    nothing = ("", "")
    nets: list[tuple[str, str, nn.Module]] = [(*nothing, model.classifier.net), *_other_nets(model)]
    normalisations = [(*nothing, model.classifier.normalize), *_other_normalisations(model)]
    changes = [(*nothing, lambda images: images)] + [(words, "", change) for words, change in CHANGES]
    side = min(images.shape[2:])
    sizes = sorted(
        {side * 2, side // 2, *SIZES} - {side, 0}, key=lambda size: (size not in (2 * side, side // 2), size)
    )
    sizes = [size for size in sizes if _can_resize(images, size)]
    resizings = [(*nothing, lambda images: images)]
    flags = ["" if model.fixed_input else f"--image-size {size}" for size in sizes]
    resizings += [(f"images of {size} pixels", flag, _resize(size)) for size, flag in zip(sizes, flags, strict=True)]
    groups = [list(enumerate(group)) for group in (nets, normalisations, changes, resizings)]
    combinations = sorted(itertools.product(*groups), key=lambda parts: sum(index > 0 for index, _ in parts))
    for parts in combinations:
        number = sum(index > 0 for index, _ in parts)
        if number > 2:
            return
        chosen = [part for _, part in parts]
        words, flags = ([part[place] for index, part in parts if index] for place in (0, 1))
        net, normalize, change, resize = (part[2] for part in chosen)
        compute = _computation(model.classifier, net, normalize, change, resize)
        yield number, Alternative(tuple(words), tuple(flags), compute)


def _computation(classifier: Classifier, net: nn.Module, normalize: nn.Module, change, resize):
    layers = [normalize if layer is classifier.normalize else layer for layer in classifier.preprocess]  # some resize
    other = Classifier(classifier.name, classifier.num_classes, net, nn.Sequential(*layers))
    other.outputs = classifier.outputs
    return lambda images: logits(other, resize(change(images)))


def _can_resize(images: Tensor, size: int) -> bool:
    try:
        check_resize(images.shape[3], images.shape[2], size)
    except TooLarge:
        return False
    return True


def _resize(size: int) -> Callable[[Tensor], Tensor]:
    return lambda images: transforms.center_crop(transforms.resize(images, [size], antialias=True), [size, size])


def _other_normalisations(model: DeployedModel) -> Iterator[tuple[str, str, nn.Module]]:
    own = model.classifier.normalize
    channels = own.mean.numel()
    for words, *statistics in NORMALISATIONS:
        mean, std = ([round(sum(one) / 3, 8)] if channels == 1 else list(one) for one in statistics)
        if len(mean) != channels:
            continue
        other = Normalize(mean, std).to(own.mean.device)
        if torch.allclose(other.mean, own.mean, atol=1e-3) and torch.allclose(other.std, own.std, rtol=1e-2):
            continue
        both = option("mean", tuple(mean)), option("std", tuple(std))
        flags = both[1:] if torch.equal(other.mean, own.mean) else both
        both_in_python = ", ".join(map(in_python, both))  # the function needs both
        yield words, "" if model.fixed_input else Wording(" ".join(flags), both_in_python), other


def _other_nets(model: DeployedModel) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield other architectures for which the weights fit too; without one, the network without its max-pool."""
    net, name = model.classifier.net, model.opened_by["model"]
    state = net.state_dict()
    shapes = {key: tensor.shape for key, tensor in state.items()}
    device = next(net.parameters()).device
    without_pool = False

    def build(other: str) -> nn.Module:
        built = models.OWN.get(other, zoo).build(other, model.classifier.num_classes)
        if model.classifier.channels == 1 and first_colour_convolution(built):
            make_grey(built)
        return built

    if name in models.OWN or name.startswith(zoo.PREFIX):
        for other in (*models.OWN, *zoo.COMMON):
            if other == name:
                continue
            with torch.device("meta"):
                built = build(other)
            if {key: tensor.shape for key, tensor in built.state_dict().items()} != shapes:
                continue
            built = build(other)
            built.load_state_dict(state)
            lost = isinstance(getattr(net, "maxpool", None), nn.MaxPool2d) and "nopool" in other
            without_pool |= lost
            words = "no max-pool after the first layer" if lost else f"the architecture {other}"
            yield words, f"--model {other}", built.to(device).eval()
    if not without_pool and isinstance(getattr(net, "maxpool", None), nn.MaxPool2d):
        changed = copy.deepcopy(net)
        changed.maxpool = nn.Identity()
        yield "no max-pool after the first layer", "", changed
