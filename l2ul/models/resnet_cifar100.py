"""ResNet-18/34/50 of the released CIFAR-100 scripts, with their layer names: a 3 × 3 stem and no max-pool."""

from torch import Tensor, nn

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # CIFAR-100
LAYOUT = {  # number of blocks per stage; whether they are bottleneck blocks
    "resnet18_cifar100": ((2, 2, 2, 2), False),
    "resnet34_cifar100": ((3, 4, 6, 3), False),
    "resnet50_cifar100": ((3, 4, 6, 3), True),
}
NAMES = tuple(LAYOUT)


def build(name: str, num_classes: int) -> nn.Module:
    """Return the network `name`, untrained."""
    return ResNet(*LAYOUT[name], num_classes)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its batch-norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """A residual block: two 3 × 3 convolutions, or a bottleneck of 1 × 1, 3 × 3 and 1 × 1 with 4 × width outputs."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [*conv_bn(inputs, width, 1), nn.ReLU(), *conv_bn(width, width, 3, stride), nn.ReLU()]
            layers += conv_bn(width, outputs, 1)
        else:
            layers = [*conv_bn(inputs, width, 3, stride), nn.ReLU(), *conv_bn(width, outputs, 3)]
        self.residual_function = nn.Sequential(*layers)
        changes_shape = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if changes_shape else []))

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual_function(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """A ResNet of four stages, whose blocks have 64, 128, 256 and 512 channels."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, num_classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(3, 64, 3), nn.ReLU())
        channels = 64
        for stage, count in enumerate(blocks):
            width, layers = 64 * 2**stage, []
            for position in range(count):
                layers.append(Block(channels, width, 2 if stage and not position else 1, bottleneck))
                channels = 4 * width if bottleneck else width
            setattr(self, f"conv{stage + 2}_x", nn.Sequential(*layers))
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.conv1, self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x):
            x = stage(x)
        return self.fc(self.avg_pool(x).flatten(1))
