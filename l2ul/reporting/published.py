"""Accuracies that others published, with their source. The tables show them beside ours."""

from dataclasses import dataclass

SOURCE = "StructGuard (CVPR 2026), which compares with these methods on the same models and settings"


@dataclass(frozen=True)
class Figure:
    """Accuracy on D_test in percent after all k images of D_f were forgotten, goal misclassify."""

    dataset: str
    model: str
    method: str  # name in the registry, or the source's name of a method that is not in it
    acc_test: float
    derived: bool = False  # computed from other numbers of the source
    k: int = 256


FIGURES = (
    Figure("cifar10", "resnet18", "oracle", 38.59, derived=True),
    Figure("cifar10", "resnet18", "adv", 36.69),
    Figure("cifar10", "resnet18", "adv_imp", 45.44),
    Figure("cifar10", "resnet18", "StructGuard", 56.32),
    Figure("cifar100", "resnet50_cifar100", "adv", 46.45),
    Figure("cifar100", "resnet50_cifar100", "adv_imp", 48.71),
    Figure("cifar100", "resnet50_cifar100", "StructGuard", 56.91),
    Figure("imagenet", "torchvision:resnet50", "adv", 21.27),
    Figure("imagenet", "torchvision:resnet50", "adv_imp", 31.19),
    Figure("imagenet", "torchvision:resnet50", "StructGuard", 41.15),
)


def figures(dataset: str, model: str, k: int) -> list[Figure]:
    """Return the published accuracies for a data set, model and k."""
    return [figure for figure in FIGURES if (figure.dataset, figure.model, figure.k) == (dataset, model, k)]
