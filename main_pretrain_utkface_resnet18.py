"""Train a ResNet-18 to tell age groups apart on UTKFace: what main_unlearn.py --dataset utkface starts from.

    python main_pretrain_utkface_resnet18.py --age-grouping TNN
    python main_pretrain_utkface_resnet18.py --age-grouping MFD --tracker tensorboard

Put the aligned and cropped images into data/utkface, or name the folder above them with --data-dir. Images of 128
pixels a side, of which 120 are cut out: at random to train, from the middle otherwise. The weights of the best epoch on
the validation images are kept. The split is that of main_unlearn.py, so no test image is ever trained on.
On all of UTKFace not measured yet; on a tenth of it, small and short: README.md, "Measured".
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(  # the released scripts'
    epochs=100,
    lr=0.005,  # this and weight_decay depend on the grouping
    weight_decay=1e-4,
    batch_size=128,  # images a step
    optimizer="adam",
    schedule="onecycle",
    clip_value=0.1,
    crop_padding=0,  # training images are larger than the crop
    flip=True,
    keep_best=True,
)
BY_GROUPING = {
    "TNN": {"lr": 0.005, "weight_decay": 1e-4},
    "MFD": {"lr": 1e-4, "weight_decay": 0.0},
    "balanced": {"lr": 0.001, "weight_decay": 0.0},
    "groups": {"lr": 0.001, "weight_decay": 1e-4},
    "tens": {"lr": 0.001, "weight_decay": 1e-3},
}

if __name__ == "__main__":
    main(
        "main_pretrain_utkface_resnet18.py",
        __doc__.split("\n")[0],
        "utkface",
        "resnet18_cifar100",
        RECIPE,
        BY_GROUPING,
    )
