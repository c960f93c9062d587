"""Write training curves for TensorBoard, if it is installed."""

from collections.abc import Callable
from pathlib import Path

from l2ul.common.errors import InputError


def open_tracker(name: str | None, folder: Path) -> Callable[[dict[str, float]], object]:
    """Return a function that writes the row of an epoch to the tracker; without a name, one that does nothing.

    name    one of `choices.TRACKERS`, or None
    folder  where the curves are written

    Raises InputError if the tracker is not installed.
    """
    if name is None:
        return lambda row: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tracker tensorboard needs the package tensorboard; install it (uv run --extra tensorboard …, or "
            "pip install tensorboard), or leave out --tracker"
        ) from None
    writer = SummaryWriter(str(folder))

    def track(row: dict[str, float]) -> None:
        for key in ("loss", "acc"):
            writer.add_scalar(key, row[key], row["epoch"])
        writer.flush()

    return track
