"""Test the figures: their numbers, their drawings, and figures that cannot be drawn."""

import contextlib
import json
import socket
from types import SimpleNamespace

from conftest import CLASSES, ROOT
import matplotlib
from matplotlib.text import Text
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from l2ul import attack, models
from l2ul.common import activations
from l2ul.common.errors import InputError
from l2ul.data import images as image_sets
from l2ul.metrics import features
from l2ul.reporting import FIGURES, figure_data, figure_set, figures, read_records, rows

REFERENCE = ROOT / "result_data" / "reference" / "digits"
SMALL = {"device": "cpu", "samples": 15}


def draw(folders, output, numbers=tuple(FIGURES), **options):
    records, _ = read_records.read(folders)
    return figure_set.draw(records, numbers, output, figure_set.FigureOptions(**SMALL | options))


def some_runs(**changes):
    """Return the records of a block: neggrad, adv and adv_imp, k 16 and 64, two seeds, then changed copies."""
    template = {
        "dataset": "cifar10",
        "model": "resnet20",
        "goal": "misclassify",
        "continual_step": None,
        "continual_size": None,
        "age_grouping": None,
        "status": "forgotten",
        "needs_retain": False,
        "acc_retain_before": 99.0,
        "acc_test_before": 90.0,
        "unlearn_lr": 1e-3,
        "num_adv_images": None,
        "pgd_eps": None,
        "reg_lamb": None,
    }
    runs = []
    for method in ("before", "neggrad", "adv", "adv_imp"):
        for k in (16, 64):
            for seed in (0, 1):
                run = template | {"method": method, "k": k, "seed": seed}
                run |= {"acc_retain": 50.0 + 4 * seed, "acc_test": 40.0 + 2 * seed + k / 16}
                if method.startswith("adv"):
                    run |= {"num_adv_images": 20, "pgd_eps": 4.0}
                runs.append(run | ({"reg_lamb": 1.0} if method == "adv_imp" else {}))
    runs += [run | change for run in runs if run["method"] == "adv_imp" for change in changes.get("copies", ())]
    return rows.blocks(run | {"forget_file": f"{place:02}.txt"} for place, run in enumerate(runs))[0].records


# features


def closed_form(x, y):
    """Return ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features (Kornblith et al. 2019)."""
    x, y = (part - part.mean(0) for part in (x.double(), y.double()))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_cka_equals_the_closed_form_and_ignores_rotation_and_scale():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 7, generator=generator), torch.randn(30, 50, generator=generator)
    value = features.cka(features.gram(x), features.gram(y))
    assert value == pytest.approx(closed_form(x, y), rel=1e-9)
    assert 0 < value < 1
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q
    assert features.cka(features.gram(3 * x @ turn + 5), features.gram(y)) == pytest.approx(value, rel=1e-4)
    assert features.cka(features.gram(x), features.gram(x)) == pytest.approx(1)
    assert np.isnan(features.cka(features.gram(torch.ones(30, 2)), features.gram(y)))


def test_layers_are_in_the_order_in_which_they_run():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused, self.first = nn.Linear(4 * 36, 5), nn.Linear(3, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(torch.relu_(self.first(x)).flatten(1))

    net, images = Net(), torch.rand(6, 3, 8, 8)
    assert activations.layers(net, images) == {"first": 4 * 36, "head": 5}
    grams = features.layer_grams(net, images, batch_size=4)
    with torch.no_grad():  # before the activation overwrites it
        before = net.first(images)
    assert (before < 0).any()
    assert torch.allclose(grams["first"], features.gram(before.flatten(1)), rtol=1e-4)
    assert not net.first._forward_hooks
    assert net.training


def test_layers_in_groups_give_the_same_and_large_outputs_are_averaged(trained, monkeypatch):
    model, images, _ = trained
    together = features.layer_grams(model, images)
    monkeypatch.setattr(features, "MEMORY", 1)  # a pass for each layer
    alone = features.layer_grams(model, images, batch_size=7)
    assert list(together) == list(alone) == ["features.0", "features.3", "head"]
    assert all(torch.allclose(together[name], alone[name], rtol=1e-3, atol=1e-3) for name in together)
    monkeypatch.setattr("l2ul.common.activations.LARGEST", 300)
    assert activations.layers(model, images / 255) == {"features.0": 8, "features.3": 256, "head": CLASSES}
    tokens = torch.arange(24.0).view(2, 3, 4)
    monkeypatch.setattr("l2ul.common.activations.LARGEST", 8)
    assert torch.equal(activations.flat_features(tokens), tokens.mean(1))


def test_similarity_of_a_model_with_itself_is_one_in_every_layer(trained):
    model, images, _ = trained
    table = features.similarity(model, [("adv", model)], {"forget": images[:4], "test": images[4:]})
    assert table["cka"].to_numpy() == pytest.approx(1)
    assert table[["split", "images", "position"]].drop_duplicates().shape[0] == 6
    figure = figures.similarity(pd.concat([table, table.assign(split="retain")]), "")
    for axes in figure.axes:  # layers are whole numbers
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_last_features_are_the_inputs_of_the_classifying_layer(trained):
    model, images, _ = trained
    found = features.last_features(model, images, batch_size=16)
    with torch.no_grad():
        assert torch.allclose(found, model.features(image_sets.as_pixels(images)), atol=1e-5)
        without = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
        assert torch.allclose(features.last_features(without, images), without(image_sets.as_pixels(images)), atol=1e-5)
    assert np.array_equal(features.tsne(found, 3), features.tsne(found, 3))


# tables


def test_accuracies_are_means_over_runs_that_forgot():
    runs = some_runs()
    next(run for run in runs if (run["method"], run["k"], run["seed"]) == ("adv", 64, 1))["status"] = "cap"
    next(run for run in runs if (run["method"], run["k"], run["seed"]) == ("neggrad", 64, 1)).update(
        status="diverged", acc_retain=None, acc_test=None
    )
    table = figure_data.accuracies(runs).set_index(["method", "k", "capped"])
    row = table.loc["adv_imp", 16, False]
    assert (row["runs"], row["acc_retain"], row["acc_test"]) == (2, 52.0, 42.0)
    assert row["acc_retain_std"] == pytest.approx(np.std([50, 54], ddof=1))
    assert table.loc["adv", 64, True]["acc_test"] == 46.0
    assert table.loc["adv", 64, False]["acc_test"] == 44.0
    assert table.loc["neggrad", 64, False]["runs"] == 1
    assert table.xs("before", level="method")["acc_retain"].tolist() == [99.0]


def test_runs_of_a_sweep_are_not_part_of_the_accuracies():
    runs = some_runs(copies=({"pgd_eps": 1.0, "acc_test": 10.0}, {"reg_lamb": 0.0}, {"pgd_eps": 2.0, "reg_lamb": 9.0}))
    assert {run["pgd_eps"] for run in figure_data.usual(runs)} == {None, 4.0}
    table = figure_data.ablations(runs)
    swept = {name: sorted(set(rows["value"].dropna())) for name, rows in table.groupby("setting")}
    assert swept == {"pgd_eps": [1.0, 4.0], "reg_lamb": [0.0, 1.0]}
    assert set(table["k"]) == {64}
    assert set(table["method"]) == {"adv_imp", "before"}
    eps = table[(table["setting"] == "pgd_eps") & (table["value"] == 1.0)].iloc[0]
    assert (eps["runs"], eps["acc_test"]) == (2, 10.0)
    assert set(figure_data.ablations(runs, k=16)["k"]) == {16}
    with pytest.raises(InputError, match="--pgd-eps"):
        figure_data.ablations(some_runs())


def test_runs_on_one_forget_set_have_the_largest_k_and_the_preferred_methods():
    runs = [run for run in some_runs() if run["method"] != "before"]
    found = figure_data.on_one_forget_set(runs)
    assert [(run["method"], run["k"], run["seed"]) for run in found] == [
        (m, 64, 0) for m in ("neggrad", "adv", "adv_imp")
    ]
    assert [run["method"] for run in figure_data.on_one_forget_set(runs, 2)] == ["adv", "adv_imp"]
    ours = [run | {"method": "distill"} for run in runs if run["method"] == "adv"]
    assert [run["method"] for run in figure_data.on_one_forget_set(runs + ours, 2)] == ["adv_imp", "distill"]
    runs = [run | ({"forget_sha256": "another"} if run["method"] == "adv_imp" else {}) for run in runs]
    assert [run["method"] for run in figure_data.on_one_forget_set(runs)] == ["neggrad", "adv"]


def test_confusion_matrices_count_images_and_merge_rare_classes():
    small = figure_data.confusion_matrices(
        np.array([0, 2]), {"adv": np.array([1, 1]), "t": np.array([1, 2, 0, 1])}, list("abc")
    )
    assert small["adv"].to_numpy().tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert small["t"].to_numpy().tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 0]]
    names = [str(number) for number in range(100)]
    large = figure_data.confusion_matrices(np.arange(60), {"adv": np.arange(60) // 2 + 70}, names)["adv"]
    assert large.shape == (21, 21)
    assert large.columns[-1] == large.index[-1] == figure_data.OTHER
    assert large.to_numpy().sum() == 60
    few = figure_data.confusion_matrices(np.array([5, 7]), {"adv": np.array([8, 9])}, names)["adv"]
    assert (list(few.index), list(few.columns)) == (["5", "7"], ["8", "9"])
    assert figure_data.counts({"adv": few}).query("count > 0")[["label", "prediction"]].to_numpy().tolist() == [
        ["5", "8"],
        ["7", "9"],
    ]
    assert figure_data.coloured_classes(np.array([5, 8]), np.array([5, 5, 7]), names).tolist() == ["5", ""]


def with_curve(run, folder, text):
    path = folder / f"{run['method']}{run['seed']}.txt"
    path.with_suffix(".csv").write_text(text)
    return run | {"forget_file": str(path)}


def test_curves_of_several_runs_stand_below_each_other(tmp_path):
    runs = [run for run in some_runs() if run["k"] == 16 and run["method"] in ("neggrad", "adv")]
    text = "step,forget,acc_forget,forgotten\n1,-1.5,100.0,0.0\n2,inf,50.0,50.0\n3,,0.0,100.0\n"
    table = figure_data.curves(with_curve(run, tmp_path, text) for run in runs)
    assert list(table) == [*figure_data.CURVE_KEYS, "acc_forget", "forget"]  # forgotten is the rest to 100
    assert list(table["label"].unique()) == ["neggrad, seed 0", "neggrad, seed 1", "adv, seed 0", "adv, seed 1"]
    assert list(table["run"].unique()) == ["neggrad0", "neggrad1", "adv0", "adv1"]
    assert table["step"].tolist() == [1, 2, 3] * 4
    assert table["forget"].notna().tolist() == [True, False, False] * 4
    relabelled = text.replace("3,,0.0,100.0", "3,0.5,0.0,50.0")
    table = figure_data.curves([with_curve(runs[0], tmp_path, relabelled)])
    assert figure_data.measured(table) == ["acc_forget", "forgotten", "forget"]
    assert table["label"].tolist() == ["neggrad"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read: it is not a table"),
        ("\x00\xff", "cannot be read"),
        ("a,b\n1,2\n", "has no column step"),
        ("step\n", "the runs took no steps"),
        ("step,forget\nx,1\n", "the runs took no steps"),
    ],
)
def test_a_curve_that_is_damaged_or_empty_is_refused(tmp_path, text, message):
    run = some_runs()[0]
    (tmp_path / "before0.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        figure_data.curves([run | {"forget_file": str(tmp_path / "before0.txt")}])


def test_figure_7_shows_the_first_run_of_each_method_unless_runs_are_named():
    first = figure_data.first_of_each_method(some_runs(copies=({"pgd_eps": 1.0, "k": 2},)))
    shown = [(run["method"], run["k"], run["seed"], run["pgd_eps"]) for run in first]
    assert shown == [("before", 16, 0, None), ("neggrad", 16, 0, None), ("adv", 16, 0, 4.0), ("adv_imp", 16, 0, 4.0)]


def test_damaged_predictions_are_refused(tmp_path):
    whole = next((REFERENCE / "runs").glob("*.npz")).read_bytes()
    for place in range(0, len(whole), 97):
        (tmp_path / "run.npz").write_bytes(whole[:place])
        with pytest.raises(InputError, match="is damaged"):
            figure_data.predictions(tmp_path / "run.npz")


# drawing


def test_saving_a_figure_is_deterministic_and_leaves_matplotlib_unchanged(tmp_path):
    before = dict(matplotlib.rcParams)
    runs = some_runs(copies=({"reg_lamb": 0.0, "status": "cap"},))
    for folder in ("one", "two"):
        table = figure_data.ablations(runs)
        made = figures.save(figures.ablations(table, "title"), table, tmp_path / folder / "net.v2")
    assert [path.name for path in made] == ["net.v2.png", "net.v2.pdf", "net.v2.csv"]
    for path in made:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert pd.read_csv(made[2])["acc_test"].to_numpy() == pytest.approx(table["acc_test"].to_numpy())


def test_lines_show_means_and_open_markers_runs_at_the_cap():
    table = figure_data.accuracies([run | ({"status": "cap"} if run["k"] == 64 else {}) for run in some_runs()])
    left, right = figures.accuracy_against_k(table, "title").axes
    open_ones = [line for line in right.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata().tolist() for line in open_ones] == [[45.0]] * 3
    assert [line.get_text() for line in left.get_xticklabels()] == ["16", "64"]
    one = figure_data.accuracies([run for run in some_runs() if run["k"] == 16])
    lines = figures.accuracy_against_k(one, "title").axes[0].lines[1:]  # after the line of the original model
    places = {float(x) for line in lines for x in line.get_xdata()}
    assert len(places) == 3  # side by side
    assert np.log2(sorted(places)).mean() == pytest.approx(4)
    styles = {(line.get_color(), line.get_marker()) for line in open_ones}
    assert len(styles) == 3


@pytest.mark.parametrize(("entries", "columns"), [(1, 1), (6, 6), (7, 4), (12, 6), (13, 5)])
def test_the_rows_of_a_legend_have_about_the_same_length(entries, columns):
    methods = ["neggrad", *(f"mine{number}" for number in range(entries - 1))]
    table = pd.DataFrame({"method": methods, "k": 16, "capped": False} | dict.fromkeys(figure_data.MEASURED, 50.0))
    table = table.assign(**{f"{name}_std": np.nan for name in figure_data.MEASURED})
    (legend,) = figures.accuracy_against_k(table, "title").legends
    assert (len(legend.get_texts()), legend._ncols) == (entries, columns)


def test_panels_of_figure_3_name_their_classes():
    predicted = {"predictions of adv": np.array([1, 1]), "adversarial targets": np.array([1, 0])}
    matrices = figure_data.confusion_matrices(np.array([0, 2]), predicted, list("abc"))
    panels = figures.confusions(matrices, "title").axes
    assert [axes.get_xlabel() for axes in panels] == ["predicted class", "target class"]
    assert [axes.get_ylabel() for axes in panels] == ["true class", ""]


def test_a_line_for_each_run_and_a_panel_for_each_term():
    rows = [
        {"run": name, "method": method, "k": 16, "seed": 0, "label": f"{method}, $", "step": step}
        | {"acc_forget": 100.0 / step, "adv$\\x": 10.0**-step, "only": 1.0 if name == "a" else np.nan}
        for name, method in (("a", "adv"), ("b", "adv"), ("c", "yours"))
        for step in range(1, 2 * figures.MOST_POINTS if name == "c" else 20)
    ]
    figure = figures.curves(pd.DataFrame(rows), "title")
    left, middle, right = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        "accuracy on $D_f$",
        r"loss term: adv$\x",
        "loss term: only",
    ]
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == 3
    assert [len(line.get_xdata()) for line in left.lines] == [19, 19, figures.MOST_POINTS]
    assert left.lines[2].get_xdata()[-1] == 2 * figures.MOST_POINTS - 1
    assert (left.get_xscale(), left.get_yscale(), middle.get_yscale()) == ("log", "linear", "log")
    assert left.get_ylabel() == "accuracy (%)"
    assert [len(line.get_xdata()) for line in right.lines[:3]] == [19, 0, 0]


NAMES = ("a$b$c", r"$\frac", "=1+1", "x\x1b[31m", "L" * 200, "قطة", "😀", "line\nbreak", "_b", "c" * 70)


def nasty_figures():
    """Yield figures 1, 3, 5 and 7 with NAMES wherever a name can be."""
    title, each = f"{', '.join(NAMES)}, seed {' '.join(map(str, range(50)))}", {"k": 16, "capped": False, "seed": 0}
    measured = dict.fromkeys(figure_data.MEASURED, 50.0) | {f"{name}_std": np.nan for name in figure_data.MEASURED}
    yield figures.accuracy_against_k(pd.DataFrame([each | measured | {"method": name} for name in NAMES]), title)
    numbers = np.arange(len(NAMES))
    yield figures.confusions(figure_data.confusion_matrices(numbers, {NAMES[0]: numbers}, NAMES), title)
    points = [{"panel": NAMES[0], "split": "test", "class": name, "x": 0, "y": 0} for name in NAMES]
    yield figures.maps(pd.DataFrame(points), list(NAMES), title)
    curve = {"acc_forget": 50.0, "$x$": 1.0} | each
    runs = [{"run": name, "method": name, "label": name, "step": step} for name in NAMES for step in (1, 100)]
    yield figures.curves(pd.DataFrame([run | curve | {"a$^": 10.0 ** -run["step"]} for run in runs]), title)


@pytest.mark.filterwarnings("error")
def test_names_are_shown_as_they_are_and_fit(tmp_path):
    for figure in nasty_figures():
        figures.save(figure, pd.DataFrame(), tmp_path / "figure")
        texts = figure.findobj(Text)
        formulas = {text.get_text() for text in texts if text.get_parse_math() and "$" in text.get_text()}
        assert all(figures.FORMULA.search(formula) for formula in formulas)
        assert {r"$\frac", "x\ufffd[31m", "line\ufffdbreak", "_b"} <= {text.get_text() for text in texts}
        for part in (figure._suptitle, *figure.legends):
            box = part.get_window_extent()
            assert min(box.x0, box.y0) >= 0, part
            assert box.x1 <= figure.bbox.x1, part
            assert box.y1 <= figure.bbox.y1, part


def test_only_formulas_of_matplotlib_and_of_the_project_are_formulas():
    formulas = (
        r"$\mathdefault{10^{-3}}$",
        r"$\mathdefault{-2\times10^{4}}$",
        r"$\mathdefault{0}$",
        "$D_f$",
        "$N_{adv}$",
    )
    assert all(figures.FORMULA.fullmatch(text) for text in formulas)
    assert not any(figures.FORMULA.search(text) for text in (r"$\mathdefault{\x}$", "$x$", r"$\mathdefault{}$"))
    assert figures.shorten("") == ""


@pytest.mark.filterwarnings("error")
def test_characters_come_from_any_font_that_has_them(tmp_path):
    figure, sentences = figures.confusions({"\u1d8d": pd.DataFrame([[1]], ["a"], ["b"])}, "\ufdd0"), []
    figures.save(figure, pd.DataFrame(), tmp_path / "figure", sentences.append)
    assert "STIXGeneral" in figure.axes[0].title.get_fontfamily()
    assert len(sentences) == 1
    assert "boxes in place of \ufdd0" in sentences[0]


def test_figures_of_runs_with_saved_models(run, few_digits, tmp_path, capsys):
    code, _, err = run("--save-model", "--method", "before", "neggrad", "adv", "--pgd-eps", 1)
    assert code == 0, err
    made = draw([tmp_path], tmp_path / "pictures")
    assert {path.name for path in made} == {
        f"digits_resnet20_{number}_{FIGURES[number]}.{kind}"
        for number in (1, 2, 3, 4, 5, 7)
        for kind in ("png", "pdf", "csv")
    }
    assert all(path.stat().st_size for path in made)
    assert "figure 6 was left out: no records differ in a single setting" in capsys.readouterr().out
    numbers = {
        path.name.split("_")[2]: pd.read_csv(path, dtype={"class": str}) for path in made if path.suffix == ".csv"
    }
    check_numbers(numbers, few_digits, tmp_path)


def check_numbers(numbers, digits, folder):
    forget = torch.tensor([int(n) for n in next((folder / "runs").glob("*.txt")).read_text().split()])
    labels = digits.train.labels[forget]
    net = models.load("resnet20", 10, ROOT / "data/weights/digits_resnet20.safetensors")
    settings = {"num_adv_images": 3, "eps": 1.0, "alpha": 0.4, "steps": 2, "seed": 0}
    examples, targets = attack.adversarial_set(net, digits.train.images[forget], labels, 10, **settings)
    assert numbers["2"]["index"].tolist() == forget.repeat_interleave(3).tolist()
    assert numbers["2"]["target"].tolist() == targets.tolist()
    owners = image_sets.as_pixels(digits.train.images[forget]).repeat_interleave(3, 0)
    assert numbers["2"]["norm"].to_numpy() == pytest.approx((examples - owners).flatten(1).norm(dim=1), rel=1e-4)
    totals = numbers["3"].groupby("panel")["count"].sum().to_dict()
    assert totals == {"predictions of neggrad": 2, "predictions of adv": 2, "adversarial targets": 6}
    assert numbers["4"].groupby(["method", "split"]).size().tolist() == [20] * 6
    assert numbers["4"]["cka"].between(0, 1.0001).all()
    assert numbers["5"].groupby("panel", sort=False).size().to_dict() == {"before": 17, "neggrad": 17, "adv": 17}
    stars = numbers["5"][(numbers["5"]["panel"] == "adv") & (numbers["5"]["split"] == "forget")]
    assert stars["class"].tolist() == [str(label) for label in labels.tolist()]


@pytest.mark.reference
def test_figures_without_inputs_are_reported_and_the_others_drawn(tmp_path, few_digits, capsys):
    made = draw([REFERENCE], tmp_path)
    drawn = {path.name.split("_")[2] for path in made}
    assert drawn == {"1", "3", "7"}  # the others need more digits than the fixture has
    printed = capsys.readouterr().out
    assert "figures 4, 5 were left out: no saved models beside the records; run main_unlearn.py with --save" in printed
    assert (
        "figure 2 was left out: digits has 40 training images, but the records are of a training set of 1438" in printed
    )
    assert "figure 3 shows no targets" in printed
    draw([REFERENCE], tmp_path, [3], k=99, methods=["adv"])
    assert "figure 3 was left out: no predictions beside the records of k 99, adv;" in capsys.readouterr().out


@pytest.mark.reference
def test_a_missing_checkpoint_is_refused_before_the_first_figure(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint none.safetensors"):
        draw([REFERENCE], tmp_path, checkpoint="none.safetensors")
    assert not list(tmp_path.iterdir())


def test_runs_of_figure_7_are_chosen_by_the_beginning_of_their_names(tmp_path, capsys):
    names = {json.loads(path.read_text())["method"]: path.stem for path in (REFERENCE / "runs").glob("*.json")}
    made = draw([REFERENCE], tmp_path, [7], runs=[names["adv"][:6], names["distill"]])
    assert [path.name for path in made] == [f"digits_resnet20_7_curves.{kind}" for kind in ("png", "pdf", "csv")]
    assert set(pd.read_csv(made[2])["run"]) == {names["adv"], names["distill"]}
    with pytest.raises(InputError, match="no record has a name that begins with 'zz'"):
        draw([REFERENCE], tmp_path, [7], runs=["zz"])
    assert draw([REFERENCE], tmp_path, [7], runs=[names["before"]]) == []
    assert "figure 7 was left out: the runs took no steps" in capsys.readouterr().out


def test_weights_other_than_those_of_the_records_are_refused(run, tmp_path, capsys):
    run("--save-model", "--method", "neggrad")
    for path in (tmp_path / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"checkpoint_sha256": "0" * 64}))
    file = ROOT / "data/weights/digits_resnet20.safetensors"
    assert draw([tmp_path], tmp_path, [5], checkpoint=file) == []
    assert "does not hold the original weights of the runs (SHA-256 000000000000…)" in capsys.readouterr().out


@pytest.mark.reference
def test_continual_runs_are_left_out(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for place, path in enumerate((REFERENCE / "runs").glob("*.json")):
        record = json.loads(path.read_text())
        (folder / f"{place}.json").write_text(json.dumps(record | {"continual_step": 1, "continual_size": 8}))
    assert draw([tmp_path], tmp_path) == []


def test_examples_of_a_run_in_a_precision_that_the_device_lacks_are_made_in_fp32(run, tmp_path, capsys):
    run("--method", "adv")
    draw([tmp_path], tmp_path, [2])
    (table,) = tmp_path.glob("*_2_*.csv")
    expected = table.read_text()
    for path in (tmp_path / "runs").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "tf32"}))
    capsys.readouterr()
    draw([tmp_path], tmp_path, [2])
    message = "figure 2 is made in fp32, as cpu does not compute in tf32, the precision of the run"
    assert message in capsys.readouterr().out
    assert table.read_text() == expected


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torchvision:squeezenet1_1", "torchvision"),
        ("timm:legacy_seresnet18.in1k", "timm"),  # its weights are not on the hub
        ("timm:resnet10t.c3_in1k", "timm"),
        ("hf:nobody/nothing", "transformers"),
    ],
)
def test_figures_download_no_weights_without_permission(name, package, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package)
    looked_up = []

    def lookup(host, *arguments, **options):
        looked_up.append(host)
        raise socket.gaierror("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run = {"model": name, "dataset": "imagenet", "mean": None, "std": None, "checkpoint_sha256": "0" * 64}
    block = rows.Block("misclassify", None, "imagenet", None, name, False, records=[run])
    for download in (False, True) if package == "torchvision" else (False,):  # the others try it several times
        options = figure_set.FigureOptions(data_dir=tmp_path, device="cpu", download=download)
        subject = figure_set.Subject(options, block)
        monkeypatch.setattr(figure_set.Subject, "images", lambda self, run: SimpleNamespace(num_classes=1000))
        with pytest.raises(InputError, match="could not be downloaded") as raised:
            subject.original(run)
        allowed = str(raised.value).endswith(" add --download to allow it")
        assert (bool(looked_up), bool(capsys.readouterr().out), allowed) == (download, download, not download)


def test_a_size_beyond_any_training_set_is_drawn(tmp_path):
    (tmp_path / "runs").mkdir()
    record = json.loads(next((REFERENCE / "runs").glob("*.json")).read_text()) | {"method": "adv", "status": "done"}
    for place, k in enumerate((16, 2**63 - 1)):
        (tmp_path / "runs" / f"{place}.json").write_text(json.dumps(record | {"k": k, "acc_forget": 0.0}))
    made = draw([tmp_path], tmp_path, [1])
    assert pd.read_csv(made[2], dtype=str)["k"].dropna().tolist() == ["16", "9223372036854775808"]


def test_messages_about_data_advise_no_flag_of_other_scripts(tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise InputError("the splits differ", "name other splits with --train-split", "save it with equal features")

    monkeypatch.setattr(figure_set.datasets, "load", load)
    with pytest.raises(InputError, match="^the splits differ; save it with equal features$"):
        figure_set.load_images({"dataset": "pets"}, tmp_path)


def test_the_reason_why_a_figure_was_left_out_advises_no_flag_of_other_scripts(tmp_path, monkeypatch, capsys):
    def fail(subject):
        raise InputError("a.tif is grey", "give the level of white as --white-level", "convert to 8 bits")

    monkeypatch.setitem(figure_set.DRAW, 1, fail)
    draw([REFERENCE], tmp_path, [1])
    assert "figure 1 was left out: a.tif is grey; convert to 8 bits\n" in capsys.readouterr().out


def test_runs_of_a_block_have_the_images_and_the_weights_of_their_own_options(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_set, "load_images", lambda run, *others: SimpleNamespace(num_classes=run["split_seed"]))
    monkeypatch.setattr(figure_set.models, "load", lambda name, classes, path, *others: loaded.append((classes, path)))
    weights, loaded = tmp_path / "weights" / "utkface_MFD_resnet20.safetensors", []
    weights.parent.mkdir()
    weights.touch()
    run = {"model": "resnet20", "dataset": "utkface", "age_grouping": "MFD"}
    run |= {"checkpoint_sha256": figure_set.file_sha256(weights)}
    runs = [run | {"split_seed": seed} for seed in (3, 4, 3)]
    block = rows.Block("misclassify", None, "utkface", "MFD", "resnet20", False, records=runs)
    subject = figure_set.Subject(figure_set.FigureOptions(data_dir=tmp_path, device="cpu"), block)
    for one in runs:
        with contextlib.suppress(AttributeError):  # None is no model
            subject.original(one)
    assert loaded == [(3, weights), (4, weights), (3, weights)]
    assert subject.images(runs[0]) is subject.images(runs[2])


def test_figure_1_leaves_out_runs_from_other_weights():
    runs = [{key: value for key, value in run.items() if key not in ("row", "differs")} for run in some_runs()]
    other = {"checkpoint_sha256": "b" * 64, "acc_test_before": 50.0}
    runs = [{"checkpoint_sha256": "a" * 64} | run | (other if run["method"] == "adv_imp" else {}) for run in runs]
    (block,), said = rows.blocks(runs), []
    subject = figure_set.Subject(figure_set.FigureOptions(device="cpu"), block, said.append)
    table = figure_set.accuracy_against_k(subject)[1]
    assert set(table["method"]) == {"before", "neggrad", "adv"}
    assert table.set_index("method")["acc_test"]["before"] == 90.0
    assert "4 runs with other settings are left out" in said[0]


def test_ablations_compare_older_records_that_lack_a_setting_with_newer_ones():
    newer = {"pgd_eps": 1.0, "surrogate": None, "adv_dtype": "float32", "method_revision": None}
    table = figure_data.ablations(some_runs(copies=[newer]))
    assert set(table["setting"]) == {"pgd_eps"}
    assert set(table["value"].dropna()) == {1.0, 4.0}


def test_ablations_show_numbers_that_a_method_of_the_user_declares():
    own = {"method": "own", "method_settings": "temperature kind", "kind": "soft"}
    table = figure_data.ablations(some_runs(copies=[own | {"temperature": 2}, own | {"temperature": 4}]))
    assert set(table["setting"]) == {"temperature"}
    assert set(table["value"].dropna()) == {2.0, 4.0}
    assert {axes.get_xlabel() for axes in figures.ablations(table, "title").axes} == {"", "temperature"}


def test_ablations_compare_only_runs_with_the_same_weights_and_images():
    other = {"checkpoint_sha256": "b" * 64, "acc_test_before": 50.0}
    runs = [{"checkpoint_sha256": "a" * 64} | run for run in some_runs(copies=[{"pgd_eps": 1.0}])]
    adv = [run | {"method": "adv"} | other for run in runs if run["method"] == "adv_imp"]
    more = [run | {"seed": 2, "pgd_eps": 2.0} for run in runs if run["method"] == "adv_imp"]
    table = figure_data.ablations([*runs, *adv, *more])
    assert set(table["method"]) == {"before", "adv_imp"}
    assert table.set_index("method")["acc_test"]["before"] == 90.0
    assert set(figure_data.ablations(adv)["method"]) == {"before", "adv"}


def files_of_run(run, folder, classes, images="0\n1\n"):
    """Write the files beside the record of a run of two images: predictions (before, after, of D_test), and D_f."""
    path = folder / f"{run['method']}{run['seed']}.txt"
    path.write_text(images)
    names = ("forget_before", "forget_after", "test_after")
    np.savez(path.with_suffix(".npz"), **dict(zip(names, map(np.array, classes), strict=True)))
    return run | {"forget_file": str(path), "k": 2, "forget_sha256": None, "checkpoint_sha256": None}


def test_without_the_data_set_classes_are_those_of_all_runs(tmp_path):
    runs = [run for run in some_runs() if run["seed"] == 0 and run["method"] in ("adv", "neggrad") and run["k"] == 16]
    neggrad, adv = sorted(runs, key=lambda run: run["method"], reverse=True)
    runs = [files_of_run(neggrad, tmp_path, ([0, 1], [1, 0], [1])), files_of_run(adv, tmp_path, ([0, 1], [5, 6], [7]))]
    runs.append(files_of_run(adv | {"method": "adv_imp"}, tmp_path, ([0, 1], [5], [7])))  # damaged
    figure_set.draw(runs, [3], tmp_path, figure_set.FigureOptions(data_dir=tmp_path))
    (file,) = tmp_path.glob("*.csv")
    table = pd.read_csv(file)
    assert set(table["panel"]) == {"predictions of neggrad", "predictions of adv"}
    assert sorted(set(table["prediction"])) == list(range(8))
    shown = table[(table["panel"] == "predictions of adv") & (table["count"] > 0)]
    assert shown[["label", "prediction"]].to_numpy().tolist() == [[0, 5], [1, 6]]


@pytest.mark.parametrize("images", ["", "0\n", "0\n-1\n", "ant/1.png\nant/2.png\n"])
def test_damaged_lists_of_d_f_are_reported_and_their_predictions_drawn(tmp_path, capsys, images):
    run = next(run for run in some_runs() if run["method"] == "adv") | {"dataset": "digits", "num_train": 1438}
    run = files_of_run(run, tmp_path, ([0, 1], [1, 0], [9]), images)
    figure_set.draw([run], [3], tmp_path, figure_set.FigureOptions(data_dir=tmp_path))
    assert "does not hold 2 indices of training images" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 1
