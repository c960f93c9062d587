"""The argparse parser of the scripts, and the types of numbers that flags take."""

import argparse
from collections.abc import Container, Sequence
import os
import sys
import textwrap

from l2ul.common import installation
from l2ul.common.choices import InvalidValue, Number, did_you_mean
from l2ul.common.text import one_line

Group = argparse._ArgumentGroup  # a titled group of flags of a parser
WIDTH = 110  # columns of --help
GLOSSARY = """\
D_f     forget set: the k images that the model has to forget
D_r     retain set: all other training images
D_test  test set
D_adv   adversarial examples of D_f, for the methods adv and adv_imp
θ⁰      weights of the original model
k       number of images in D_f"""

finite_float = Number(float)
positive_float = Number(float, 0, open=True)
nonnegative_float = Number(float, 0)
whole_number = Number(int)
positive_int = Number(int, 1)
nonnegative_int = Number(int, 0)


class Parser(argparse.ArgumentParser):
    """An argparse parser with the conventions of the scripts.

    Flags may be spelled with `_` in place of `-`. An error is one sentence and exit code 2, with a suggestion for a
    mistyped flag. `--help` shows the examples of the script and a glossary, `--version` the versions of the software.

    doc       docstring of the script: indented paragraphs are shown as examples below the flags, others above them
    epilog    text below the flags, after the examples
    sections  further sections of --help by their title, below the flags
    """

    def __init__(self, doc: str, prog: str | None = None, epilog: str = "", glossary: bool = True):
        paragraphs = textwrap.dedent(doc).strip().split("\n\n")
        examples = [textwrap.dedent(one) for one in paragraphs if one.startswith(" ")]
        self.sections = {"examples": "\n\n".join(examples)} if examples else {}
        super().__init__(
            prog=prog,
            usage="%(prog)s [flags]",
            description="\n\n".join(one for one in paragraphs if not one.startswith(" ")),
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=WIDTH),
        )
        self.add_argument("--version", action=_Version, help="show versions, commit and device, and exit")
        self.text, self.glossary = epilog.strip(), GLOSSARY if glossary else ""

    @property
    def flags(self) -> list[argparse.Action]:
        """All flags but --help and --version."""
        return [action for action in self._actions if action.dest not in ("help", argparse.SUPPRESS)]

    def words(self, values: argparse.Namespace, leave_out: Container[str] = ()) -> list[str]:
        """Return the command line that gives these values, without flags that have their defaults.

        leave_out  names of values that are not part of it either
        """
        words: list[str] = []
        for action in self.flags:
            value = getattr(values, action.dest)
            if action.dest in leave_out or value == action.default:
                continue
            several = [] if action.nargs == 0 else value if isinstance(value, list) else [value]
            words += [action.option_strings[0], *map(str, several)]
        return words

    def format_help(self) -> str:
        sections = self.sections | ({"glossary": self.glossary} if self.glossary else {})
        parts = [f"{title}:\n{textwrap.indent(text, '  ')}" for title, text in sections.items()]
        self.epilog = "\n\n".join(filter(None, (*parts, self.text)))
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = sys.argv[1:] if args is None else args
        for word in words:
            if any("\ud800" <= character <= "\udfff" for character in word):
                self.error(f"{word!r} is not UTF-8, so that no record or report can name it; rename the file or folder")
        return super().parse_known_args(list(map(_dashed, words)), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
            shown = [action for action in self.flags if action.help is not argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            hint = did_you_mean(flag, known) if flag else ""
            problem = f"unexpected argument {unknown[0]!r}{self._of_one_value(unknown[0], args)}"
            self.error(f"unknown flag {flag}{hint}" if flag else problem)
        return options

    def _of_one_value(self, word: str, args: Sequence[str] | None) -> str:
        """Return the end of the message for a word that follows a flag and its only value; "" for other words."""
        words = sys.argv[1:] if args is None else args
        single = {name for action in self.flags if action.nargs is None for name in action.option_strings}
        flags = (_dashed(words[index - 2]) for index in range(2, len(words)) if words[index] == word)
        return next((f": {flag} takes one value" for flag in flags if flag in single), "")

    def exit(self, status: int = 0, message: str | None = None):
        super().exit(status, message if os.environ.get("RANK", "0") == "0" else None)  # under torchrun, print once

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def print_versions() -> None:
    """Print the versions of the software and the device that scripts use by default."""
    print("\n".join(f"{name} {version}" for name, version in installation.versions().items()))
    try:
        from l2ul.common import device  # imports torch

        print(f"device {device.device_name(device.choose_device(None))}")
    except Exception as error:  # a broken installation, for which the versions are needed most
        print(f"device unknown: torch cannot be used ({type(error).__name__}: {error})")


class _Version(argparse.Action):
    """Print the versions, for reports of problems."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *parsed: object) -> None:
        print_versions()
        parser.exit()


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def setting(text: str) -> tuple[str, str]:
    """Split `NAME=VALUE`, with dashes or underscores in the name. Raises InvalidValue for another text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InvalidValue(f"{text!r} is not allowed", "expected NAME=VALUE, such as epochs=3")
    return name.replace("-", "_"), value
