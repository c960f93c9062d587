"""Train the small digits classifier that is committed in data/weights: what main_unlearn.py runs on by default.

python main_pretrain_digits_resnet20.py --rerun
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(
    epochs=12,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,  # images a step
    schedule="onecycle",
    crop_padding=2,  # pixels
    label_smoothing=0.1,  # an overconfident net has no gradient to unlearn with
    flip=False,  # a mirrored digit is another sign
)

if __name__ == "__main__":
    main("main_pretrain_digits_resnet20.py", __doc__.split("\n")[0], "digits", "resnet20", RECIPE)
