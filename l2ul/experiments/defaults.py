"""The value of each setting that was not given, for each data set."""

from pathlib import Path

CACHE_DIR = Path("data/cache")

# Settings of the paper's released run scripts (github.com/csm9493/L2UL), but for the embedded digits, which are ours:
# chosen so that every method forgets within seconds. A data set that has no value of its own takes the common one.
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
    "utkface": {
        "model": "resnet18_cifar100",
        "unlearn_k": [16, 32, 64, 128, 256],
        "num_adv_images": 300,
        "pgd_eps": 2.0,
        "batch_size": 128,
        "adv_batch_size": 128,
    },
    "imagenet": {
        "model": "torchvision:resnet50",
        "num_adv_images": 200,
        "batch_size": 16,
        "adv_batch_size": 128,
        "max_passes": 100,
        "adv_dtype": "uint8",  # ours: 4 times smaller than float32
    },
}
COMMON_DEFAULTS = {
    "model": "torchvision:resnet50",
    "unlearn_k": [16, 64, 128, 256],  # images of D_f
    "num_adv_images": 20,  # examples of each of them
    "pgd_eps": 4.0,  # ε, L2 norm over the pixels of an image in [0,1]
    "pgd_alpha": 0.1,  # likewise
    "pgd_iter": 100,  # steps
    "unlearn_lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "batch_size": 32,  # images of D_f a step
    "adv_batch_size": 256,  # images of D_adv, or of D_r, a step
    "reg_lamb": 1.0,  # λ
    "max_passes": 1000,  # times through D_adv, D_r or D_f
    "noise_growth": 0.01,  # ours: σ of rawp's noise a draw, in parts of a tensor's root mean square
    # of distill, ours: one setting for every data set, net and k; of the embedded digits only fewer and smaller steps
    "distill_lr": 3e-4,  # the highest of a cycle, of Adam
    "distill_steps": 300,  # of a cycle
    "distill_cycles": 3,
    "distill_forget": 64,  # images of D_f a step
    "distill_mixes": 192,  # mixes of D_f a step
    "distill_logits": 10.0,  # weight of the divergence from the logits of θ⁰
    "distill_features": 1000.0,  # weight of the gap to the features of θ⁰
    "distill_growth": 10.0,  # of the forget loss over a cycle, while an image is not forgotten
    "distill_margin": 0.3,  # by which another logit must lead
    "adv_dtype": "float32",
    "bn": "train",
    "precision": "fp32",  # of the passes on a GPU
}


def default(dataset: str, flag: str) -> object:
    """The value of a flag that was not given, for a data set."""
    return DEFAULTS.get(dataset, {}).get(flag, COMMON_DEFAULTS[flag])
