"""Train a ResNet-18 on CIFAR-10, the classifier that main_unlearn.py --dataset cifar10 starts from.

    python main_pretrain_cifar10_resnet18.py
    python main_pretrain_cifar10_resnet18.py --schedule onecycle --lr 0.1 --epochs 30 --precision bf16
    python main_pretrain_cifar10_resnet18.py --exclude forget.txt
    torchrun --nproc-per-node 8 main_pretrain_cifar10_resnet18.py

The first command uses the recipe of the released scripts, the second a shorter one. The third trains a retrained model,
without the images in forget.txt. The fourth trains on eight GPUs.
Accuracy and time are not measured yet.
"""

from l2ul.cli.pretrain_command import main
from l2ul.training.recipe import Recipe

RECIPE = Recipe(  # of the released scripts
    epochs=200,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,  # images per step
    schedule="cosine",
    crop_padding=4,  # pixels
    flip=True,
)

if __name__ == "__main__":
    main("main_pretrain_cifar10_resnet18.py", __doc__, "cifar10", "resnet18", RECIPE)
