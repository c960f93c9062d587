"""Advice in messages: what a command does not take is left out."""

import pytest

from l2ul.common.advice import fitting

FOREIGN = {"--skip-bad", "--image-size", "--checkpoint"}
INSTEAD = "give the folder as --images"


@pytest.mark.parametrize(
    ("sentence", "without", "with_other"),
    [
        (
            "0.png cannot be read (damaged: 3; 1.png: 5 pixels); repair it, or leave it out with --skip-bad",
            "0.png cannot be read (damaged: 3; 1.png: 5 pixels); repair it",
            f"0.png cannot be read (damaged: 3; 1.png: 5 pixels); {INSTEAD}",
        ),
        (
            "the images of --image-size 3 differ; give one --image-size",
            "the images of --image-size 3 differ",
            f"the images of --image-size 3 differ; {INSTEAD}",
        ),
        ("1 of 2 (a: small: use --image-size 3); repair it", "1 of 2 (a: small); repair it", None),
        ("no weights; give --checkpointing, or --model", "no weights; give --checkpointing, or --model", None),
    ],
)
def test_only_advice_that_names_other_flags_is_left_out(sentence, without, with_other):
    assert fitting(sentence, FOREIGN) == without
    if with_other:
        assert fitting(sentence, FOREIGN, INSTEAD) == with_other
