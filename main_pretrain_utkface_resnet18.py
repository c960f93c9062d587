"""Train a ResNet-18 to classify age groups on UTKFace, which main_unlearn.py --dataset utkface starts from.

    # one of the five groupings of ages into classes
    python main_pretrain_utkface_resnet18.py --age-grouping TNN
    # another one, with training curves for TensorBoard
    python main_pretrain_utkface_resnet18.py --age-grouping MFD --tracker tensorboard

Put the aligned and cropped images into data/utkface, or name the folder that holds utkface with --data-dir. Images are
resized to 128 × 128; training uses random crops of 120 × 120, evaluation the centre crop. The weights of the epoch with
the best validation accuracy are kept. main_unlearn.py uses the same split into training and test images.
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(  # of the released scripts
    epochs=100,
    lr=0.005,  # lr and weight_decay depend on the grouping, see below
    weight_decay=1e-4,
    batch_size=128,  # images per step
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
        __doc__,
        "utkface",
        "resnet18_cifar100",
        RECIPE,
        BY_GROUPING,
    )
