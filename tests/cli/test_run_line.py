"""The line that main_unlearn.py prints for each finished run."""

import pytest

from l2ul.cli.unlearn_command import run_line

RECORD = {
    "method": "distill",
    "k": 16,
    "seed": 1,
    "continual_step": None,
    "steps": 300,
    "acc_forget": 0.0,
    "acc_test": 88.9,
    "seconds_unlearn": 2.5,
}


@pytest.mark.parametrize(
    ("facts", "ending"),
    [
        ({"status": "forgotten"}, "forgotten after 300 steps"),
        ({"status": "cap", "robust": 0}, "not forgotten after 300 steps"),
        ({"status": "forgotten", "robust": 1}, "forgotten after 300 steps, at least 95 % also in changed copies"),
        ({"status": "cap", "robust": 1}, "not forgotten as used after 300 steps"),
        ({"status": "diverged", "robust": 1}, "diverged after 300 steps"),
        ({"status": "done", "steps": 0}, "not changed"),
        ({"status": "done", "steps": 1}, "done after 1 step"),
    ],
)
def test_it_says_how_the_run_ended(facts, ending):
    _, line = run_line(RECORD | facts).split("  ", 1)  # after the time of day
    assert line == f"distill  k 16   seed 1  {ending}  D_f 0.00  D_test 88.90  2.5 s"
