"""Advice in messages, such as "leave them out with --skip-bad": keep only what the command at hand takes."""

from collections.abc import Container
import re

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


def fitting(sentence: str, foreign: Container[str], instead: str = "") -> str:
    """Return a sentence without advice that names flags which the command does not take.

    Advice is what follows a semicolon or colon; its alternatives are separated by ", or". The beginning of the sentence
    is the problem and stays as it is.

    foreign  the flags that the command does not take
    instead  advice in place of all alternatives to what was left out, and of all advice on a problem with such a flag;
             empty: these alternatives stay
    """
    pieces, is_cut = re.split(r"(; |: )", sentence), False
    kept = pieces[0]
    if instead and any(flag in foreign for flag in FLAG.findall(kept)):
        return f"{kept}; {instead}"
    for mark, text in zip(pieces[1::2], pieces[2::2], strict=True):
        alternatives = text.split(", or ")
        fit = [one for one in alternatives if not any(flag in foreign for flag in FLAG.findall(one))]
        if len(fit) == len(alternatives):
            kept += mark + text
            continue
        is_cut = True
        fit = [] if instead else fit
        left = mark + ", or ".join(fit) if fit else ""
        opened = left.count("(") - left.count(")") - text.count("(") + text.count(")")
        kept += left + ")" * max(0, opened)  # of parentheses that end in what was left out
    return f"{kept}; {instead}" if is_cut and instead else kept
