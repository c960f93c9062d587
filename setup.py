"""Put the scripts and the weights of the digits into the wheel, as l2ul/scripts. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

WEIGHTS = Path("data/weights/digits_resnet20.safetensors")  # with which main_unlearn.py runs without flags


class BuildWithScripts(build_py):
    """In an editable installation, the scripts stay where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in (*sorted(Path().glob("main_*.py")), WEIGHTS):
            target = Path(self.build_lib, "l2ul", "scripts", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithScripts})
