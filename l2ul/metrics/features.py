"""What a net's layers make of images: how alike two nets' features are (linear CKA), and a map of them (t-SNE)."""

from collections.abc import Iterable, Iterator
import itertools

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common.activations import flat_features, hooked, layers, module_names
from l2ul.data.folder import FolderImages
from l2ul.data.images import batches

MEMORY = 2**29  # bytes of features held at once


def layer_grams(model: nn.Module, images: Tensor | FolderImages, batch_size: int = 64) -> dict[str, Tensor]:
    """Each weighted layer's centred Gram matrix (N, N) of its features of N images, in the order layers run.

    A Gram matrix needs the features of all images. Layers are taken as many at a time as fit in MEMORY, with a pass
    over the images for each such group. Of a layer that runs more than once in a pass, the last output counts.
    """
    device = next(model.parameters()).device
    sizes, grams = layers(model, next(batches(images, 1, device))), {}
    for group in _groups(sizes, MEMORY // (4 * len(images))):
        parts: dict[str, list[Tensor]] = {name: [] for name in group}
        found: dict[str, Tensor] = {}
        with hooked(model, group, lambda name, _, output, to=found: to.update({name: flat_features(output)})):
            for batch in batches(images, batch_size, device):
                model(batch)
                for name in group:
                    parts[name].append(found.pop(name))
        for name in group:
            grams[name] = gram(torch.cat(parts.pop(name)))
    return grams


def _groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names in their order, in groups whose sizes sum to `most` or less; one that is larger goes alone."""
    group, total = [], 0
    for name, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def gram(features: Tensor) -> Tensor:
    """X Xᵀ (N, N) in double precision, on the CPU, of features (N, D) centred over the images."""
    exact = (features.cpu() if features.device.type == "mps" else features).double()  # mps has no double
    centred = exact - exact.mean(0)
    return (centred @ centred.T).cpu()


def cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two centred Gram matrices (N, N) of the same images, 0 to 1; nan for features that are constant.

    ⟨K, L⟩ / (‖K‖ ‖L‖), which is ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of the centred features X and Y (Kornblith et al. 2019,
    arXiv 1905.00414). Few images of many features look alike whatever the nets: compare equal N.
    """
    scale = float(first.norm() * second.norm())
    return float((first * second).sum()) / scale if scale > 0 else float("nan")


def similarity(
    original: nn.Module,
    nets: Iterable[tuple[str, nn.Module]],
    splits: dict[str, Tensor | FolderImages],
    progress: Progress | None = None,
) -> pd.DataFrame:
    """A row for each method, split and layer: CKA of the layer's features in `original` and in the method's net.

    nets      method and unlearned net, one after the other; may be a generator, so that one is held at a time
    progress  told of each split that is done with a net, the original among them
    """
    before, rows = {}, []
    for method, net in itertools.chain([(None, original)], nets):
        for split, images in splits.items():
            grams = layer_grams(net, images)
            if method is None:
                before[split] = grams
            else:
                row = {"method": method, "split": split, "images": len(images)}
                for position, (layer, matrix) in enumerate(grams.items(), start=1):
                    rows.append(row | {"position": position, "layer": layer, "cka": cka(before[split][layer], matrix)})
            if progress:
                progress(1)
    return pd.DataFrame(rows)


def last_features(model: nn.Module, images: Tensor | FolderImages, batch_size: int = 64) -> Tensor:
    """What the classifying layer sees of each image: the input (N, D) of the linear layer that gives the logits.

    A net that ends in something else (SqueezeNet: a pooled convolution) has its logits taken. On the CPU.
    """
    kept, seen = [], {}
    with hooked(model, module_names(model, nn.Linear), lambda _, inputs, output: seen.update(last=(inputs, output))):
        for batch in batches(images, batch_size, next(model.parameters()).device):
            logits = model(batch)
            inputs, output = seen.pop("last", (logits, logits))
            kept.append((inputs if output.shape == logits.shape else logits).flatten(1).cpu())
    return torch.cat(kept)


def tsne(features: Tensor, seed: int) -> np.ndarray:
    """A t-SNE map (N, 2) of features (N, D), N at least 4, that keeps neighbours near; its axes mean nothing."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features.float().numpy())


def maps(
    nets: Iterable[tuple[str, nn.Module]],
    splits: dict[str, Tensor | FolderImages],
    seed: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """A row for each net (its name: `panel`) and image, in order: `split`, and x and y of the net's t-SNE map.

    The images of all splits share a map; each net has its own, and no two of them are aligned.
    """
    tables = []
    for name, net in nets:
        found = {split: last_features(net, images) for split, images in splits.items()}
        x, y = tsne(torch.cat(list(found.values())), seed).T
        split = np.repeat(list(found), [len(part) for part in found.values()])
        tables.append(pd.DataFrame({"panel": name, "split": split, "x": x, "y": y}))
        if progress:
            progress(1)
    return pd.concat(tables, ignore_index=True)
