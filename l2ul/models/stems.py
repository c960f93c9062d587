"""MobileNetV2, SqueezeNet 1.1 and DenseNet-121 for 32 × 32 images: torchvision's networks with smaller strides."""

from torch import nn
import torchvision

from l2ul.models.resnet import MEAN, STD  # CIFAR-10

NAMES = ("mobilenet_v2", "squeezenet1_1", "densenet121")

__all__ = ["MEAN", "NAMES", "STD", "build"]


def build(name: str, num_classes: int) -> nn.Module:
    """Return the network `name`, untrained.

    Its weights have the names and shapes of torchvision's, except for DenseNet's first convolution (3 × 3, not 7 × 7).
    """
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if name == "mobilenet_v2":  # downsamples 32 → 4 pixels, by 8 instead of 32
        net.features[0][0].stride = (1, 1)
        net.features[2].conv[1][0].stride = (1, 1)
    elif name == "squeezenet1_1":  # 32 → 4 pixels
        net.features[0].stride, net.features[0].padding = (1, 1), (1, 1)
    else:  # 32 → 4 pixels
        net.features.conv0 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.features.conv0.weight)
        net.features.pool0 = nn.Identity()
    return net
