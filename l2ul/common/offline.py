"""Keep the packages of Hugging Face from the network."""

from collections.abc import Iterator
import contextlib
from types import ModuleType


@contextlib.contextmanager
def offline(*settings: ModuleType) -> Iterator[None]:
    """Let Hugging Face packages read only folders and their cache inside the block.

    settings  modules with the switch HF_HUB_OFFLINE beside that of huggingface_hub, such as datasets.config

    Does nothing for a package that is not installed.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        switches = settings
    else:
        switches = (constants, *settings)
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value
