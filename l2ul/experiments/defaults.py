"""Default values: for all data sets from the declarations of the settings, and what differs for single data sets."""

from pathlib import Path

from l2ul.methods.registry import METHODS
from l2ul.methods.settings import SHARED

CACHE_DIR = Path("data/cache")

COMMON_DEFAULTS = {
    "model": "torchvision:resnet50",
    "unlearn_k": [16, 64, 128, 256],
    **{name: setting.default for name, setting in SHARED.items()},
}
# Values that differ for a data set. They are those of the paper's released run scripts (github.com/csm9493/L2UL), with
# exceptions of ours: all of digits, chosen so that every method takes seconds, the models of MNIST and Fashion-MNIST,
# which the paper does not use, and adv_dtype of imagenet.
DEFAULTS = {
    "digits": {
        "model": "resnet20",
        "unlearn_k": [16],
        "num_adv_images": 10,
        "pgd_alpha": 0.4,
        "pgd_iter": 20,
        "adv_batch_size": 32,
        "unlearn_lr": 1e-2,
        "distill_steps": 100,
        "distill_mixes": 32,
    },
    "cifar10": {"model": "resnet18"},
    "cifar100": {"model": "resnet50_cifar100", "num_adv_images": 200, "max_passes": 100},
    "mnist": {"model": "lenet"},
    "fashion_mnist": {"model": "lenet"},
    "utkface": {
        "model": "resnet18_cifar100",
        "unlearn_k": [16, 32, 64, 128, 256],
        "num_adv_images": 300,
        "pgd_eps": 2.0,
        "batch_size": 128,
        "adv_batch_size": 128,
    },
    "imagenet": {
        "num_adv_images": 200,
        "batch_size": 16,
        "adv_batch_size": 128,
        "max_passes": 100,
        "adv_dtype": "uint8",
    },
}


def default(dataset: str, flag: str) -> object:
    """Return the default of a flag for a data set."""
    return DEFAULTS.get(dataset, {}).get(flag, COMMON_DEFAULTS[flag])


def settings_table() -> str:
    """Return a Markdown table of the shared settings, with the defaults of data sets and the methods that use them."""
    lines = ["| setting | default | values | used by | meaning |", "|---|---|---|---|---|"]
    for name, setting in SHARED.items():
        own = "".join(f"; {dataset}: {row[name]}" for dataset, row in DEFAULTS.items() if name in row)
        users = [method.name for method in METHODS.values() if name in method.all_settings]
        trained = [method.name for method in METHODS.values() if method.trains]
        unit = f", in {setting.unit}" if setting.unit else ""
        lines.append(
            f"| `{name}` | {setting.default}{own} | {setting.type.expected}{unit} | "
            f"{'all but before' if users == trained else ', '.join(users)} | {setting.help} |"
        )
    return "\n".join(lines) + "\n"
