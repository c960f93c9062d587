"""The recipe of a training run. This module does not import torch, so that `--help` is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters for training a classifier on randomly cropped images."""

    epochs: int
    lr: float  # with schedule "onecycle", the highest learning rate
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4
    batch_size: int = 128
    optimizer: str = "sgd"  # one of `choices.OPTIMIZERS`
    schedule: str = "cosine"  # to 0 over all steps; or "onecycle": up to lr, then down to nearly 0
    clip_value: float | None = None  # largest absolute value of a gradient component
    crop_padding: int = 4  # pixels of black border that are added before the random crop
    flip: bool = True  # random horizontal flips
    erase: int = 0  # side of a square at a random place of each image that is set to black, in pixels
    label_smoothing: float = 0.0
    keep_best: bool = False  # end with the weights of the epoch with the highest held-out accuracy
    precision: str = "fp32"  # of forward and backward passes: one of `choices.PRECISIONS`
