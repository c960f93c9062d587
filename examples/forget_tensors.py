"""Make a classifier forget 8 of its training images, as tensors: `l2ul.forget`.

    python -m examples.forget_tensors

The classifier is a small network for handwritten digits, trained here in seconds.
"""

import l2ul  # isort: skip  # first: it sets the environment before torch is imported

from sklearn.datasets import load_digits
import torch
from torch import Tensor, nn
import torch.nn.functional as F

Images = tuple[Tensor, Tensor]  # (n, 1, 8, 8) float in [0,1], and their classes (n,)


def load() -> tuple[Images, Images]:
    """Return training and test images of the digits; every fifth image is a test image."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    is_test = torch.arange(len(images)) % 5 == 4
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def train(images: Tensor, labels: Tensor, epochs: int = 30) -> nn.Module:
    """Train a small network that maps pixels in [0,1] to 10 logits."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(32 * 3 * 3, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    (images, labels), test = load()
    model = train(images, labels)

    # robust=0 forgets the images as they are stored, with these settings. Without settings, the call searches the best
    # ones for up to 10 minutes, and forgets the images as they are used: also cropped, compressed and so on.
    result = l2ul.forget(model, images[:8], labels[:8], robust=0, distill_steps=80, distill_lr=2e-3)

    print(result)
    print("forgotten:", result.forgotten.tolist())
    print("predicted before:", result.predictions_before.tolist(), "after:", result.predictions_after.tolist())
    for name, one in (("before", model), ("after", result.model)):
        print(f"accuracy on the test images {name}: {accuracy(one, *test):.1f} %")


if __name__ == "__main__":
    main()
