"""Several values and ranges of values on a command line."""

import pytest

from l2ul.cli.parser import Parser, nonnegative_float, positive_float, positive_int
from l2ul.common.errors import InputError
from l2ul.sweeps import options, ranges
from l2ul.sweeps.ranges import Interval


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("3", positive_int, [3]),
        ("1:5:9", nonnegative_float, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
        ("1:4:3", nonnegative_float, [1.0, 2.5, 4.0]),
        ("0.1:0.7:7", positive_float, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),  # rounded: not 0.30000000000000004
        ("1e-4:1e-3:log5", positive_float, [0.0001, 0.000177828, 0.000316228, 0.000562341, 0.001]),
        ("16:256:log5", positive_int, [16, 32, 64, 128, 256]),
        ("0:4:5", int, [0, 1, 2, 3, 4]),
        ("1:3:9", positive_int, [1, 2, 3]),  # all whole numbers in the range
        ("1:5", nonnegative_float, [Interval(1.0, 5.0)]),
        ("1e-4:1e-2:log", positive_float, [Interval(1e-4, 1e-2, log=True)]),
        ("1:5", positive_int, [Interval(1, 5, whole=True)]),
    ],
)
def test_values_of_a_word(text, kind, expected):
    found = ranges.values(text, kind)
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1:5:1", "ends in '1'; expected a number from 2 to 10000"),
        ("1:5:99999", "from 2 to 10000"),
        ("1:5:log1", "ends in 'log1'"),
        ("1:5:", "ends in ''"),
        ("1:5:x", "ends in 'x'"),
        ("5:1:3", "goes from 5 to 1; expected a second number above the first"),
        ("0:1:log3", "is logarithmic and begins at 0"),
        ("1:2:3:4", "is not a range; expected lo:hi:n"),
    ],
)
def test_malformed_ranges_raise_a_sentence(text, reason):
    with pytest.raises(InputError, match=reason):
        ranges.values(text, nonnegative_float)


def test_product_changes_the_last_axis_fastest():
    assert list(ranges.product({"a": [1, 2], "b": [3, 4]})) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4},
    ]  # fmt: skip
    assert list(ranges.product({})) == [{}]


def test_words_keep_all_digits():
    for value in (0.1, 1e-5, 1 / 3, 2.5):
        flag, text = ranges.words_of("--x", value)
        assert float(text) == value
    assert ranges.words_of("--rerun", True) == ("--rerun",)
    assert ranges.words_of("--mean", [0.5, 0.4, 0.3]) == ("--mean", "0.5", "0.4", "0.3")


def test_take_several_leaves_single_flags(capsys):
    parser = Parser("", prog="p")
    parser.add_argument("--rate", type=positive_float, default=1.0)
    parser.add_argument("--model")
    parser.add_argument("--folder")
    parser.add_argument("--yes", action="store_true")
    options.take_several(parser, ("folder",))
    assert vars(parser.parse_args([])) == {}
    words = ["--rate", "1:2:3", "7", "--model", "torchvision:a", "b", "--folder", "x:y"]
    given = vars(parser.parse_args(words))
    assert given == {"rate": [[1.0, 1.5, 2.0], [7.0]], "model": ["torchvision:a", "b"], "folder": "x:y"}
    for words, reason in ((["--rate", "2:1:3"], "goes from 2 to 1"), (["--rate", "0:1:3"], "'0' is not allowed")):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        assert stop.value.code == 2
        assert reason in capsys.readouterr().err


def test_settings_of_a_sweep_take_ranges():
    given = options.settings_as_flags({"setting": [("pgd_eps", "1:3:3"), ("epochs", "1:2:2"), ("epochs", "5")]})
    assert given == {"pgd_eps": [[1.0, 2.0, 3.0]], "setting": [("epochs", "1:2:2"), ("epochs", "5")]}
    assert options.several_settings(given["setting"]) == {"epochs": [1, 2, 5]}
    with pytest.raises(InputError, match="--pgd-eps and --setting pgd_eps=1 are both given"):
        options.settings_as_flags({"pgd_eps": [2.0], "setting": [("pgd_eps", "1")]})
    with pytest.raises(InputError, match="no method has a setting epoch; expected one of .*; did you mean epochs"):
        options.several_settings([("epoch", "1")])
