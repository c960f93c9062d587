"""The declarations of settings and of the built-in methods, and what is derived from them."""

from dataclasses import fields
import json

from conftest import ROOT
import pytest

from l2ul.common.errors import InputError
from l2ul.experiments import defaults, runs
from l2ul.methods import registry
from l2ul.methods.settings import (
    SHARED,
    AttackSettings,
    Setting,
    Settings,
    declare_settings,
    from_text,
    has_effect,
    override,
    to_text,
)

RECORDS = sorted((ROOT / "result_data" / "reference").glob("**/runs/*.json"))


@pytest.mark.reference
def test_ids_of_committed_records_follow_from_their_settings():
    assert len(RECORDS) > 100
    subject = (
        *("dataset", "model", "checkpoint_sha256", "method", "needs_retain", "goal", "k", "seed", "continual_step"),
        *("mean", "std", "num_train", "num_test", "forget_sha256", "method_version", "image_size"),
    )
    names = {*subject, *SHARED, *runs.LATER}
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert runs.identity({name: value for name, value in record.items() if name in names}) == path.stem, path


def test_an_id_depends_on_later_settings_only_if_they_matter():
    base = {"method": "adv", "pgd_eps": None, "adv_dtype": "float32", "distill_lr": None, "course": None}
    base["robust_classes"] = 1.0  # the value of records without it, which is not its default
    same = {"method": "adv", "pgd_eps": None}
    assert runs.identity(base) == runs.identity(same)
    changes = ({"adv_dtype": "uint8"}, {"distill_lr": 3e-4}, {"course": "lr=1"}, {"pgd_eps": 1.0}, {"new": None})
    for change in (*changes, {"robust_classes": 0.0}):
        assert runs.identity(base | change) != runs.identity(same), change


def test_the_version_of_a_method_is_in_the_id_only_above_1():
    base = {"method": "salun", "method_version": 1}
    assert runs.identity(base | {"method_revision": None}) == runs.identity(base)
    assert runs.identity(base | {"method_revision": 2}) != runs.identity(base)
    revisions = {method.name: method.revision for method in registry.BUILT_IN if method.revision}
    assert revisions == {"bad_teaching": 2, "distill": 2, "jit": 2, "salun": 2}


@pytest.mark.parametrize("method", registry.BUILT_IN, ids=lambda method: method.name)
def test_built_in_methods_have_an_implementation_with_their_summary(method):
    if not method.trains:
        assert method.terms is None
        return
    assert method.terms.__name__ == method.name
    assert method.terms.__doc__.split("\n")[0] == f"{method.summary}."


def test_recorded_settings_are_those_that_the_method_uses():
    for path in RECORDS:
        record = json.loads(path.read_text())
        used = registry.get(record["method"]).all_settings
        for name in SHARED:
            if name in record:
                is_used = name in used and has_effect(name, record)
                assert (record[name] is not None) == is_used, (path, name)
        if record.get("course"):
            own = registry.get(record["method"]).settings
            assert to_text(override(own, from_text(record["course"]))) == record["course"]


def test_the_settings_of_methods():
    precision = {"precision", "loop_precision"}
    sgd = {"unlearn_lr", "momentum", "weight_decay", "batch_size", "bn", "max_passes", *precision}
    attack = {"num_adv_images", "pgd_eps", "pgd_alpha", "pgd_iter", "adv_dtype", "adv_batch_size"}
    expected = {
        "before": set(),
        "neggrad": sgd,
        "rawp": {"max_passes", "noise_growth"} | precision,
        "oracle": sgd | {"adv_batch_size"},
        "adv_imp": sgd | attack | {"reg_lamb"},
        "distill": {name for name in SHARED if name.startswith(("distill_", "robust"))} | precision,
        "jit": {"bn", *precision, "epochs", "lr", "batch", "sigma", "copies"},
    }
    for name, settings in expected.items():
        assert set(registry.get(name).all_settings) == settings, name


def test_every_declared_field_has_a_flag_a_default_and_a_help_text():
    declared = {**Settings.declared(), **AttackSettings.declared()}
    assert list(declared.values()) == list(SHARED.values())
    for name, setting in declared.items():
        assert setting.help, name
        assert setting.used_by, name
        owner = Settings if name in Settings.declared() else AttackSettings
        assert getattr(owner(), name) == setting.default == defaults.COMMON_DEFAULTS[setting.name]
    undeclared = {one.name for one in fields(Settings)} - set(declared)
    assert undeclared == {"method_settings", "seed", "first_position"}


def test_defaults_of_a_data_set_are_those_that_differ_and_are_allowed():
    for dataset, row in defaults.DEFAULTS.items():
        for name, value in row.items():
            assert value != defaults.COMMON_DEFAULTS[name], (dataset, name)
            if name in SHARED:
                assert SHARED[name].check(value) == value
    assert defaults.default("digits", "pgd_iter") == 20
    assert defaults.default("mine", "pgd_iter") == 100


def test_settings_are_created_from_recorded_names():
    values = {name: setting.default for name, setting in SHARED.items()} | {"pgd_eps": 2.5, "distill_lr": 1e-3}
    assert AttackSettings.of(values) == AttackSettings(eps=2.5)
    assert Settings.of(values, seed=3) == Settings(distill_lr=1e-3, seed=3)


def test_values_of_declared_settings():
    settings = declare_settings(epochs=3, lr=0.5, odd=2, share=0.25)
    assert override(settings, {"lr": 1, "unknown": 7}) == {"epochs": 3, "lr": 1.0, "odd": 2, "share": 0.25}
    assert [setting.minimum for setting in settings] == [1, 0, 1, 0]
    assert to_text({"lr": 0.1, "epochs": 3}) == "epochs=3 lr=0.1"
    assert from_text("epochs=3 mode=fast") == {"epochs": 3.0, "mode": "fast"}
    with pytest.raises(InputError, match="setting epochs=0 is not allowed; expected a whole number of at least 1"):
        override(settings, {"epochs": 0})


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"name": "two words", "default": 1}, "expected a name of letters, digits and underscores"),
        ({"name": "mode", "default": "fast"}, "give its choices"),
        (
            {"name": "mode", "default": "slow", "choices": ("fast", "exact")},
            "mode=slow is not allowed; expected one of",
        ),
        ({"name": "rate", "default": -1.0}, "rate=-1.0 is not allowed; expected a number of at least 0"),
        ({"name": "rate", "default": 1.0, "in_id": "never"}, "expected one of always, if used, if changed"),
    ],
)
def test_wrong_declarations_raise(declaration, message):
    with pytest.raises(ValueError, match=message):
        Setting(**declaration)


def test_the_table_for_the_documentation():
    table = defaults.settings_table()
    lines = table.splitlines()
    assert len(lines) == 2 + len(SHARED)
    assert lines[0].count("|") == lines[1].count("|")
    (row,) = [line for line in lines if line.startswith("| `pgd_eps` ")]
    assert "| 4.0; utkface: 2.0 |" in row
    assert "adv, adv_imp" in row
    (row,) = [line for line in lines if line.startswith("| `bn` ")]
    assert "one of train, eval" in row


def test_the_documentation_has_this_table():
    assert defaults.settings_table() in (ROOT / "docs" / "methods.md").read_text()


def test_settings_of_copies_have_no_effect_without_robust():
    names = {name for name in SHARED if not has_effect(name, {"robust": 0})}
    assert names == {name for name in SHARED if name.startswith("robust_")}
    assert {name for name in SHARED if not has_effect(name, {"robust": 1})} == {"distill_further_steps"}


def test_further_steps_have_an_effect_on_large_forget_sets_alone():
    def affects(**values):
        return has_effect("distill_further_steps", {"robust": 0, "distill_steps": 0} | values)

    assert [affects(k=k) for k in (1, 64, 65, 256)] == [False, False, True, True]
    assert not affects(k=256, continual_size=16)
    assert not affects(k=256, distill_steps=300)
    assert affects()
