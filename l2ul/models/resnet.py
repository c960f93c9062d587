"""ResNet-18/34/50 of the released CIFAR-10 scripts: torchvision's networks with a 3 × 3 stem of stride 1.

The max-pool after the stem is kept. `resnet18_nopool` and so on have none, as many public CIFAR classifiers (those of
SalUn, for example). Layer names and shapes are the same, so a file of weights does not tell one from the other.
"""

from torch import nn
from torchvision.models import resnet as torchvision_resnet

NO_POOL = "_nopool"
NAMES = ("resnet18", "resnet34", "resnet50", "resnet18_nopool", "resnet34_nopool", "resnet50_nopool")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10


def build(name: str, num_classes: int) -> nn.Module:
    """Return the network `name`, untrained."""
    net = getattr(torchvision_resnet, name.removesuffix(NO_POOL))(num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if name.endswith(NO_POOL):
        net.maxpool = nn.Identity()
    return net
