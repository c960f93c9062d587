"""What all processes of a torchrun but the first do, while that one carries out runs: parts of what it measures."""

import contextlib
import copy

from torch import Tensor, nn

from l2ul.common import distributed
from l2ul.common.errors import Diverged
from l2ul.experiments.adversarial_sets import Attack, Work
from l2ul.experiments.measurement import Measuring


def assist(measuring: Measuring) -> None:
    """Do parts of the attacks and the measurements of the first process, until it sets this one free."""
    classifier, device = measuring.setup.classifier, measuring.device

    def filled(state: dict[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(classifier)
        model.load_state_dict(state)
        return model

    def attack(how: Attack, state: dict[str, Tensor], work: Work, sizes: list[int]) -> None:
        how.assist(filled(state), work.on(device), sizes)

    def predict(state: dict[str, Tensor]) -> None:
        with contextlib.suppress(Diverged):  # the first process knows it too
            measuring.predict(filled(state), "")

    distributed.serve({"attack": attack, "predict": predict})
