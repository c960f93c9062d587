"""The methods: what each computes its loss from at a step. A new one is a function here; nothing else changes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
import hashlib

from torch import Tensor, nn

from l2ul.common.choices import GOALS
from l2ul.common.errors import InputError
from l2ul.common.files import source_code
from l2ul.methods.fixed_length import MethodContext, Value
from l2ul.objective import Batch, Terms


@dataclass(frozen=True)
class Step:
    """What a method may use at one step of the loop; what it did not say it needs is None."""

    model: nn.Module
    goal: str
    forget: Batch
    adv: Batch | None = None
    retain: Batch | None = None
    penalty: Callable[[], Tensor] | None = None  # ½ Σ Ω̄ (θ - θ⁰)²
    reg_lamb: float = 0.0
    perturb: Callable[[], None] | None = None  # sets the weights to θ⁰ + noise, a little more of it at each call
    teacher_gaps: Callable[[], tuple[Tensor, Tensor]] | None = None  # of logits and features on mixes, weighted
    margin: float = 0.0
    forget_weight: float = 1.0


@dataclass(frozen=True)
class Method:
    """A named method: its terms, what they need of NEEDS, and for which goals.

    One that needs `noise` moves the weights itself: it has no loss and takes no step of SGD. One that needs `teacher`
    compares with θ⁰ on mixes of D_f, in eval mode, and goes on to the end of a cycle. One with
    `settings` is of fixed length: its terms are a generator that gets a `MethodContext` and yields those of each step.
    """

    name: str
    terms: Callable[[Step], Terms] | Callable[[MethodContext], Iterator[Terms]] | None
    needs: frozenset[str]
    summary: str
    goals: tuple[str, ...] = GOALS
    settings: Mapping[str, Value] | None = None

    def code_sha256(self) -> str | None:
        """Of the source of a method of somebody's own, which is no version of ours: an edit makes another run of it."""
        if self.terms is None or self.terms.__module__.startswith("l2ul."):
            return None
        return hashlib.sha256(source_code(self.terms).encode()).hexdigest()


NEEDS = frozenset({"adv", "importance", "retain", "noise", "teacher"})
METHODS: dict[str, Method] = {}


def method(
    name: str, *needs: str, goals: tuple[str, ...] = GOALS, settings: Mapping[str, Value] | None = None
) -> Callable[[Callable[[Step], Terms]], Callable[[Step], Terms]]:
    """Register the function below as the method `name`; its docstring's first line is its summary."""
    if not NEEDS.issuperset(needs):
        raise ValueError(f"method {name!r} needs {set(needs) - NEEDS}; expected some of {', '.join(sorted(NEEDS))}")
    if {"adv", "retain"}.issubset(needs):
        raise ValueError(f"method {name!r} needs adv and retain; a step has a batch of one of them")

    def register(terms: Callable[[Step], Terms]) -> Callable[[Step], Terms]:
        METHODS[name] = Method(name, terms, frozenset(needs), terms.__doc__.split("\n")[0], goals, settings)
        return terms

    return register


def fixed_length(name: str, *needs: str, **settings: Value) -> Callable[[Callable], Callable]:
    """Register the generator below as the method `name` of fixed length, to misclassify; see `baselines`.

    settings  its own: `batch` images of D_r or D_f a step, and for training `epochs`, `lr` and, for Adam, `adam` 1;
              `augment`: see `fixed_length.MethodContext.batches`
    """
    return method(name, *needs, goals=("misclassify",), settings=settings)


def get(name: str, goal: str | None = None) -> Method:
    """The method called `name`; InputError if there is none, or it is not for the goal."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    if goal and goal not in METHODS[name].goals:
        raise InputError(f"method {name} is not for the goal {goal}; expected one of {', '.join(of_goal(goal))}")
    return METHODS[name]


def of_goal(goal: str) -> list[str]:
    """The names of the methods that are for a goal."""
    return [name for name, known in METHODS.items() if goal in known.goals]


def usual(goal: str) -> list[str]:
    """Those that are run where none is named: the paper's and ours, not those of others that it is compared with."""
    return [name for name in of_goal(goal) if not METHODS[name].settings]
