"""Start a script by its name: `python -m l2ul unlearn` or `l2ul unlearn` is `python main_unlearn.py`."""

import ast
from pathlib import Path
import runpy
import sys

from l2ul.cli.parser import print_versions
from l2ul.common.choices import did_you_mean
from l2ul.common.installation import SCRIPTS

PREFIX = "main_"


def scripts() -> dict[str, Path]:
    """Return the paths of the scripts by their names in a command."""
    return {path.stem.removeprefix(PREFIX): path for path in sorted(SCRIPTS.glob(f"{PREFIX}*.py"))}


def usage() -> str:
    lines = ["usage: python -m l2ul NAME [flags], or l2ul NAME [flags]", "", "NAME starts main_NAME.py:"]
    for name, path in scripts().items():
        summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n")[0]
        lines.append(f"  {name:26} {summary}")
    return "\n".join(
        [*lines, "", "python -m l2ul NAME --help shows the flags of a script, python -m l2ul --version the versions."]
    )


def main() -> None:
    name, known = (sys.argv[1:2] or ["--help"])[0], scripts()
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print_versions()
        return
    if name not in known:
        print(f"l2ul: there is no script {name!r}{did_you_mean(name, known)}; see l2ul --help", file=sys.stderr)
        raise SystemExit(2)
    path = str(known[name])
    sys.argv = [path, *sys.argv[2:]]
    sys.path.insert(0, str(SCRIPTS))  # as for python main_NAME.py
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
