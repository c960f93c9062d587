"""Curves of a training, for those who watch them: TensorBoard's, where it is installed."""

from collections.abc import Callable
from pathlib import Path

from l2ul.common.errors import InputError


def open_tracker(name: str | None, folder: Path) -> Callable[[dict[str, float]], object]:
    """A function that takes the row of an epoch; without a name, one that does nothing with it.

    Raises InputError where the tracker is not installed.
    """
    if name is None:
        return lambda row: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tracker tensorboard needs the package tensorboard; install it (uv run --extra tensorboard …, or "
            "pip install tensorboard) or leave the flag out"
        ) from None
    writer = SummaryWriter(str(folder))

    def track(row: dict[str, float]) -> None:
        for key in ("loss", "acc"):
            writer.add_scalar(key, row[key], row["epoch"])
        writer.flush()

    return track
