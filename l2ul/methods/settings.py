"""The hyper-parameters of all methods, each declared once.

A `Setting` holds everything that the project knows about a hyper-parameter: default, range, unit, help text and which
methods use it. The flags of the scripts and their `--help`, the keys and the id of a record, the checks of `--setting`
and the table in docs/methods.md are derived from it. `Settings` and `AttackSettings` hold the values of a run.

To add a setting to the loop or the attack, add a field to one of these two classes. To add a setting to one method,
declare it where the method is registered, see `methods.registry`. This module does not import torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
import math
from typing import Any, Self

from l2ul.common.choices import (
    BN_MODES,
    DTYPES,
    LOOP_PRECISIONS,
    PRECISIONS,
    STAND_INS,
    InvalidValue,
    Number,
    OneOf,
)
from l2ul.common.errors import InputError

Value = int | float | str
SMALL_SET = 64  # images of D_f for which distill_further_steps has no effect
ID_RULES = ("always", "if used", "if changed", "if not absent")


@dataclass(frozen=True)
class Setting:
    """A hyper-parameter.

    name      key of records; the flag has dashes in place of underscores
    default   its type (int, float or str) is the type of all values
    help      what it does, in a few words
    minimum   smallest number allowed; maximum: largest
    above     number that values have to exceed, in place of a minimum
    choices   the values allowed, of a setting whose values are texts
    several   whether a text may be several of the choices, joined by +
    unit      of a number, for help and documentation
    used_by   traits of methods (see `registry.Method.traits`): a method with one of them uses the setting
    in_id     when a run's id depends on it: "always", "if used" by the method, "if changed" from the default, or "if
              not absent", which is if it differs from `absent`. The last three are for settings that were added after
              the first records, whose ids must not change, and the last one for a default that was changed.
    absent    value in records without the setting, which were written before it existed; None: the default
    only_with name of a setting without which (at 0) this one has no effect
    without   names of settings with which (not at 0) this one has no effect
    more_than number of images of D_f up to which it has no effect
    """

    name: str
    default: Value
    help: str = ""
    minimum: float = 0
    above: float | None = None
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    several: bool = False
    unit: str = ""
    used_by: frozenset[str] = frozenset()
    in_id: str = "if used"
    absent: Value | None = None
    only_with: str | None = None
    without: tuple[str, ...] = ()
    more_than: int = 0

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"setting {self.name!r}: expected a name of letters, digits and underscores")
        if isinstance(self.default, str) and not self.choices:
            raise ValueError(f"setting {self.name} has the text {self.default!r} as default; give its choices")
        if self.in_id not in ID_RULES:
            raise ValueError(f"setting {self.name} has in_id {self.in_id!r}; expected one of {', '.join(ID_RULES)}")
        self.check(self.default)

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def type(self) -> Number | OneOf:
        """Return what reads a value from text and checks it."""
        if self.choices:
            return OneOf(self.choices, self.several)
        is_open = self.above is not None
        return Number(type(self.default), self.above if is_open else self.minimum, is_open, self.maximum)

    def parse(self, text: str) -> Value:
        """Read a value from text. Raises InputError if it is not allowed."""
        return self._named(self.type, text)

    def check(self, value: object) -> Value:
        """Return a value in the setting's type. Raises InputError if it is not allowed."""
        return self._named(self.type.check, value)

    def _named(self, read: Any, value: object) -> Value:
        try:
            return read(value)
        except InvalidValue:
            raise InputError(f"setting {self.name}={value} is not allowed", f"expected {self.type.expected}") from None


def _declare(default: Value, help: str, *used_by: str, **options: Any) -> Any:
    """Return a dataclass field that declares a Setting, named like the field unless `name` says otherwise."""
    return field(default=default, metadata={"setting": {"help": help, "used_by": frozenset(used_by), **options}})


def _of_robust(default: Value, help: str, in_id: str = "if changed", **options: Any) -> Any:
    """Declare a setting of `distill` with robust=1."""
    return _declare(default, help, "teacher", in_id=in_id, only_with="robust", **options)


class _Declared:
    """Base of dataclasses whose fields declare settings."""

    @classmethod
    def declared(cls) -> dict[str, Setting]:
        """Return the settings by the name of their field."""
        return {
            one.name: Setting(**{"name": one.name, "default": one.default, **one.metadata["setting"]})
            for one in fields(cls)
            if "setting" in one.metadata
        }

    @classmethod
    def of(cls, values: Mapping[str, object], **others: object) -> Self:
        """Create an instance from values by the names of the settings. `others` are fields that declare no setting."""
        return cls(**{name: values[setting.name] for name, setting in cls.declared().items()}, **others)


@dataclass(frozen=True)
class Settings(_Declared):
    """The settings of the unlearning loop. The defaults are those of the paper's released run scripts.

    method_settings  values for settings that a method declares itself, by name; the others keep their defaults
    seed             of the order of batches, of dropout and of noise
    first_position   index of the first image of D_f among all images of a continual run, so that each step of the run
                     draws other random numbers
    """

    unlearn_lr: float = _declare(1e-3, "learning rate of SGD", "sgd", above=0, in_id="always")
    momentum: float = _declare(0.9, "momentum of SGD", "sgd", in_id="always")
    weight_decay: float = _declare(1e-4, "weight decay of SGD", "sgd", in_id="always")
    batch_size: int = _declare(32, "images of D_f per step", "sgd", minimum=1, in_id="always")
    bn: str = _declare(
        "train",
        "train: batch-norm uses and updates batch statistics and dropout is active, as in the released scripts; "
        "eval: statistics are fixed and dropout is off",
        "sgd",
        "fixed_length",
        choices=BN_MODES,
        in_id="always",
    )
    max_passes: int = _declare(
        1000,
        "maximum number of passes through D_adv (oracle: through D_r; neggrad, correct: through D_f; rawp: draws of "
        "noise)",
        "sgd",
        "noise",
        minimum=1,
        in_id="always",
    )
    adv_batch_size: int = _declare(
        256, "images of D_adv per step (oracle: of D_r)", "adv", "retain", minimum=1, in_id="always"
    )
    reg_lamb: float = _declare(1.0, "weight λ of the importance penalty", "importance", in_id="always")
    noise_growth: float = _declare(
        0.01,
        "increase of the standard deviation of the noise per draw",
        "noise",
        above=0,
        unit="root mean square of the weight tensor",
    )
    distill_lr: float = _declare(3e-4, "highest learning rate of a cycle of Adam", "teacher", above=0)
    distill_steps: int = _declare(
        0,
        "steps per cycle; 0: 120 plus 0.75 for each image of D_f, plus distill_further_steps for each after the 64th, "
        "with robust=1 see robust_cycle",
        "teacher",
    )
    distill_cycles: int = _declare(
        3,
        "maximum number of cycles; the run ends after the first one at whose end D_f is forgotten",
        "teacher",
        minimum=1,
    )
    distill_forget: int = _declare(64, "images of D_f per step, of those not yet forgotten", "teacher", minimum=1)
    distill_mixes: int = _declare(192, "stand-ins for D_r per step", "teacher", minimum=1)
    distill_logits: float = _declare(10.0, "weight of the logit distillation on the stand-ins", "teacher")
    distill_features: float = _declare(1000.0, "weight of the feature distillation on the stand-ins", "teacher")
    distill_growth: float = _declare(
        10.0, "growth factor of the forget loss over a cycle while D_f is not forgotten", "teacher", above=0
    )
    distill_margin: float = _declare(
        0.3, "margin by which another logit has to exceed that of the label on D_f", "teacher", unit="logits"
    )
    robust: int = _declare(
        0,
        "1: also forget random changed copies of D_f (mirrored, cropped, compressed and so on); 0: D_f as stored only",
        "teacher",
        maximum=1,
        in_id="if changed",
    )
    robust_pool: int = _of_robust(
        512,
        "copies of D_f drawn per step; the loss uses the distill_forget copies with the largest margin loss",
        minimum=2,
    )
    robust_margin: float = _of_robust(1.0, "margin on the copies in the second half of a cycle", unit="logits")
    robust_tolerance: float = _of_robust(
        0.02, "the weight of the forget loss grows while more than this share of the copies is recognised", maximum=1
    )
    robust_adversarial: float = _of_robust(
        0.05,
        "length of an adversarial step toward the label, for half of the copies",
        unit="L2 norm over pixels in [0,1], for images of 32 x 32",
    )
    robust_targets: float = _of_robust(
        1.0, "weight of the KL divergence from the original probabilities without the label, on the copies"
    )
    robust_mixes: float = _of_robust(0.5, "share of the stand-ins that are changed like the copies", maximum=1)
    robust_keep: float = _of_robust(
        5.0, "factor by which distill_logits and distill_features are multiplied", in_id="if not absent", absent=10.0
    )
    robust_images: int = _of_robust(768, "synthesised images from which the stand-ins are made; 0: make them from D_f")
    robust_classes: float = _of_robust(
        0.0,
        "weight of the cross-entropy with random classes in the synthesis of these images",
        in_id="if not absent",
        absent=1.0,
    )
    robust_cycle: float = _of_robust(
        2.0,
        "steps per cycle if distill_steps is 0, in multiples of 300, or of 7 for each image of D_f if this is more",
        in_id="if not absent",
        above=0,
        absent=1.0,
    )
    robust_int4: float = _of_robust(
        1.0,
        "weight of the margin loss on images of D_f as stored with weights quantised to 4 bits",
        in_id="if not absent",
        absent=0.0,
    )
    distill_stand_ins: str = _declare(
        "mixes+triples+patches+spectra+recoloured+crops",
        "kinds of stand-ins for D_r, in equal parts. Made of D_f: mixes (blends of two images), triples (of three), "
        "copies (shifted and mirrored), recoloured (with other hues), patches (of one image in another), crops "
        "(enlarged, rotated, with other colours), spectra (phase of one image, amplitudes of two). Made of D_f and θ⁰: "
        "synthesised",
        "teacher",
        choices=STAND_INS,
        several=True,
        in_id="if changed",
        absent="mixes",  # before version 2
    )
    distill_pool: int = _declare(
        1024,
        "number of synthesised stand-ins, made before the loop",
        "teacher",
        minimum=1,
        in_id="if changed",
    )
    distill_pool_steps: int = _declare(
        150, "iterations of the synthesis of stand-ins", "teacher", minimum=1, in_id="if changed"
    )
    distill_surrogate: float = _declare(
        1.0,
        "share of the stand-ins that are images of --surrogate",
        "teacher",
        maximum=1,
        in_id="if changed",
    )
    distill_ascent: float = _declare(
        0.0,
        "length of a step that moves the stand-ins to where the model differs more from θ⁰",
        "teacher",
        unit="L2 norm over pixels in [0,1]",
        in_id="if changed",
    )
    distill_frozen: float = _declare(
        0.0,
        "share of the convolutions and linear layers, from the input, that do not change, which makes steps faster. "
        "Their number is rounded down, and the last two always change",
        "teacher",
        maximum=1,
        in_id="if changed",
    )
    distill_image_steps: float = _declare(
        0.0, "additional steps of a cycle for each image of D_f", "teacher", in_id="if changed"
    )
    distill_further_steps: float = _declare(
        1.5,
        "additional steps of a cycle for each image of D_f after the 64th, if robust and distill_steps are 0",
        "teacher",
        in_id="if not absent",
        absent=0.0,
        without=("robust", "distill_steps"),
        more_than=SMALL_SET,
    )
    loop_precision: str = _declare(
        "full",
        "precision of the passes in the unlearning loop. full: tf32 on a CUDA GPU unless --precision is fp32, else "
        "fp32; bf16 needs a CUDA GPU, or a CPU with AMX or AVX512-BF16, and leaves weights, losses and measurements as "
        "they are",
        "training",
        choices=LOOP_PRECISIONS,
        in_id="if changed",
    )
    method_settings: Mapping[str, Value] = field(default_factory=dict)
    seed: int = 0
    first_position: int = 0


@dataclass(frozen=True)
class AttackSettings(_Declared):
    """How adversarial examples are made and stored: targeted PGD in an L2 ball, on the original model.

    Together with the model, D_f and the seed they determine D_adv, so precision and dtype belong here too. The
    defaults are those of the paper's released run scripts.
    """

    num_adv_images: int = _declare(20, "adversarial examples per image of D_f", "adv", minimum=1, in_id="always")
    eps: float = _declare(
        4.0,
        "radius ε of the ball around an image",
        "adv",
        name="pgd_eps",
        unit="L2 norm over pixels in [0,1]",
        in_id="always",
    )
    alpha: float = _declare(
        0.1, "length of a PGD step", "adv", name="pgd_alpha", unit="L2 norm over pixels in [0,1]", in_id="always"
    )
    iterations: int = _declare(100, "PGD steps", "adv", name="pgd_iter", minimum=1, in_id="always")
    dtype: str = _declare(
        "float32",
        "data type in which the examples are stored; uint8 rounds them to 8-bit images",
        "adv",
        name="adv_dtype",
        choices=DTYPES,
        in_id="if changed",
    )
    precision: str = _declare(
        "fp32",
        "floating-point precision. tf32 needs a CUDA GPU and applies to all passes but those that decide which images "
        "are forgotten; bf16 needs a CUDA GPU, or a CPU with AMX or AVX512-BF16, and applies to the attack",
        "training",
        choices=PRECISIONS,
        in_id="if changed",
    )

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments of `attack.adversarial_set` that these settings determine."""
        return {
            "num_adv_images": self.num_adv_images,
            "eps": self.eps,
            "alpha": self.alpha,
            "steps": self.iterations,
            "precision": self.precision,
        }


ATTACK = {setting.name: setting for setting in AttackSettings.declared().values()}
SHARED = {setting.name: setting for setting in Settings.declared().values()} | ATTACK  # of the loop and the attack

_COMMON = {  # settings that several methods of fixed length declare, each with a default of its own
    setting.name: setting
    for setting in (
        Setting("epochs", 1, "passes through D_r (methods without D_r: through D_f)", minimum=1),
        Setting("lr", 0.01, "learning rate of SGD with momentum 0.9 and weight decay 5e-4"),
        Setting("batch", 128, "images per step", minimum=1),
        Setting("augment", 1, "0: none, 1: random crops, 2: random crops and horizontal flips"),
        Setting("adam", 1, "1: Adam in place of SGD", maximum=1),
        Setting("retain", 0.95, "weight of CE on D_r; that of CE on D_f is 1 minus it", maximum=1),
        Setting("l1", 5e-4, "initial weight γ of the L1 norm of the weights; it decreases to 0"),
        Setting("salient", 0.5, "share of the weights that is trained", maximum=1),
        Setting("forget_epochs", 2, "epochs that start with a pass through D_f"),
        Setting("kl", 0.001, "weight of the KL divergence from θ⁰ on D_r"),
        Setting("temperature", 4.0, "temperature of the softmax", above=0),
        Setting("select", 10.0, "a weight is dampened if its importance for D_f is above this multiple of that for D"),
        Setting("dampen", 1.0, "factor of the dampening"),
        Setting("part", 0.3, "share of D_r that is used", maximum=1),
        Setting("bound", 0.1, "length of the step to the nearest class", unit="pixels in [0,1], per pixel"),
        Setting("sigma", 0.5, "standard deviation of the noise", above=0, unit="pixels in [0,1]"),
        Setting("copies", 25, "noisy copies per image", minimum=1),
        Setting("eps", 0.05, "smallest radius of the attack", above=0, unit="L2 norm over pixels in [0,1]"),
        Setting("iterations", 50, "PGD steps", minimum=1),
    )
}


def declare_settings(**defaults: Value) -> tuple[Setting, ...]:
    """Return settings of a method of fixed length from their defaults, such as `epochs=3, lr=1e-2`.

    Names that other methods use as well (epochs, lr, batch, …) get the same range and help text. Whole numbers with
    another name have to be at least 1, other numbers at least 0.
    """
    known = {
        name: _COMMON.get(name) or Setting(name, value, minimum=1 if type(value) is int else 0)
        for name, value in defaults.items()
    }
    return tuple(replace(known[name], default=value) for name, value in defaults.items())


def override(settings: Iterable[Setting], values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the value of each setting: the one in `values`, else its default. Other names in `values` are ignored.

    Raises InputError if a value is not allowed.
    """
    return {one.name: one.check(values[one.name]) if one.name in values else one.default for one in settings}


def to_text(values: Mapping[str, Value]) -> str:
    """Format values as `--setting` takes them, sorted by name and with all digits: the text is part of run ids."""
    return " ".join(f"{name}={values[name]}" for name in sorted(values))


def from_text(text: str) -> dict[str, Value]:
    """Read what `to_text` wrote. Numbers are floats."""
    pairs = (word.partition("=")[::2] for word in text.split())
    return {name: _number(value) for name, value in pairs}


def _number(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


def has_effect(name: str, values: Mapping[str, object]) -> bool:
    """Return whether a setting has an effect beside these values. One of a single method always has.

    values  of the other settings, and the number of images `k`, or `continual_size` in a step of a continual run. A
            number that is not known counts as large.
    """
    if name not in SHARED:
        return True
    setting, images = SHARED[name], values.get("continual_size") or values.get("k")
    if setting.only_with and not values.get(setting.only_with):
        return False
    return not any(map(values.get, setting.without)) and (images is None or images > setting.more_than)


def is_part_of_id(name: str, value: object) -> bool:
    """Return whether a run's id depends on a shared setting that has this value; None: its method does not use it."""
    setting = SHARED[name]
    usual = {"if changed": setting.default, "if not absent": setting.absent}.get(setting.in_id)
    return setting.in_id == "always" or value not in (None, usual)
