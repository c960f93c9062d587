"""Train a LeNet-5 on MNIST, the classifier that main_unlearn.py --dataset mnist starts from, or on Fashion-MNIST.

    python main_pretrain_mnist_lenet.py
    # Fashion-MNIST, with its own mean and standard deviation
    python main_pretrain_mnist_lenet.py --dataset fashion_mnist --mean 0.2860 --std 0.3530
    # a reference model, trained without the images in forget.txt
    python main_pretrain_mnist_lenet.py --exclude forget.txt

The data set is downloaded when it is missing. The weights are written to data/weights, where main_unlearn.py looks for
them.
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(
    epochs=12,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,  # images per step
    schedule="onecycle",
    crop_padding=2,  # pixels
    label_smoothing=0.1,  # gradients vanish in an overconfident model, so it cannot unlearn
    flip=False,  # a mirrored digit is not a digit
)

if __name__ == "__main__":
    main("main_pretrain_mnist_lenet.py", __doc__, "mnist", "lenet", RECIPE)
