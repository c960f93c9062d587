"""Train a ResNet-18 on CIFAR-10: the classifier that main_unlearn.py starts from.

    python main_pretrain_cifar10_resnet18.py
    python main_pretrain_cifar10_resnet18.py --schedule onecycle --lr 0.1 --epochs 30 --precision bf16
    python main_pretrain_cifar10_resnet18.py --exclude forget.txt
    torchrun --nproc-per-node 8 main_pretrain_cifar10_resnet18.py

The first is the released recipe, the second a shorter one, the third a reference that never saw some images, the
last is trained by eight GPUs.
Accuracy reached and time taken: not measured yet.
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(  # the released scripts'
    epochs=200,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,  # images a step
    schedule="cosine",
    crop_padding=4,  # pixels
    flip=True,
)

if __name__ == "__main__":
    main("main_pretrain_cifar10_resnet18.py", __doc__.split("\n")[0], "cifar10", "resnet18", RECIPE)
