"""Texts of users in Markdown, LaTeX and HTML: a function for each format. Pages from templates escape by themselves.

A note or cell of a table is inline Markdown: text that `markdown_text` has escaped, `markdown_code` and **bold** text.
"""

import re

from markupsafe import Markup, escape

from l2ul.common.text import one_line

INLINE = re.compile(r"\\([!-/:-@[-`{-~])|`([^`]+)`|\*\*((?:\\.|[^\\])+?)\*\*")  # an escaped character, code, bold text
SYMBOLS = {"D_f": "$D_f$", "D_r": "$D_r$", "D_test": r"$D_\mathrm{test}$"}  # formulas of LaTeX and matplotlib
LATEX = (
    SYMBOLS
    | {char: f"\\{char}" for char in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
        "¹": r"\textsuperscript{1}",
        "\ufffd": "?",
        "–": "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "-": "-{}",  # before a hyphen: -- is a dash
    }
)
LATEX_PART = re.compile(r"(?<!\w)D_(?:f|r|test)(?!\w)|-(?=-)|[^-]", re.DOTALL)


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, also in a cell of a table or at the start of a line.

    Underscores between letters, as in D_f, stay as they are.
    """
    text = re.sub(r"[\\`*<|\[&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))
    start = re.match(r">|(?:[#+=-]+|\d+[.)])(?=\s|$)", text)  # of a heading, a list or a quotation
    return f"{text[: start.end() - 1]}\\{text[start.end() - 1 :]}" if start else text


def markdown_code(text: str) -> str:
    """Return a text as code in Markdown; one that code cannot hold as `markdown_text`."""
    return markdown_text(text) if set(text) & set("`|") or not text else f"`{one_line(text)}`"


def plain(markdown: str) -> str:
    """Return what inline Markdown shows, without its markup."""
    return INLINE.sub(lambda match: match[1] or match[2] or plain(match[3]), markdown)


def html(markdown: str) -> Markup:
    """Return inline Markdown as HTML."""
    parts, end = [], 0
    for match in INLINE.finditer(markdown):
        char, code, bold = match.groups()
        parts.append(escape(markdown[end : match.start()]))
        if bold:
            parts.append(Markup("<strong>{}</strong>").format(html(bold)))
        else:
            parts.append(Markup("<code>{}</code>").format(code) if code else escape(char))
        end = match.end()
    return Markup("").join([*parts, escape(markdown[end:])])


def latex_text(text: str) -> str:
    """Return a text that LaTeX shows as it is, also at the start of a line after `\\\\`, which reads * and [.

    D_f, D_r and D_test are formulas.
    """
    escaped = LATEX_PART.sub(lambda part: LATEX.get(part[0], part[0]), one_line(text))
    return f"{{}}{escaped}" if escaped.startswith(("*", "[")) else escaped
