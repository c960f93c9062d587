"""Train the small classifier of digits in data/weights, with which main_unlearn.py runs by default.

    # train again
    python main_pretrain_digits_resnet20.py --rerun

The weights are part of the repository. Without --rerun, the script prints that they exist and ends.
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(
    epochs=12,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,  # images per step
    schedule="onecycle",
    crop_padding=2,  # pixels
    label_smoothing=0.1,  # gradients vanish in an overconfident model, so it cannot unlearn
    flip=False,  # a mirrored digit is not a digit
)

if __name__ == "__main__":
    main("main_pretrain_digits_resnet20.py", __doc__, "digits", "resnet20", RECIPE)
