"""Parsing of command lines: spelling of flags, error messages, --help."""

import argparse
import subprocess
import sys

from conftest import ROOT
import pytest

from l2ul.cli import options, unlearn_options
from l2ul.cli.parser import Parser, positive_int, setting
from l2ul.common.choices import InvalidValue, Number, OneOf, did_you_mean
from l2ul.common.errors import InputError
from l2ul.methods import registry

DOC = """Do a thing. It takes a while.

    python script.py --count 3
    python script.py            # with defaults

Results go to a folder.
"""


@pytest.fixture
def parser():
    made = Parser(DOC, prog="script.py")
    group = made.add_argument_group("things")
    options.add(group, "--count-of", "number of things", type=positive_int, default=2)
    options.add(group, "--goal", "what to do, 100 % of the time", choices=("misclassify", "relabel"))
    options.add(group, "--input", "what to read", required=True)
    made.add_argument("--former-name", help=argparse.SUPPRESS)
    return made


def unlearn_parser():
    made = Parser(DOC, prog="main_unlearn.py")
    for add in unlearn_options.FLAG_GROUPS:
        add(made)
    return made


def parsed(*words):
    found = unlearn_parser().parse_args(list(words))
    options.fill_defaults(found)
    return found


def fails(parser, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_underscores_are_dashes(parser):
    assert parser.parse_args(["--count_of=3", "--input", "a_b"]).count_of == 3
    assert parser.parse_args(["--count-of", "3", "--input", "a_b"]).input == "a_b"


def test_errors_are_one_sentence_with_a_suggestion(parser, capsys):
    given = ["--input", "x"]
    assert "unknown flag --cuont-of; did you mean --count-of? (see script.py --help)\n" in fails(
        parser, capsys, *given, "--cuont-of", "3"
    )
    assert "unknown flag --zzz (see" in fails(parser, capsys, *given, "--zzz")
    assert "unexpected argument 'more': --input takes one value (see" in fails(parser, capsys, *given, "more")
    assert "unexpected argument 'more' (see" in fails(parser, capsys, "more", *given)
    error = fails(parser, capsys, *given, "--goal", "missclassify")
    assert "'missclassify' is not allowed; expected one of misclassify, relabel; did you mean misclassify?" in error
    assert "--input" in fails(parser, capsys)
    assert error.count("\n") == 1


def test_hidden_flags_are_not_suggested(parser, capsys):
    assert "did you mean" not in fails(parser, capsys, "--input", "x", "--former-nam", "3")


def test_help_has_examples_and_a_glossary_and_marks_required_flags(parser):
    text = parser.format_help()
    assert "usage: script.py [flags]\n\nDo a thing. It takes a while.\n\nResults go to a folder.\n" in text
    assert "examples:\n  python script.py --count 3\n  python script.py            # with defaults\n" in text
    assert "--input X                     what to read (required)" in text
    assert "number of things (default: 2)" in text
    assert text.count("misclassify") == 1
    for term in ("D_f", "D_r", "D_test", "θ⁰", "k  "):
        assert f"\n  {term}" in text
    assert "glossary" not in Parser(DOC, prog="p", glossary=False).format_help()


def test_help_lists_every_method_and_metric_once():
    text = unlearn_parser().format_help()
    for name, method in registry.METHODS.items():
        assert text.count(f"\n  {name} ") == 1, name
        assert method.summary.split()[0] in text
    assert "(default: 20; digits: 10; cifar100: 200; utkface: 300; imagenet: 200)" in " ".join(text.split())
    assert "--course" not in text


def test_parsers_do_not_import_torch():
    code = "import sys, l2ul.cli.options, l2ul.deletion.options; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_under_torchrun_only_the_first_process_prints(parser, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert fails(parser, capsys, "--zzz") == ""


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Number(float, 0, open=True), "0", "a number above 0"),
        (Number(float, 0, maximum=1), "1.5", "a number of at least 0 and at most 1"),
        (Number(int, 1), "2.5", "a whole number of at least 1"),
        (Number(int, 1), str(2**63), "a whole number of at least 1"),
        (Number(float), "nan", "a number"),
        (Number(float), "inf", "a number"),
        (Number(float, maximum=3), "four", "a number of at most 3"),
        (OneOf(("a",)), "b", "a"),
    ],
)
def test_values_outside_a_range_are_refused(kind, text, expected):
    with pytest.raises(InvalidValue, match=f"'{text}' is not allowed; expected {expected}$"):
        kind(text)


def test_numbers_have_their_type():
    assert [type(Number(int)("3")), type(Number(float)("3")), type(Number(int).check(3.0))] == [int, float, int]
    for value in (True, "3", None, 2.5):
        with pytest.raises(InvalidValue):
            Number(int).check(value)


def test_suggestions_are_similar_names():
    assert did_you_mean("pgd_ep", ("pgd_eps", "seed")) == "; did you mean pgd_eps?"
    assert did_you_mean("zzz", ("pgd_eps", "seed")) == ""


def test_settings_are_pairs():
    assert setting("unlearn-lr=0.1") == ("unlearn_lr", "0.1")
    for text in ("epochs", "=3", "epochs="):
        with pytest.raises(InputError, match="expected NAME=VALUE, such as epochs=3"):
            setting(text)


def test_setting_is_another_way_to_give_a_flag():
    found = parsed("--method", "adv", "scrub", "--setting", "pgd_eps=2", "bn=eval", "epochs=5", "--setting", "lr=1e-3")
    assert (found.pgd_eps, found.bn, found.setting) == (2.0, "eval", {"epochs": 5, "lr": 1e-3})
    assert found.unlearn_lr == 1e-2  # default of digits
    assert parsed("--method", "scrub", "--course", "epochs=5").setting == {"epochs": 5}
    assert parsed("--method", "adv", "--pgd-eps", "2", "--setting", "pgd-eps=2.0").pgd_eps == 2.0
    values = options.hyper_parameters(found)
    assert (values["pgd_eps"], values["method_settings"]) == (2.0, {"epochs": 5, "lr": 1e-3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--method adv --pgd-eps 1 --setting pgd_eps=2",
            "--pgd-eps 1.0 and --setting pgd_eps=2.0 contradict each other",
        ),
        ("--method adv --setting pgd_eps=1 pgd_eps=2", "setting pgd_eps has two values, 1.0 and 2.0; give one"),
        (
            "--method adv --setting pgd_ep=1",
            "method adv has no setting pgd_ep; expected one of .*; did you mean pgd_eps",
        ),
        ("--method adv scrub --setting l1=1", "none of the methods adv scrub has a setting l1; expected one of"),
        ("--method before --setting lr=1", "method before has no setting lr; leave it out"),
        ("--method scrub --setting temperature=0", "setting temperature=0 is not allowed; expected a number above 0"),
        ("--method neggrad_plus --setting retain=2", "expected a number of at least 0 and at most 1"),
        ("--method adv --setting bn=evil", "setting bn=evil is not allowed; expected one of train, eval"),
    ],
)
def test_wrong_settings_are_explained(words, message):
    with pytest.raises(InputError, match=message):
        parsed(*words.split())


def test_an_unknown_method_is_explained_with_the_way_to_the_help(capsys):
    with pytest.raises(SystemExit):
        parsed("--method", "adv", "destill")
    message = capsys.readouterr().err
    assert "unknown method 'destill'; expected one of before, neggrad, " in message
    assert "; did you mean distill? (see " in message
    assert message.endswith(" --help)\n")


def test_words_that_are_not_utf8_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        Parser("Do it.", prog="script.py").parse_args(["in/caf\udce9"])
    assert (stop.value.code, "'in/caf\\udce9' is not UTF-8" in capsys.readouterr().err) == (2, True)
