"""Draw all figures of a data set, model and goal. Data and models are loaded when a figure needs them.

Figures 1 and 6 need records alone, figure 7 the curves beside them. Figure 3 needs the predictions beside the records,
and figures 2 to 5 the data set. Figures 4 and 5 need unlearned models that main_unlearn.py saved with --save-model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
import contextlib
from dataclasses import dataclass, field
import functools
import hashlib
import io
import itertools
import json
import math
from pathlib import Path
import re

from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import torch

from l2ul import attack, models
from l2ul.common import device as devices
from l2ul.common import precision as precisions
from l2ul.common import seeds
from l2ul.common.choices import HUB_OPTIONS
from l2ul.common.errors import InputError
from l2ul.common.files import file_sha256
from l2ul.common.offline import offline
from l2ul.common.progress import progress_bar
from l2ul.common.text import in_file_name, read_text
from l2ul.data import datasets, forget_set, storage, surrogate
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images, as_pixels
from l2ul.experiments.records import Record
from l2ul.metrics import accuracy, features
from l2ul.models import checkpoint
from l2ul.reporting import FIGURES, figure_data, figures, read_records, rows

Drawn = tuple[Figure, pd.DataFrame]  # a figure and the numbers that it shows
Report = Callable[[str], object]
MOST_METHODS = 4  # in figures 3 to 5, unless methods are named
SHOWN_IMAGES, SHOWN_EXAMPLES = 4, 3  # of figure 2
DOWNLOADED = "could not be downloaded"  # in messages of `models.load`
LONGEST = 160  # bytes of the beginning of a file name
FLAGS_OF_RUNS = {  # which decide how data and models are read; main_tables.py lacks them
    *("--image-size", "--image-column", "--label-column", "--train-split", "--test-split", "--weights-key"),
    *("--mean", "--std", "--exif-orientation", "--white-level", "--max-image-pixels"),
}
DATA_KEYS = ("image_size", "age_grouping", "split_seed", *HUB_OPTIONS)  # keys of a record to load its data set with


@dataclass(frozen=True)
class FigureOptions:
    """Inputs of the figures, and the runs that figures 2 to 5 and 7 show.

    data_dir    folder with data sets and weights
    download    whether data sets and weights that records name may be downloaded
    checkpoint  original weights, by default the file that main_unlearn.py finds
    device      "cuda", "mps" or "cpu", by default the best available one
    k           size of D_f, by default the largest recorded one (figure 7: the smallest of each method)
    seed        seed of D_f, by default the smallest recorded one
    methods     methods of figures 3 to 5, by default up to MOST_METHODS for which the inputs exist, and of figure 7, by
                default all
    samples     images of D_r and of D_test in figures 4 and 5
    runs        runs of figure 7, in place of k, seed and methods: names of record files without .json, or their
                beginnings
    """

    data_dir: Path = Path("data")
    download: bool = False
    checkpoint: str | None = None
    device: str | None = None
    k: int | None = None
    seed: int | None = None
    methods: list[str] | None = None
    samples: int = 500
    runs: list[str] | None = None


def draw(
    records: Iterable[Record],
    numbers: Iterable[int],
    output_dir: Path,
    options: FigureOptions,
    report: Report = print,
) -> list[Path]:
    """Draw figures for each data set, model and goal of the records. Runs of continual deletions are left out.

    records     records from `read_records.read`
    numbers     which figures, keys of FIGURES
    output_dir  folder for a PNG, a PDF and a CSV of each figure
    options     inputs of the figures
    report      called with a sentence for each figure that cannot be drawn, or not completely

    Returns the paths of the files.
    """
    records = [record for record in records if record["continual_step"] is None]
    if options.checkpoint and not any(models.has_weights(run["model"], options.checkpoint) for run in records):
        checkpoint.require_file(Path(options.checkpoint))
    for name in options.runs or ():
        if not any(_run_id(run).startswith(name) for run in records):
            raise InputError(
                f"no record has a name that begins with {name!r}",
                "expected the name of a selected record file, without .json, of a run that is not continual",
            )
    paths = []
    for block in rows.blocks(records):
        subject, left_out = Subject(options, block, report), defaultdict(list)
        for number in sorted(set(numbers)):
            try:
                figure, shown = DRAW[number](subject)
            except InputError as error:
                left_out[str(error.without(FLAGS_OF_RUNS))].append(number)
                continue
            paths += figures.save(figure, shown, Path(output_dir) / stem(block, number), report)
        for reason, some in left_out.items():
            which = f"figure{'s' * (len(some) > 1)} {', '.join(map(str, some))}"
            report(f"{subject.name}: {which} {'were' if len(some) > 1 else 'was'} left out: {reason}")
    return paths


def _run_id(run: Record) -> str:
    return figure_data.path_of(run, "").name


def load_images(run: Record, data_dir: Path, download: bool = False) -> Images:
    """Load the data set of a run, with the channels that its model takes and without surrogate images.

    Raises InputError if it is not in `data_dir`, or another one is.
    """
    chosen = {key: run[key] for key in DATA_KEYS if run.get(key) is not None}
    reader = ImageReader(**{key: run[key] for key in ImageReader().options if run.get(key) is not None})
    try:
        images = datasets.load(
            run["dataset"], data_dir, download=download, progress=progress_bar, reader=reader, **chosen
        )
    except InputError as error:
        raise error.without(FLAGS_OF_RUNS) from None
    if run.get("num_train") not in (None, len(images.train)):
        raise InputError(
            f"{run['dataset']} has {len(images.train)} training images, but the records are of a training set of "
            f"{run['num_train']}",
            "name the folder of that one with --data-dir",
        )
    if run.get("num_test") not in (None, len(images.test)):
        images = surrogate.without_part(images, run.get("surrogate") or run.get("test_without"))
    return images.with_channels(len((run.get("mean") or "R G B").split()))


def stem(block: rows.Block, number: int) -> str:
    """Return the name of the files of a figure, without a suffix."""
    return f"{subject_name(block)}_{number}_{FIGURES[number]}"


def subject_name(block: rows.Block) -> str:
    """Return the prefix of the names of the files of a block's figures: its parts with _ between them.

    A hash follows where the name would not tell them apart, as for the data set `pets_big` with the model `x`, whose
    name would be that of `pets` with `big_x`.
    """
    parts = [block.dataset, block.age_grouping, block.model, "relabel" if block.goal == "relabel" else None]
    whole = "_".join(in_file_name(part) for part in parts if part)
    name = re.sub(r'[<>:"/\\|?*]', "_", whole).encode()[:LONGEST].decode(errors="ignore")
    is_clear = name == whole and ("_" not in block.dataset or block.dataset == "fashion_mnist")
    return name if is_clear else f"{name}_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Subject:
    """The runs of one data set, model and goal, with the data and models that figures need."""

    options: FigureOptions
    block: rows.Block
    report: Report = field(default=print)
    _images: dict[tuple, Images] = field(default_factory=dict)  # by what decides the data set

    @property
    def name(self) -> str:
        """Prefix of the file names."""
        return subject_name(self.block)

    @functools.cached_property
    def device(self) -> torch.device:
        device = devices.choose_device(self.options.device)
        precisions.use(device, "fp32")  # of all figures but the attack of figure 2
        return device

    def images(self, run: Record) -> Images:
        """Return the data set of a run. Runs of a block can differ in options that decide it, such as the split."""
        names = *DATA_KEYS, *ImageReader().options, "num_train", "num_test", "surrogate", "test_without", "mean"
        key = tuple(run.get(name) for name in names)
        if key not in self._images:
            self._images[key] = load_images(run, self.options.data_dir, self.options.download)
        return self._images[key]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Load models inside the block. Their names come from records, so nothing is downloaded without permission."""
        if self.options.download:
            yield
            return
        try:
            with offline(), contextlib.redirect_stdout(io.StringIO()):  # torch.hub prints that it downloads
                yield
        except InputError as error:
            allow = ("add --download to allow it",) if DOWNLOADED in error.problem else ()
            raise InputError(error.problem, *error.advice, *allow) from None

    def original(self, run: Record) -> models.Classifier:
        """Load the original model of a run."""
        named = self.options.checkpoint
        usual = checkpoint.find(self.block.data_label, run["model"], self.options.data_dir)
        files = [Path(path) for path in (named, usual) if path and Path(path).is_file()]
        same = (path for path in files if file_sha256(path) == run["checkpoint_sha256"])
        statistics = [[float(value) for value in (run.get(key) or "").split()] or None for key in ("mean", "std")]
        with self.reading():
            model = models.load(run["model"], self.images(run).num_classes, next(same, named), *statistics)
        model = model.to(self.device)
        if model.sha256 != run["checkpoint_sha256"]:
            raise InputError(
                f"{model.source} does not hold the original weights of the runs (SHA-256 "
                f"{run['checkpoint_sha256'][:12]}…)",
                "name the file of those with --checkpoint",
            )
        return model

    def unlearned(self, run: Record) -> models.Classifier:
        """Load the unlearned model of a run."""
        original = self.original(run)
        with self.reading():
            return models.load_saved(figure_data.saved_model(run), original).to(self.device)

    def runs(self, is_usable: Callable[[Record], bool], needed: str, remedy: str) -> list[Record]:
        """Return usable runs on one D_f, one for each method.

        is_usable       whether the inputs of a figure exist for a run
        needed, remedy  names these inputs, and the command that makes them, in the message of an InputError

        Raises InputError if no run is usable.
        """
        usable = self.usable(is_usable, needed, remedy)
        return figure_data.on_one_forget_set(usable, None if self.options.methods else MOST_METHODS)

    def usable(self, is_usable: Callable[[Record], bool], needed: str, remedy: str) -> list[Record]:
        """Return all usable runs of the chosen k, seed and methods; see `runs`."""
        chosen = {"k": self.options.k, "seed": self.options.seed}
        methods = self.options.methods
        usable = [
            run
            for run in self.block.records
            if run["method"] != "before"
            and (not methods or run["method"] in methods)
            and all(value in (None, run[key]) for key, value in chosen.items())
            and is_usable(run)
        ]
        if not usable:
            words = [f"{key} {value}" for key, value in chosen.items() if value is not None] + (methods or [])
            raise InputError(f"no {needed} beside the records{' of ' if words else ''}{', '.join(words)}", remedy)
        return usable

    def runs_with_models(self) -> list[Record]:
        return self.runs(
            lambda run: figure_data.saved_model(run).exists(), "saved models", "run main_unlearn.py with --save-model"
        )

    def models(self, runs: list[Record]) -> Iterator[tuple[str, models.Classifier]]:
        """Yield method and unlearned model of each run, so that one model is held at a time."""
        return ((run["method"], self.unlearned(run)) for run in runs)

    def forget(self, run: Record) -> torch.Tensor:
        """Read the indices (k,) of the D_f of a run."""
        try:
            indices = np.array(read_text(Path(run["forget_file"]), read_records.MOST_BYTES).split(), dtype=np.int64)
        except (OSError, ValueError, OverflowError):
            indices = np.empty(0)
        if len(indices) != run["k"] or not 0 <= indices.min() <= indices.max() < (run.get("num_train") or math.inf):
            raise InputError(
                f"{run['forget_file']} does not hold {run['k']} indices of training images, which the figure shows"
            )
        return torch.from_numpy(indices)

    def sample(self, run: Record, split: str, among: torch.Tensor) -> torch.Tensor:
        """Return the indices that a figure shows of a split, drawn from `among` and in its order."""
        drawn = seeds.stream(run["seed"], f"figure {split}").permutation(len(among))[: self.options.samples]
        return among[torch.from_numpy(drawn).sort().values]

    def title(self, runs: list[Record]) -> str:
        sizes = " ".join(f"{k}" for k in sorted({run["k"] for run in runs}))
        draws = " ".join(f"{seed}" for seed in sorted({run["seed"] for run in runs}))
        return f"{self.block.label}, {self.block.goal}, k = {sizes}, seed {draws}"


def accuracy_against_k(subject: Subject) -> Drawn:
    """Draw figure 1."""
    runs = [run for run in subject.block.records if run["method"] != "before"]
    shown = figure_data.usual(runs)
    shown = list(filter(rows.has_usual_data, shown)) or shown  # others have another "before"
    table = figure_data.accuracies(shown)
    if len(runs) > len(shown):
        number = len(runs) - len(shown)
        subject.report(
            f"{subject.name}: figure 1 shows one row of settings for each method; {number} "
            f"{'runs with other settings are' if number > 1 else 'run with other settings is'} left out"
        )
    most = int(table["runs"][table["method"] != "before"].max())
    note = f"mean ± standard deviation of up to {most} seeds" if most > 1 else "one seed"
    title = f"{subject.block.label}, {subject.block.goal}; {note}"
    sizes = [None if np.isnan(k) else int(k) for k in table["k"]]  # numbers above 2^53 do not fit pandas' Int64
    return figures.accuracy_against_k(table, title), table.assign(k=pd.Series(sizes, table.index, object))


def ablations(subject: Subject) -> Drawn:
    """Draw figure 6."""
    block = subject.block
    table = figure_data.ablations(block.records, subject.options.k)
    return figures.ablations(table, f"{block.label}, {block.goal}, k = {table['k'].iloc[0]}"), table


def adversarial_examples(subject: Subject) -> Drawn:
    """Draw figure 2.

    Targets and starts depend on seed, position in D_f and draw only. The examples shown are therefore the first ones of
    the run's own D_adv, up to rounding that depends on the batch size and the device. If the device has no hardware for
    the precision of the run, the examples are made in fp32.
    """
    run = subject.runs(
        lambda run: run.get("num_adv_images") and Path(run["forget_file"]).is_file(),
        "list of D_f of a method with adversarial examples",
        "run main_unlearn.py --method adv",
    )[0]
    indices = subject.forget(run)[:SHOWN_IMAGES]
    images = subject.images(run)
    chosen = images.train.subset(indices)
    pixels, labels = chosen.pixels().to(subject.device), chosen.labels.to(subject.device)
    precision = run.get("precision") or "fp32"
    if not precisions.is_supported(subject.device, precision):
        subject.report(
            f"{subject.name}: figure 2 is made in fp32, as {subject.device.type} does not compute in {precision}, the "
            f"precision of the run"
        )
        precision = "fp32"
    model, draws = subject.original(run), min(SHOWN_EXAMPLES, run["num_adv_images"])
    with (
        precisions.temporarily(subject.device, precision),
        progress_bar("figure 2: attack, PGD steps", len(pixels) * draws * run["pgd_iter"]) as advance,
    ):
        made, targets = attack.adversarial_set(
            model,
            pixels,
            labels,
            images.num_classes,
            num_adv_images=draws,
            eps=run["pgd_eps"],
            alpha=run["pgd_alpha"],
            steps=run["pgd_iter"],
            seed=run["seed"],
            batch_size=run.get("attack_batch_size"),
            precision=precision,
            progress=advance,
        )
    made = storage.as_stored(made, storage.DTYPES[run.get("adv_dtype") or "float32"])
    names, owners = np.array(images.classes), torch.arange(len(pixels)).repeat_interleave(draws)
    originals, examples = _array(pixels), _array(made)
    classes = {"index": indices[owners], "label": names[chosen.labels[owners]], "target": names[targets.cpu()]}
    numbers = pd.DataFrame(classes | {"prediction": names[accuracy.predict(model, made)]})
    numbers["norm"] = np.linalg.norm((examples - originals[owners]).reshape(len(owners), -1), axis=1)
    title = f"{subject.title([run])}, ε = {run['pgd_eps']:g}: image, example → target, its enlarged δ"
    return figures.adversarial_examples(originals, examples, numbers, title), numbers


def _array(images: torch.Tensor) -> np.ndarray:
    """Return images as an array (N, H, W, 3) of floats in [0,1]."""
    return as_pixels(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def new_classes(subject: Subject) -> Drawn:
    """Draw figure 3."""
    runs = subject.runs(_has_predictions, "predictions", "run main_unlearn.py")
    files = [figure_data.predictions(figure_data.path_of(run, ".npz")) for run in runs]
    predicted = {
        f"predictions of {run['method']}": classes["forget_after"] for run, classes in zip(runs, files, strict=True)
    }
    try:
        images = subject.images(runs[0])
        labels, names = images.train.labels[subject.forget(runs[0])], images.classes
    except InputError as error:
        subject.report(
            f"{subject.name}: figure 3 shows no targets, and predictions of the original model in place of true "
            f"classes: {error}"
        )
        known = [part for classes in files for name, part in classes.items() if name.endswith(("_before", "_after"))]
        names = [str(number) for number in range(1 + max(int(part.max(initial=0)) for part in known))]
        matrices = figure_data.confusion_matrices(files[0]["forget_before"], predicted, names)
    else:
        draws = next((run["num_adv_images"] for run in runs if run.get("num_adv_images")), None)
        if draws:
            targets = attack.random_targets(labels, len(names), draws, runs[0]["seed"])
            predicted["adversarial targets"] = targets.numpy()
        matrices = figure_data.confusion_matrices(labels.numpy(), predicted, names)
    return figures.confusions(matrices, subject.title(runs)), figure_data.counts(matrices)


def _has_predictions(run: Record) -> bool:
    """Return whether there are predictions before and after for each image of D_f."""
    path, names = figure_data.path_of(run, ".npz"), ("forget_before", "forget_after")
    return path.is_file() and [len(part) for part in figure_data.predictions(path, names).values()] == [run["k"]] * 2


def layer_similarity(subject: Subject) -> Drawn:
    """Draw figure 4."""
    runs = subject.runs_with_models()
    images, forget = subject.images(runs[0]), subject.forget(runs[0])
    train, test = images.train, images.test
    retain = subject.sample(runs[0], "retain", forget_set.complement(forget, len(train)))
    splits = {
        "forget": train.subset(forget).images,
        "retain": train.subset(retain).images,
        "test": test.subset(subject.sample(runs[0], "test", torch.arange(len(test)))).images,
    }
    with progress_bar("figure 4: features", len(splits) * (1 + len(runs))) as advance:
        table = features.similarity(subject.original(runs[0]), subject.models(runs), splits, advance)
    return figures.similarity(table, subject.title(runs)), table


def feature_maps(subject: Subject) -> Drawn:
    """Draw figure 5."""
    runs = subject.runs_with_models()
    images, forget = subject.images(runs[0]), subject.forget(runs[0])
    test = subject.sample(runs[0], "test", torch.arange(len(images.test)))
    parts = {"forget": images.train.subset(forget), "test": images.test.subset(test)}
    compared = itertools.chain([("before", subject.original(runs[0]))], subject.models(runs))
    with progress_bar("figure 5: features and t-SNE", 1 + len(runs)) as advance:
        table = features.maps(compared, {name: part.images for name, part in parts.items()}, runs[0]["seed"], advance)
    labels = torch.cat([part.labels for part in parts.values()]).numpy()
    classes = figure_data.coloured_classes(labels, parts["forget"].labels.numpy(), images.classes)
    table.insert(2, "index", np.tile(torch.cat([forget, test]), 1 + len(runs)))
    table.insert(3, "class", np.tile(classes, 1 + len(runs)))
    return figures.maps(table, images.classes, subject.title(runs)), table


def curves(subject: Subject) -> Drawn:
    """Draw figure 7."""
    if subject.options.runs:
        runs = [run for run in subject.block.records if _run_id(run).startswith(tuple(subject.options.runs))]
        if not runs:
            raise InputError("none of the runs of --figure-runs has this data set, model and goal")
    else:
        runs = figure_data.first_of_each_method(subject.usable(_has_curve, "curves", "run main_unlearn.py"))
    table = figure_data.curves(runs)
    return figures.curves(table, subject.title(runs)), table


def _has_curve(run: Record) -> bool:
    path = figure_data.path_of(run, ".csv")
    return path.is_file() and len(figure_data.curve(path)) > 0


DRAW: dict[int, Callable[[Subject], Drawn]] = {
    1: accuracy_against_k,
    2: adversarial_examples,
    3: new_classes,
    4: layer_similarity,
    5: feature_maps,
    6: ablations,
    7: curves,
}
