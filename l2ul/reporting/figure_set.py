"""The figures of main_tables.py --figures: from records, and from the predictions and saved nets beside them.

    python main_tables.py --figures                      # all six, where what they need is there
    python main_tables.py --figures 1 6                  # accuracies, which need records alone
    python main_tables.py --figures 4 5 --figure-k 16    # of nets that main_unlearn.py kept with --save-model

Each is a PNG, a PDF and a CSV of the numbers shown. What cannot be drawn is told in a sentence; the others are drawn.
"""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from collections.abc import Callable
from dataclasses import dataclass
import functools
import itertools
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import torch

from l2ul import attack
from l2ul.cli import options
from l2ul.common import device as device_module
from l2ul.common import precision as precisions
from l2ul.common.errors import InputError
from l2ul.common.files import file_sha256
from l2ul.common.progress import progress_bar
from l2ul.data import datasets, storage
from l2ul.data import images as image_sets
from l2ul.metrics import accuracy, features
from l2ul.reporting import figure_data, figures, rows
from l2ul.reporting.rows import Record
import models
from models import checkpoint

Drawn = tuple[Figure, pd.DataFrame]
MOST_METHODS = 4  # side by side, unless methods are named
SHOWN_IMAGES, SHOWN_EXAMPLES = 4, 3  # of figure 2
DATA_KEYS = ("image_size", "age_grouping", "split_seed")  # of a record: what its data set was loaded with


def add_flags(parser: options.Parser) -> None:
    """The flags that `draw` reads."""
    group = parser.add_argument_group("figures (--figures: all, or the numbers given)")
    add = group.add_argument
    add(
        "--figures",
        type=int,
        choices=sorted(FIGURES),
        nargs="*",
        metavar="N",
        help="; ".join(f"{number}: {name.replace('_', ' ')}" for number, (name, _) in FIGURES.items()),
    )
    add("--data-dir", type=Path, default=Path("data"), metavar="FOLDER", help="data and weights, for 2 to 5")
    add("--checkpoint", metavar="FILE", help="the original weights, for 2, 4 and 5 (default: as main_unlearn.py)")
    add("--device", choices=("cuda", "mps", "cpu"), help="where to compute (default: the best there is)")
    add("--figure-k", type=options.positive_int, metavar="K", help="size of the D_f shown (default: the largest)")
    add("--figure-seed", type=options.nonnegative_int, metavar="N", help="seed of it (default: the smallest)")
    those = f"methods shown in 3 to 5 (default: those that have what is needed, at most {MOST_METHODS})"
    add("--figure-method", nargs="+", metavar="NAME", help=those)
    samples = "images of D_r and of D_test in 4 and 5 (default: 500)"
    add("--figure-samples", type=options.positive_int, default=500, metavar="N", help=samples)


def draw(opts: argparse.Namespace, found: list[Record], output_dir: Path) -> list[Path]:
    """Draw what `opts.figures` names (empty: all) from records with the path of each in `_path`; returns the files.

    A set of figures for each data set, net and goal, named after them. Runs of a continual deletion are left out.
    """
    if opts.figures is None:
        return []
    runs = [figure_data.plain(record) for record in found if record["continual_step"] is None]
    paths = []
    for block in rows.blocks(runs):
        subject = Subject(opts, block)
        for number in sorted(set(opts.figures or FIGURES)):
            name, make = FIGURES[number]
            try:
                figure, numbers = make(subject)
            except InputError as error:
                print(f"{subject.name}: figure {number} was left out: {error}", flush=True)
                continue
            paths += figures.save(figure, numbers, Path(output_dir) / f"{subject.name}_{number}_{name}")
    return paths


@dataclass(frozen=True)
class Subject:
    """What a set of figures is about: runs of one data set, net and goal; data and nets are loaded when needed."""

    opts: argparse.Namespace
    block: rows.Block

    @property
    def name(self) -> str:
        """How the names of the files begin."""
        block = self.block
        parts = [block.dataset, block.age_grouping, block.model, "relabel" if block.goal == "relabel" else None]
        return "_".join(part.replace(":", "_").replace("/", "_") for part in parts if part)

    @functools.cached_property
    def device(self) -> torch.device:
        return device_module.choose_device(self.opts.device)

    @functools.cached_property
    def images(self) -> image_sets.Images:
        run = self.block.records[0]
        chosen = {key: run[key] for key in DATA_KEYS if run.get(key) is not None}
        images = datasets.load(run["dataset"], self.opts.data_dir, download=False, **chosen)
        if run.get("num_train") not in (None, len(images.train)):
            raise InputError(
                f"{run['dataset']} has {len(images.train)} training images, the records were made with "
                f"{run['num_train']}; name the folder of those with --data-dir"
            )
        return images

    def original(self, run: Record) -> models.Classifier:
        """The net that the run began with."""
        told = self.opts.checkpoint
        usual = checkpoint.find(run["dataset"], run["model"], self.opts.data_dir)
        files = [Path(path) for path in (told, usual) if path and Path(path).is_file()]
        same = (path for path in files if file_sha256(path) == run["checkpoint_sha256"])
        statistics = [[float(value) for value in (run.get(key) or "").split()] or None for key in ("mean", "std")]
        net = models.load(run["model"], self.images.num_classes, next(same, told), *statistics).to(self.device)
        if net.sha256 != run["checkpoint_sha256"]:
            raise InputError(
                f"{net.source} is not what the runs began with (sha256 {run['checkpoint_sha256'][:12]}…); name that "
                f"file with --checkpoint"
            )
        return net

    def unlearned(self, run: Record) -> models.Classifier:
        return models.load_saved(figure_data.saved_net(run), self.original(run)).to(self.device)

    def chosen(self, has: Callable[[Record], bool], missing: str, mend: str) -> list[Record]:
        """Runs on one D_f, one a method, of those that have what a figure needs; InputError where none has."""
        asked = {"k": self.opts.figure_k, "seed": self.opts.figure_seed}
        names = self.opts.figure_method
        there = [
            run
            for run in self.block.records
            if run["method"] != "before"
            and (not names or run["method"] in names)
            and all(value in (None, run[key]) for key, value in asked.items())
            and has(run)
        ]
        if not there:
            words = [f"{key} {value}" for key, value in asked.items() if value is not None] + (names or [])
            raise InputError(f"no {missing} beside the records{' of ' if words else ''}{', '.join(words)}; {mend}")
        return figure_data.on_one_forget_set(there, None if names else MOST_METHODS)

    def forget(self, run: Record) -> torch.Tensor:
        """Indices (k,) of the run's D_f."""
        try:
            return torch.from_numpy(np.loadtxt(run["forget_file"], dtype=np.int64, ndmin=1))
        except (OSError, ValueError):
            raise InputError(
                f"{run['forget_file']} does not list training images, and the figure shows those"
            ) from None

    def sampled(self, run: Record, split: str, among: torch.Tensor) -> torch.Tensor:
        return figure_data.sample(among, self.opts.figure_samples, run["seed"], f"figure {split}")

    def title(self, runs: list[Record]) -> str:
        sizes = " ".join(f"{k}" for k in sorted({run["k"] for run in runs}))
        draws = " ".join(f"{seed}" for seed in sorted({run["seed"] for run in runs}))
        return f"{self.block.label}, {self.block.goal}, k = {sizes}, seed {draws}"


def accuracy_against_k(subject: Subject) -> Drawn:
    runs = figure_data.usual(run for run in subject.block.records if run["method"] != "before")
    table = figure_data.accuracies(runs)
    left_out = sum(run["method"] != "before" for run in subject.block.records) - len(runs)
    if left_out:
        print(f"{subject.name}: figure 1 shows one row of settings a method; {left_out} runs with others are left out")
    most = int(table["runs"][table["method"] != "before"].max())
    note = f"mean ± standard deviation of up to {most} seeds" if most > 1 else "one seed"
    title = f"{subject.block.label}, {subject.block.goal}; {note}"
    return figures.accuracy_against_k(table, title), table.astype({"k": "Int64"})


def ablations(subject: Subject) -> Drawn:
    table = figure_data.ablations(subject.block.records, subject.opts.figure_k)
    block = subject.block
    return figures.ablations(table, f"{block.label}, {block.goal}, k = {table['k'].iloc[0]}"), table


def adversarial_examples(subject: Subject) -> Drawn:
    """Targets and starts depend on seed, position in D_f and draw alone, so these are the first draws of the run's own
    D_adv, to the rounding of batches of another size."""
    run = subject.chosen(
        lambda run: run.get("num_adv_images") and Path(run["forget_file"]).is_file(),
        "list of D_f of a method with adversarial examples",
        "run main_unlearn.py --method adv",
    )[0]
    indices = subject.forget(run)[:SHOWN_IMAGES]
    chosen = subject.images.train.subset(indices)
    pixels, labels = chosen.pixels().to(subject.device), chosen.labels.to(subject.device)
    precision = run.get("precision") or "fp32"
    precisions.use(subject.device, precision)
    net, draws = subject.original(run), min(SHOWN_EXAMPLES, run["num_adv_images"])
    made, targets = attack.adversarial_set(
        net,
        pixels,
        labels,
        subject.images.num_classes,
        num_adv_images=draws,
        eps=run["pgd_eps"],
        alpha=run["pgd_alpha"],
        steps=run["pgd_iter"],
        seed=run["seed"],
        batch_size=run.get("attack_batch_size"),
        precision=precision,
    )
    made = storage.as_stored(made, storage.DTYPES[run.get("adv_dtype") or "float32"])
    names, owners = np.array(subject.images.classes), torch.arange(len(pixels)).repeat_interleave(draws)
    images, examples = _array(pixels), _array(made)
    told = {"index": indices[owners], "label": names[chosen.labels[owners]], "target": names[targets.cpu()]}
    numbers = pd.DataFrame(told | {"called": names[accuracy.predict(net, made)]})
    numbers["norm"] = np.linalg.norm((examples - images[owners]).reshape(len(owners), -1), axis=1)
    title = f"{subject.title([run])}, ε = {run['pgd_eps']:g}: image, example → target, its enlarged δ"
    return figures.adversarial_examples(images, examples, numbers, title), numbers


def _array(images: torch.Tensor) -> np.ndarray:
    """(N, H, W, 3) floats in [0,1]."""
    return image_sets.as_pixels(images).permute(0, 2, 3, 1).cpu().numpy()


def new_classes(subject: Subject) -> Drawn:
    runs = subject.chosen(_has_predictions, "predictions", "run main_unlearn.py")
    found = [figure_data.predictions(figure_data.path_of(run, ".npz")) for run in runs]
    called = {
        f"called after {run['method']}": classes["forget_after"] for run, classes in zip(runs, found, strict=True)
    }
    try:
        labels, names = subject.images.train.labels[subject.forget(runs[0])], subject.images.classes
    except InputError as error:
        print(f"{subject.name}: figure 3 has no targets, and classes as the net called them: {error}", flush=True)
        names = [str(number) for number in range(1 + max(int(c.max()) for c in found[0].values()))]
        matrices = figure_data.crossings(found[0]["forget_before"], called, names)
    else:
        draws = next((run["num_adv_images"] for run in runs if run.get("num_adv_images")), None)
        if draws:
            targets = attack.random_targets(labels, len(names), draws, runs[0]["seed"])
            called["adversarial targets"] = targets.numpy()
        matrices = figure_data.crossings(labels.numpy(), called, names)
    return figures.confusions(matrices, subject.title(runs)), figure_data.counts(matrices)


def _has_predictions(run: Record) -> bool:
    path = figure_data.path_of(run, ".npz")
    return path.is_file() and "forget_after" in figure_data.predictions(path)


def _with_nets(subject: Subject) -> list[Record]:
    return subject.chosen(
        lambda run: figure_data.saved_net(run).exists(), "saved nets", "run main_unlearn.py with --save-model"
    )


def layer_similarity(subject: Subject) -> Drawn:
    runs = _with_nets(subject)
    train, test, forget = subject.images.train, subject.images.test, subject.forget(runs[0])
    retain = subject.sampled(runs[0], "retain", accuracy.complement(forget, len(train)))
    splits = {
        "forget": train.subset(forget).images,
        "retain": train.subset(retain).images,
        "test": test.subset(subject.sampled(runs[0], "test", torch.arange(len(test)))).images,
    }
    nets = ((run["method"], subject.unlearned(run)) for run in runs)
    with progress_bar("figure 4", len(splits) * (1 + len(runs))) as advance:
        table = features.similarity(subject.original(runs[0]), nets, splits, advance)
    return figures.similarity(table, subject.title(runs)), table


def feature_maps(subject: Subject) -> Drawn:
    runs = _with_nets(subject)
    images, forget = subject.images, subject.forget(runs[0])
    test = subject.sampled(runs[0], "test", torch.arange(len(images.test)))
    parts = {"forget": images.train.subset(forget), "test": images.test.subset(test)}
    nets = itertools.chain([("before", subject.original(runs[0]))], ((r["method"], subject.unlearned(r)) for r in runs))
    with progress_bar("figure 5", 1 + len(runs)) as advance:
        table = features.maps(nets, {name: part.images for name, part in parts.items()}, runs[0]["seed"], advance)
    labels = torch.cat([part.labels for part in parts.values()]).numpy()
    classes = figure_data.told_apart(labels, parts["forget"].labels.numpy(), images.classes)
    table.insert(2, "index", np.tile(torch.cat([forget, test]), 1 + len(runs)))
    table.insert(3, "class", np.tile(classes, 1 + len(runs)))
    return figures.maps(table, images.classes, subject.title(runs)), table


FIGURES: dict[int, tuple[str, Callable[[Subject], Drawn]]] = {
    1: ("accuracy_against_k", accuracy_against_k),
    2: ("adversarial_examples", adversarial_examples),
    3: ("new_classes", new_classes),
    4: ("layer_similarity", layer_similarity),
    5: ("feature_maps", feature_maps),
    6: ("ablations", ablations),
}
