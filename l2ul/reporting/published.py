"""Figures that others published, as data with their source: what the tables may set beside ours, and nothing else."""

from dataclasses import dataclass

SOURCE = "StructGuard (CVPR 2026), which compares itself with these methods on the same nets and settings"


@dataclass(frozen=True)
class Figure:
    """Accuracy on D_test in percent once D_f, of k images to misclassify, was wholly forgotten."""

    dataset: str
    model: str
    method: str  # as the registry calls it; a method that is not here by its own name
    acc_test: float
    derived: bool = False  # not printed at the source as such, but derived from what is
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
    """What was published for a column of the table of the goal misclassify."""
    return [figure for figure in FIGURES if (figure.dataset, figure.model, figure.k) == (dataset, model, k)]
