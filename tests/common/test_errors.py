"""Input errors: the message, the advice that a command leaves out, and what survives copies and other processes."""

import ast
import copy
import pickle

from conftest import ROOT
import pytest

from l2ul.common.choices import InvalidValue
from l2ul.common.errors import InputError, Reason
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


def test_the_code_separates_problem_and_advice():
    """A semicolon in the only argument of an InputError would hide advice from `without`."""
    kinds = {kind.__name__ for kind in KINDS}
    for path in (*ROOT.glob("l2ul/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("main_*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in kinds:
                texts = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
                is_sentence = len(call.args) == 1 and any("; " in text for text in texts if isinstance(text, str))
                assert not is_sentence, f"{path}:{call.lineno}"
