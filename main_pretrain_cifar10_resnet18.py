"""Train a ResNet-18 on CIFAR-10, the classifier that main_unlearn.py --dataset cifar10 starts from.

    # with the recipe of the released scripts, in place of the weights of the repository
    python main_pretrain_cifar10_resnet18.py --rerun
    # with a shorter recipe, into another file
    python main_pretrain_cifar10_resnet18.py --schedule onecycle --lr 0.1 --epochs 30 --output mine.safetensors
    # on a GPU, which larger batches use fully
    python main_pretrain_cifar10_resnet18.py --schedule onecycle --lr 0.2 --epochs 60 --batch-size 512 \\
        --precision bf16 --output mine.safetensors
    # another network of CIFAR-10
    python main_pretrain_cifar10_resnet18.py --model resnet34
    # a reference model, trained without the images in forget.txt
    python main_pretrain_cifar10_resnet18.py --exclude forget.txt
    # on eight GPUs
    torchrun --nproc-per-node 8 main_pretrain_cifar10_resnet18.py --output mine.safetensors

The weights are written to data/weights, where main_unlearn.py looks for them. The repository contains weights for this
classifier, which are kept unless --rerun or --output is given.
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
