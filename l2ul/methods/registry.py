"""The methods by name: the built-in ones in the table `BUILT_IN`, and those that users register with `method`.

Importing this module does not import torch: the functions that implement a method are imported when it is first used.
"""

import ast
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
import hashlib
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from l2ul.common.choices import GOALS, did_you_mean
from l2ul.common.errors import InputError
from l2ul.common.files import own_code_sha256, source_code
from l2ul.methods.settings import ATTACK, SHARED, Setting, Value, declare_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from l2ul.methods.fixed_length_procedure import MethodContext
    from l2ul.objective import Batch

Terms = dict[str, "Tensor"]  # of the loss, as `objective.Terms`
NEEDS = {  # what a method may ask the loop for
    "adv": "batches of D_adv, the adversarial examples of D_f",
    "importance": "the importance penalty ½ Σ Ω̄ (θ - θ⁰)²",
    "retain": "batches of D_r",
    "noise": "random noise on the weights, in place of SGD",
    "teacher": "θ⁰ as a teacher on stand-ins for D_r, with the schedule of distill in place of SGD",
}


@dataclass(frozen=True)
class Step:
    """What a method receives at a step of the loop. What it does not need is None.

    forget         batch of D_f with the true labels, or to relabel with the new labels
    adv            batch of D_adv with its target labels
    retain         batch of D_r
    penalty        returns the importance penalty ½ Σ Ω̄ (θ - θ⁰)², a scalar
    reg_lamb       weight λ of the penalty
    perturb        sets the weights to θ⁰ + noise, with more noise at each call
    teacher_gaps   returns the weighted differences from θ⁰ on stand-ins for D_r: of logits and of features
    margin         margin of the forget loss, in logits
    forget_weight  weight of the forget loss
    settings       values of the settings that the method declares itself
    """

    model: "nn.Module"
    goal: str
    forget: "Batch"
    adv: "Batch | None" = None
    retain: "Batch | None" = None
    penalty: "Callable[[], Tensor] | None" = None
    reg_lamb: float = 0.0
    perturb: Callable[[], None] | None = None
    teacher_gaps: "Callable[[], tuple[Tensor, Tensor]] | None" = None
    margin: "float | Tensor" = 0.0
    forget_weight: "float | Tensor" = 1.0
    settings: Mapping[str, Value] = field(default_factory=dict)


Implementation = Callable[[Step], Terms] | Callable[["MethodContext"], Iterator[Terms]]


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    implementation  a function, or where to import it from as "module:function". It takes a `Step` and returns the terms
                    of the loss. With `is_fixed_length` it is a generator that takes a `MethodContext` and
                    yields the terms of one step after the other. None: the model stays as it is.
    needs           names of NEEDS
    goals           names of `choices.GOALS`
    settings        settings of this method alone, beside the shared ones that it uses
    is_fixed_length whether the method runs a fixed number of steps, in place of stopping once D_f is forgotten
    version         of a built-in method; raise it if the same settings give another result. Above 1 it is part of the
                    id of its records, as `method_revision`. `l2ul.METHOD_VERSION` is for changes of all methods
    """

    name: str
    implementation: Implementation | str | None
    needs: frozenset[str] = frozenset()
    goals: tuple[str, ...] = GOALS
    settings: tuple[Setting, ...] = ()
    is_fixed_length: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if not NEEDS.keys() >= self.needs:
            raise ValueError(
                f"method {self.name!r} needs {set(self.needs) - NEEDS.keys()}; "
                f"expected some of {', '.join(sorted(NEEDS))}"
            )
        if {"adv", "retain"} <= self.needs:
            raise ValueError(f"method {self.name!r} needs adv and retain; a step has a batch of one of them")
        for setting in self.settings:
            if setting.name in SHARED:
                raise ValueError(f"method {self.name!r} declares {setting.name}, a setting of the loop; rename it")

    @property
    def terms(self) -> Implementation | None:
        """Return the implementation, imported if necessary."""
        return resolve_name(self.implementation) if isinstance(self.implementation, str) else self.implementation

    @property
    def summary(self) -> str:
        """Return one line for `--help` and documentation: the first line of the implementation's docstring."""
        if self.implementation is None:
            return "Keep the original model θ⁰"
        if isinstance(self.implementation, str):
            module, _, function = self.implementation.partition(":")
            doc = _docstrings(module)[function]
        else:
            doc = self.implementation.__doc__
        return doc.strip().split("\n")[0].rstrip(".")

    @property
    def trains(self) -> bool:
        """Whether the method changes the model."""
        return self.implementation is not None

    @property
    def traits(self) -> frozenset[str]:
        """Return what decides which shared settings the method uses, see `Setting.used_by`.

        training      every method that changes the model
        fixed_length  methods of fixed length
        sgd           other methods whose terms SGD minimises
        adv, …        names of NEEDS, of methods that are not of fixed length
        """
        if not self.trains:
            return frozenset()
        if self.is_fixed_length:
            return frozenset({"training", "fixed_length"})
        return self.needs | {"training"} | (frozenset() if self.needs & {"noise", "teacher"} else {"sgd"})

    @property
    def all_settings(self) -> dict[str, Setting]:
        """Return the shared settings that decide the method's result, and its own, by name."""
        shared = {name: setting for name, setting in SHARED.items() if setting.used_by & self.traits}
        return shared | {setting.name: setting for setting in self.settings}

    def code_sha256(self) -> str | None:
        """Return the hash of a user's implementation, None for a built-in one: an edit makes it another run."""
        if self.implementation is None or isinstance(self.implementation, str):
            return None
        return hashlib.sha256(source_code(self.implementation).encode()).hexdigest()

    @property
    def revision(self) -> int | None:
        """Return the version if it is above 1, else None, so that the ids of records of version 1 stay."""
        return self.version if self.version > 1 else None


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Return the docstrings of the functions in a module, which is read but not imported: it would import torch."""
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    return {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def _built_in(name: str, module: str, *needs: str, goals: tuple[str, ...] = GOALS, **options: object) -> Method:
    return Method(name, f"l2ul.methods.{module}:{name}", frozenset(needs), goals, **options)


def _baseline(name: str, *needs: str, version: int = 1, **settings: Value) -> Method:
    options = {"settings": declare_settings(**settings), "is_fixed_length": True, "version": version}
    return _built_in(name, "baselines", *needs, goals=("misclassify",), **options)


TUNING = {"epochs": 10, "lr": 1e-2, "batch": 128, "augment": 1}  # usual settings of fine-tuning on D_r
BUILT_IN = (
    Method("before", None),
    # the paper's methods, and distill
    _built_in("neggrad", "paper", goals=("misclassify",)),
    _built_in("correct", "paper", goals=("relabel",)),
    _built_in("rawp", "paper", "noise", goals=("misclassify",)),
    _built_in("oracle", "paper", "retain"),
    _built_in("adv", "paper", "adv"),
    _built_in("adv_imp", "paper", "adv", "importance"),
    _built_in("distill", "distill", "teacher", version=2),  # 1: blends of two images of D_f alone stood for D_r
    # methods of others, of fixed length, with the settings of their papers
    _baseline("finetune", "retain", **TUNING),
    _baseline("random_labels", "retain", **TUNING),
    _baseline("neggrad_plus", "retain", **TUNING | {"epochs": 5}, retain=0.95),
    _baseline("l1_sparse", "retain", **TUNING, l1=5e-4),
    _baseline("salun", "retain", version=2, **TUNING, salient=0.5),  # 1: weight decay moved weights outside the mask
    _baseline("scrub", "retain", **TUNING | {"epochs": 3, "lr": 5e-4}, forget_epochs=2, kl=0.001, temperature=4.0),
    _baseline("ssd", "retain", batch=64, select=10.0, dampen=1.0),
    # version 1: the attention and the class token of a vision transformer kept the weights of θ⁰ in the random model
    _baseline("bad_teaching", "retain", version=2, epochs=1, lr=1e-4, adam=1, batch=128, augment=1, part=0.3),
    _baseline("boundary_shrink", epochs=10, lr=1e-5, batch=64, augment=1, bound=0.1),
    _baseline("jit", version=2, epochs=1, lr=3e-4, batch=64, sigma=0.5, copies=25),  # 1: mean over images, not sum
    _baseline("amun", "retain", **TUNING, eps=0.05, iterations=50),
)
METHODS: dict[str, Method] = {one.name: one for one in BUILT_IN}


def method(
    name: str, *needs: str, goals: tuple[str, ...] = GOALS, settings: Sequence[Setting] = ()
) -> Callable[[Callable[[Step], Terms]], Callable[[Step], Terms]]:
    """Register the decorated function as a method. The first line of its docstring is the summary.

    needs     names of NEEDS: what the function expects in its `Step`
    settings  settings of the method's own. Each becomes a flag of the scripts, with its help text, and part of the
              record and its id; the function finds the values in `step.settings`.

    Raises ValueError for a need that does not exist and for a setting that another method declares differently.
    """

    for setting in settings:
        if own_flags().get(setting.name, setting) != setting:
            raise ValueError(f"method {name!r} and another declare different settings {setting.name}; rename one")
    return _registered(Method(name, None, frozenset(needs), goals, tuple(settings)))


def fixed_length_method(
    name: str, *needs: str, settings: Sequence[Setting] = (), **defaults: Value
) -> Callable[[Callable], Callable]:
    """Register the decorated generator as a method of fixed length for the goal misclassify.

    The module `fixed_length_procedure` describes such methods. Declare settings in `settings`, or as NAME=DEFAULT:
    `batch`, the images of D_r or D_f per step; for training `epochs`, `lr`, `augment` (see `MethodContext.batches`) and
    `adam`; and any others. They are set with --setting.
    """

    own = (*settings, *declare_settings(**defaults))
    return _registered(Method(name, None, frozenset(needs), ("misclassify",), own, is_fixed_length=True))


def _registered(declared: Method) -> Callable[[Callable], Callable]:
    """Return a decorator that registers a method with the function below it as its implementation."""

    def register(function: Callable) -> Callable:
        if not function.__doc__:
            raise ValueError(f"{function.__name__} has no docstring; its first line is the summary of the method")
        own_code_sha256([function])  # reads the user's files now, as they may be edited while this process runs
        METHODS[declared.name] = replace(declared, implementation=function)
        return function

    return register


def get(name: str, goal: str | None = None) -> Method:
    """Return a method by name. Raises InputError if there is none, or if it does not support the goal."""
    if not isinstance(name, str) or name not in METHODS:
        hint = did_you_mean(str(name), METHODS)
        raise InputError(f"unknown method {name!r}", f"expected one of {', '.join(METHODS)}{hint}")
    if goal and goal not in METHODS[name].goals:
        raise InputError(
            f"method {name} does not support the goal {goal}", f"expected one of {', '.join(of_goal(goal))}"
        )
    return METHODS[name]


def of_goal(goal: str) -> list[str]:
    """Return the names of the methods that support a goal."""
    return [name for name, known in METHODS.items() if goal in known.goals]


def usual(goal: str) -> list[str]:
    """Return the names of the methods that run by default: all for the goal that are not of fixed length."""
    return [name for name in of_goal(goal) if not METHODS[name].is_fixed_length]


def own_flags() -> dict[str, Setting]:
    """Return the settings that methods declare themselves and that have a flag: all but those of fixed length."""
    declared = (one.settings for one in METHODS.values() if not one.is_fixed_length)
    return {setting.name: setting for settings in declared for setting in settings}


def find_settings(name: str, methods: Sequence[str] | None = None) -> list[Setting]:
    """Return the settings of a name that these methods have, or that any method has: one for each method.

    Raises InputError if there is none.
    """
    chosen = METHODS.values() if methods is None else [get(method) for method in methods]
    settings = [one.all_settings[name] for one in chosen if name in one.all_settings]
    if not settings:
        known = list(dict.fromkeys(known for one in chosen for known in one.all_settings))
        who = f"none of the methods {' '.join(methods)} has a" if methods else "no method has a"
        who = f"method {methods[0]} has no" if methods and len(methods) == 1 else who
        expected = f"expected one of {', '.join(known)}" if known else "leave it out"
        raise InputError(f"{who} setting {name}", f"{expected}{did_you_mean(name, known)}")
    return settings


def loop_settings(method: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return those of the values, by name, that are settings of a method but not of the attack."""
    return {name: values[name] for name in get(method).all_settings if name in values and name not in ATTACK}


def absent_settings(method: str, named: Container[str]) -> list[tuple[str, str]]:
    """Return the settings of a method that a list of all its settings lacks, because it is older than they are.

    They are pairs of name and text, with the value that applied before the setting existed. Settings whose default is
    that value are left out.
    """
    settings = get(method).all_settings
    return [(name, str(one.absent)) for name, one in settings.items() if one.absent is not None and name not in named]


def parse_settings(pairs: Iterable[tuple[str, str]], methods: Sequence[str]) -> dict[str, Value]:
    """Read settings of methods, given as pairs of name and text, as of `--setting NAME=VALUE`.

    Raises InputError if none of the methods has a setting, a value is not allowed, or a setting has two values.
    """
    values: dict[str, Value] = {}
    for name, text in pairs:
        for setting in find_settings(name, methods):
            value = setting.parse(text)
            if values.setdefault(name, value) != value:
                raise InputError(f"setting {name} has two values, {values[name]} and {value}", "give one")
    return values
