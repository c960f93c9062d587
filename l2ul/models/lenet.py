"""LeNet-5 for grey images of 28 × 28 pixels such as MNIST (LeCun et al., 1998), with ReLU and max-pooling."""

from torch import nn

MEAN, STD = (0.1307,), (0.3081,)  # of MNIST
CHANNELS = 1
NAMES = ("lenet",)


def build(name: str, num_classes: int) -> nn.Module:
    """Return the network, untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),  # (N, 6, 28, 28)
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),  # (N, 16, 10, 10)
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
