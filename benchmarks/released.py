"""The order of work of the authors' released scripts, to compare times with. It is not their code.

The attack makes one example of each image at a time, in batches of 16 or 32, and computes gradients of the weights too.
Each accuracy decodes its images with PIL in a DataLoader. The penalty is a loop over parameters. Passes are in fp32 and
in the default memory layout, and batch-norms are not folded.
"""

from collections.abc import Iterator
import copy

from PIL import Image
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class PilImages(Dataset):
    """uint8 images (N, 3, H, W). Each access converts an image to a PIL image and back to a tensor."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = labels.cpu()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return TO_TENSOR(Image.fromarray(self.images[index])), self.labels[index]


def as_built(model: nn.Module) -> nn.Module:
    """Return a copy with the contiguous memory layout, all of whose weights require gradients."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format).requires_grad_(True)


def accuracy(model: nn.Module, images: PilImages, device: torch.device, batch_size: int, workers: int = 0) -> float:
    model.eval()
    correct = 0
    with torch.no_grad():
        for pixels, labels in DataLoader(images, batch_size, num_workers=workers):
            correct += (model(pixels.to(device)).argmax(1) == labels.to(device)).sum().item()
    return 100 * correct / len(images)


def attack(
    model: nn.Module,
    images: PilImages,
    num_classes: int,
    draws: int,
    *,
    eps: float,
    alpha: float,
    steps: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return targeted L2-PGD examples of all images and their targets, `draws` of each image."""
    model.eval()
    found, aims = [], []
    for _ in range(draws):
        for pixels, labels in DataLoader(images, batch_size):
            x, shift = pixels.to(device), torch.randint(1, num_classes, labels.shape)
            targets = ((labels + shift) % num_classes).to(device)
            found.append(_pgd(model, x, targets, eps, alpha, steps).detach().cpu())
            aims.append(targets.cpu())
    return torch.cat(found), torch.cat(aims)


def _pgd(model: nn.Module, x: Tensor, targets: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    delta = _into_ball(torch.rand_like(x) - x, eps)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        F.cross_entropy(model(x + delta), targets, reduction="sum").backward()
        gradient = delta.grad
        delta = delta.detach() - alpha * gradient / _norm(gradient).clamp(min=1e-6)
        delta = _into_ball((x + delta).clamp(0, 1) - x, eps)
    return x + delta


def _norm(pixels: Tensor) -> Tensor:
    return pixels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _into_ball(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _norm(delta).clamp(min=1e-12)).clamp(max=1)


def importance(model: nn.Module, images: PilImages, device: torch.device) -> dict[str, Tensor]:
    model.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for pixels, _ in DataLoader(images, 1):
        model.zero_grad()
        model(pixels.to(device)).norm().backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.abs() / len(images)
    return total


def steps(
    model: nn.Module,
    images: PilImages,
    adv: tuple[Tensor, Tensor] | None,
    held: dict[str, Tensor] | None,
    *,
    batch_size: int,
    adv_batch_size: int,
    lr: float,
    device: torch.device,
) -> Iterator[float]:
    """Take steps in train mode: neggrad, with `adv` Adv, with `held` Adv+Imp. Yield the accuracy on D_f after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    forgets = _endless(DataLoader(images, batch_size, shuffle=True))
    kept = _endless(DataLoader(list(zip(*adv, strict=True)), adv_batch_size, shuffle=True)) if adv else None
    while True:
        model.train()
        pixels, labels = (part.to(device) for part in next(forgets))
        loss = -F.cross_entropy(model(pixels), labels)
        if kept:
            examples, targets = (part.to(device) for part in next(kept))
            share = len(pixels) / (len(pixels) + len(examples))
            loss = share * loss + (1 - share) * F.cross_entropy(model(examples), targets)
        if held:
            penalty = 0.0
            for name, parameter in model.named_parameters():
                penalty += (held[name] * (parameter - before[name]) ** 2).sum() / 2
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield accuracy(model, images, device, batch_size)


def _endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader
