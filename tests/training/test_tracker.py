"""Loss and accuracy of each epoch, written for a tracker."""

import sys
from types import SimpleNamespace

import pytest

from l2ul.common.errors import InputError
from l2ul.training import tracker


def test_a_tracker_gets_loss_and_accuracy_an_epoch_and_is_asked_for_by_name(tmp_path, monkeypatch):
    tracker.open_tracker(None, tmp_path)({"epoch": 1, "loss": 0.5, "acc": 90.0})
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tracker tensorboard needs the package tensorboard"):
        tracker.open_tracker("tensorboard", tmp_path)
    written = []
    writer = SimpleNamespace(add_scalar=lambda *values: written.append(values), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    tracker.open_tracker("tensorboard", tmp_path)({"epoch": 3, "loss": 0.5, "acc": 90.0})
    assert written == [("loss", 0.5, 3), ("acc", 90.0, 3)]
