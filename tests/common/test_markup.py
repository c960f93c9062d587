"""Texts of users in Markdown, LaTeX and HTML."""

import html as standard
import re

import pytest

from l2ul.common import markup

TEXTS = (
    *("D_f", "adv_imp (distill_stand_ins=mixes+copies)", "a|b", "*x* and **y**", "<b>&amp;</b>", "`code`", "_x_ __y__"),
    *("~~z~~", "[link](http://x)", "![](x)", "a\\|b", "$x^2$", "# heading", "- item", "> quote", "1. one", "2) two"),
    *("1.5 times", "-", "--- x", "== x", "[*", "100 % & more", "a\nb", "{x}~^#"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_shows_a_text_as_it_is(text):
    shown, escaped = text.replace("\n", " "), markup.markdown_text(text)
    assert markup.plain(escaped) == markup.plain(markup.markdown_code(text)) == shown
    assert markup.plain(f"**{escaped}** `x`") == f"{shown} x"
    assert standard.unescape(str(markup.html(escaped))) == shown
    assert "<strong>" in markup.html(f"**{escaped}**")


def test_names_with_underscores_and_brackets_stay_readable():
    for text in (
        "D_f",
        "adv_imp (pgd_eps=4, distill_stand_ins=mixes+copies)",
        "cifar10, resnet20, k = 16",
        "1.5",
        "-1",
    ):
        assert markup.markdown_text(text) == text
    assert markup.markdown_code("adv_imp") == "`adv_imp`"


@pytest.mark.parametrize("text", TEXTS)
def test_another_renderer_of_markdown_agrees(text):
    parser = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
    shown, escaped = text.replace("\n", " "), markup.markdown_text(text)
    for page, start, end in (
        (f"- {escaped}\n", "<ul>\n<li>", "</li>"),
        (f"### {escaped}\n", "<h3>", "</h3>"),
        (f"| {escaped} | {escaped} |\n|---|---|\n| {escaped} | **{escaped}** |\n", "<td>", "</td>"),
        (f"- {markup.markdown_code(text)}\n", "<ul>\n<li>", "</li>"),
    ):
        html = re.sub("</?code>", "", parser.render(page))
        assert standard.unescape(html.split(start)[1].split(end)[0]) == shown


def test_latex_shows_a_text_as_it_is():
    assert markup.latex_text(r"a_b & 5 % {x} \ <~^ $#") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{} \textless{}\textasciitilde{}\textasciicircum{} \$\#"
    )
    assert [markup.latex_text(text) for text in ("[x]", "*", "a\n\nb")] == ["{}[x]", "{}*", "a  b"]
    assert markup.latex_text("a-b--c---") == "a-b-{}-c-{}-{}-"
    assert markup.latex_text("D_f, D_r and D_test, not my_D_f") == r"$D_f$, $D_r$ and $D_\mathrm{test}$, not my\_D\_f"
