"""Input errors: the message, the advice that a command leaves out, and what survives copies and other processes."""

import ast
import copy
import pickle

from conftest import ROOT
import pytest

from l2ul.common.choices import InvalidValue
from l2ul.common.errors import InputError, Reason, in_python, option, worded
from l2ul.common.image_sizes import TooLarge
from l2ul.data.image_files import TooManyPixels, UnreadableImage

FOREIGN = {"--skip-bad", "--image-size", "--checkpoint"}
INSTEAD = "give the folder as --images"
KINDS = (InputError, InvalidValue, Reason, TooLarge, UnreadableImage, TooManyPixels)


def test_the_message_is_the_problem_and_its_remedies():
    assert str(InputError("no weights")) == "no weights"
    assert str(InputError("no weights", "give --model")) == "no weights; give --model"
    assert str(InputError("no weights", "give --model", "train one")) == "no weights; give --model, or train one"
    assert (
        str(Reason("too large", "crop the long side", "leave it out"))
        == "too large: crop the long side, or leave it out"
    )


@pytest.mark.parametrize(
    ("parts", "without", "with_other"),
    [
        (
            ("0.png cannot be read (damaged: 3; 1.png: 5 pixels)", "repair it", "leave it out with --skip-bad"),
            ("0.png cannot be read (damaged: 3; 1.png: 5 pixels)", "repair it"),
            ("0.png cannot be read (damaged: 3; 1.png: 5 pixels)", INSTEAD),
        ),
        (
            ("the images of --image-size 3 differ", "give one --image-size"),
            ("the images of --image-size 3 differ",),
            ("the images of --image-size 3 differ", INSTEAD),
        ),
        (
            ("the images of --image-size 3 differ", "repair them"),
            ("the images of --image-size 3 differ", "repair them"),
            ("the images of --image-size 3 differ", INSTEAD),
        ),
        (
            ("no weights", "give --checkpointing", "add --re-checkpoint"),
            ("no weights", "give --checkpointing", "add --re-checkpoint"),
            ("no weights", "give --checkpointing", "add --re-checkpoint"),
        ),
    ],
)
def test_only_advice_that_names_other_flags_is_left_out(parts, without, with_other):
    for kind in KINDS:
        error = kind(*parts)
        for other, expected in ((error.without(FOREIGN), without), (error.without(FOREIGN, INSTEAD), with_other)):
            assert (type(other), other.problem, other.advice) == (kind, expected[0], expected[1:])
        assert (error.problem, error.advice) == (parts[0], parts[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advice", [(), ("repair it",), ("repair it", "leave it out")])
def test_copies_and_pickles_keep_problem_and_advice(kind, advice):
    error = kind("0.png is damaged", *advice)
    copies = [copy.copy(error), copy.deepcopy(error), type(error)(*error.args)]
    copies += [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert (type(other), str(other), other.problem, other.advice) == (kind, str(error), error.problem, advice)


def test_a_wording_has_flags_for_scripts_and_arguments_for_functions():
    for wording, flags, arguments in (
        (option("min_known", 0), "--min-known 0", "min_known=0"),
        (option("surrogate"), "--surrogate", "surrogate"),
        (option("std", (0.5, 2)), "--std 0.5 2", "std=(0.5, 2)"),
        (option("mean", (0.5,)), "--mean 0.5", "mean=(0.5,)"),
        (worded("add {} to {}", option("seed", 1), "{a} --b"), "add --seed 1 to {a} --b", "add seed=1 to {a} --b"),
    ):
        for one in (wording, worded("{}", wording), pickle.loads(pickle.dumps(wording)), copy.deepcopy(wording)):
            assert (one, in_python(one)) == (flags, arguments)
        error = pickle.loads(pickle.dumps(InputError("wrong", wording)))
        assert (str(error), in_python(error.without({"--else"}).advice[0])) == (f"wrong; {flags}", arguments)
    assert in_python("leave out --b") == "leave out --b"


def test_the_code_separates_problem_and_advice():
    """A semicolon in the only argument of an InputError would hide advice from `without`."""
    kinds = {kind.__name__ for kind in KINDS}
    for path in (*ROOT.glob("l2ul/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("main_*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in kinds:
                texts = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
                is_sentence = len(call.args) == 1 and any("; " in text for text in texts if isinstance(text, str))
                assert not is_sentence, f"{path}:{call.lineno}"
