"""Features of a model's layers: similarity between two models (linear CKA), and a two-dimensional map (t-SNE)."""

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

MEMORY = 2**29  # bytes of features kept at once


def layer_grams(model: nn.Module, images: Tensor | FolderImages, batch_size: int = 64) -> dict[str, Tensor]:
    """Compute the centred Gram matrix (N, N) of each weighted layer's features of N images, in execution order.

    A Gram matrix needs the features of all images. As many layers as fit in MEMORY are processed together, with one
    pass over the images per group of layers. If a layer runs more than once in a pass, its last output is used.
    """
    device = next(model.parameters()).device
    sizes, grams = layers(model, next(batches(images, 1, device))), {}
    for group in _groups(sizes, MEMORY // (4 * len(images))):
        parts: dict[str, list[Tensor]] = {name: [] for name in group}
        outputs: dict[str, Tensor] = {}
        with hooked(model, group, lambda name, _, output, to=outputs: to.update({name: flat_features(output)})):
            for batch in batches(images, batch_size, device):
                model(batch)
                for name in group:
                    parts[name].append(outputs.pop(name))
        for name in group:
            grams[name] = gram(torch.cat(parts.pop(name)))
    return grams


def _groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Split the names, in order, into groups of total size at most `most`; a larger one forms its own group."""
    group, total = [], 0
    for name, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def gram(features: Tensor) -> Tensor:
    """Return X Xᵀ (N, N), in double precision and on the CPU, for features X (N, D) centred over the images."""
    exact = (features.cpu() if features.device.type == "mps" else features).double()  # mps has no double
    centred = exact - exact.mean(0)
    return (centred @ centred.T).cpu()


def cka(first: Tensor, second: Tensor) -> float:
    """Compute linear CKA from two centred Gram matrices (N, N) of the same images.

    0 to 1, and 1 for equal features; nan if the features are the same for all images.

    ⟨K, L⟩ / (‖K‖ ‖L‖), which equals ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) for the centred features X and Y (Kornblith et al. 2019,
    arXiv 1905.00414). CKA is high for any two models if N is small and features are many: compare values of equal N.
    """
    scale = float(first.norm() * second.norm())
    return float((first * second).sum()) / scale if scale > 0 else float("nan")


def similarity(
    original: nn.Module,
    nets: Iterable[tuple[str, nn.Module]],
    splits: dict[str, Tensor | FolderImages],
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Compute the CKA of each layer's features between `original` and each other model, on each split.

    nets      method and unlearned model; may be a generator, so that one model is in memory at a time
    splits    images by name
    progress  called after each split of each model, the original included
    returns   a row per method, split and layer: method, split, images (their number), position (of the layer, from 1),
              layer (its name), cka
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
    """Return the inputs (N, D) of the linear layer that computes the logits, on the CPU.

    For a model that ends in another layer (SqueezeNet: a pooled convolution), return the logits.
    """
    kept, seen = [], {}
    with hooked(model, module_names(model, nn.Linear), lambda _, inputs, output: seen.update(last=(inputs, output))):
        for batch in batches(images, batch_size, next(model.parameters()).device):
            logits = model(batch)
            inputs, output = seen.pop("last", (logits, logits))
            kept.append((inputs if output.shape == logits.shape else logits).flatten(1).cpu())
    return torch.cat(kept)


def tsne(features: Tensor, seed: int) -> np.ndarray:
    """Return a t-SNE map (N, 2) of features (N, D) for N of at least 4: neighbours stay near, axes have no meaning."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features.float().numpy())


def maps(
    nets: Iterable[tuple[str, nn.Module]],
    splits: dict[str, Tensor | FolderImages],
    seed: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Compute a t-SNE map of the last features of each model, with the images of all splits in one map.

    returns  a row per model and image, in order: panel (the model's name), split, and the coordinates x and y

    The maps of different models are not aligned.
    """
    tables = []
    for name, net in nets:
        features = {split: last_features(net, images) for split, images in splits.items()}
        x, y = tsne(torch.cat(list(features.values())), seed).T
        split = np.repeat(list(features), [len(part) for part in features.values()])
        tables.append(pd.DataFrame({"panel": name, "split": split, "x": x, "y": y}))
        if progress:
            progress(1)
    return pd.concat(tables, ignore_index=True)
