"""Keep libraries that download models and data sets from the network."""

from collections.abc import Iterator
import contextlib
from types import ModuleType
from urllib.error import URLError


@contextlib.contextmanager
def offline(*settings: ModuleType) -> Iterator[None]:
    """Let Hugging Face packages, timm and torchvision read only folders and their cache inside the block.

    settings  modules with the switch HF_HUB_OFFLINE beside that of huggingface_hub, such as datasets.config

    Does nothing for a package that is not installed.
    """
    from torch import hub  # downloads the weights of torchvision, and of timm where they are not on the hub

    try:
        from huggingface_hub import constants
    except ImportError:
        switches = settings
    else:
        switches = (constants, *settings)
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    open_url, hub.urlopen = hub.urlopen, _refuse
    try:
        yield
    finally:
        hub.urlopen = open_url
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _refuse(*arguments: object, **options: object) -> None:
    raise URLError("downloads are off")
