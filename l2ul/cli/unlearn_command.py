"""From the options of main_unlearn.py to a model, data, runs and an experiment. Also used by the workers of a sweep."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import os
from pathlib import Path
import shlex
import sys
import time

import torch
from torch import Tensor

from l2ul import models
from l2ul.cli import options, push
from l2ul.cli.unlearn_options import PROGRAM
from l2ul.common import distributed, precision
from l2ul.common.cache import GIB, PREFIX, Cache
from l2ul.common.choices import AUTO, BF16, FULL
from l2ul.common.device import device_name
from l2ul.common.errors import Diverged, InputError
from l2ul.common.files import remove_parts, require_writable, tensors_sha256
from l2ul.common.installation import command
from l2ul.common.text import first_three
from l2ul.common.tracking import Trackers
from l2ul.data import forget_set
from l2ul.data.images import Images, Split, as_pixels
from l2ul.data.surrogate import Surrogate
from l2ul.experiments import model_card, records, time_estimates
from l2ul.experiments.execution import Experiment
from l2ul.experiments.measurement import Evaluator
from l2ul.experiments.reference_models import ReferenceModel, ReferenceModels
from l2ul.experiments.runs import Run, Setup
from l2ul.metrics import accuracy, preflight
from l2ul.metrics.registry import EVALUATIONS, METRICS_CODE
from l2ul.models import checkpoint, hub, outputs

ENDINGS = {  # what a status means
    "forgotten": "forgotten after {steps}",
    "cap": "not forgotten after {steps}",
    "diverged": "diverged after {steps}",
    "done": "done after {steps}",
    "failed": "failed",
}
ACCURACIES = {"acc_forget": "D_f", "acc_relabel": "relabelled", "acc_retain": "D_r", "acc_test": "D_test"}
CHANGES = {  # since a run was recorded, by the key of the record
    "own_code": "the files of your model or method have changed since; if that changes results, add --rerun",
    METRICS_CODE: "the files of your metrics have changed since; to measure them again, add --rerun",
    "data_sha256": "the images or labels of D_r or D_test have changed since; to do the runs again, add --rerun",
}
PRETRAINING = {  # script by data set; that of cifar10 for others
    "cifar10": "main_pretrain_cifar10_resnet18.py",
    "cifar100": "main_pretrain_cifar100_resnet50.py",
    "digits": "main_pretrain_digits_resnet20.py",
    "mnist": "main_pretrain_mnist_lenet.py",
    "fashion_mnist": "main_pretrain_mnist_lenet.py",
    "utkface": "main_pretrain_utkface_resnet18.py",
}
ABANDONED = 3600  # seconds after which a partly written file is taken for one of a process that was killed


def open_result_folders(opts: argparse.Namespace) -> None:
    """Create the folders of records, models and trackers; delete partly written files of killed processes in them."""
    needed = {"runs": True, "models": opts.save_model or opts.continual_step, "tracking": opts.tracker}
    for folder in (name for name, is_needed in needed.items() if is_needed):
        require_writable(opts.result_dir / folder)
        remove_parts(opts.result_dir / folder, older_than=time.time() - ABANDONED)


def open_cache(opts: argparse.Namespace) -> Cache:
    """Return the cache of adversarial examples and predictions, or one that keeps nothing if it cannot be written."""
    if opts.no_cache:
        return Cache()
    try:
        require_writable(opts.cache_dir)
    except InputError as error:
        print(f"nothing is cached: {error}")
        return Cache()
    remove_parts(opts.cache_dir, older_than=time.time() - ABANDONED, prefix=PREFIX)
    return Cache(opts.cache_dir, int(opts.cache_gib * GIB))


def open_trackers(opts: argparse.Namespace, report: Callable[[str], object]) -> Trackers:
    """Return the trackers of --tracker in the first process, and none in the others.

    report  called with a sentence about a tracker that failed
    """
    names = opts.tracker if distributed.is_first() and not opts.dry_run else ()
    return Trackers(names, opts.result_dir / "tracking", report)


def use_precision(opts: argparse.Namespace, device: torch.device) -> None:
    """Resolve --precision and --loop-precision for the device, except where `load_setup` has to measure them.

    Raises InputError if the device has no hardware for them.
    """
    opts.precision = precision.resolve(opts.precision, device)
    opts.loop_precision = precision.resolve_loop(opts.loop_precision, device)
    precision.use(device, "fp32" if opts.precision == AUTO else opts.precision)


def load_setup(
    opts: argparse.Namespace,
    device: torch.device,
    load_data: Callable[[argparse.Namespace], Images] | None = None,
) -> Setup:
    """Load the data set and the original model onto the device, and check that they fit each other.

    load_data  returns the data set of the options; None: it is read
    """
    models.check_name(opts.model)
    check_files(opts)
    label = options.data_label(opts)
    path = opts.checkpoint or checkpoint.find(label, opts.model, opts.data_dir)
    if path is None and opts.model in models.OWN:
        candidates = checkpoint.candidates(label, opts.model, opts.data_dir)
        raise InputError(
            f"no weights of {opts.model} for {label}: looked for {', '.join(map(str, candidates))}",
            models.TRAIN_OWN if models.is_of_user(opts.model) else f"train them with: {shlex.join(pretraining(opts))}",
            "name a file with --checkpoint",
        )
    images, surrogate = (load_data or options.load_data)(opts), None
    for note in images.notes:
        print(note)
    images = images.to(device)
    with distributed.local_first():  # the first process of a machine downloads weights, the others find them
        classifier = models.load(opts.model, images.num_classes, path, opts.mean, opts.std, opts.weights_key)
    if path and not opts.checkpoint:
        _check_found(path, classifier.metadata, {"dataset": images.name, "model": opts.model})
    classifier = classifier.to(device)
    for note in classifier.notes:
        print(note)
    if classifier.not_read:
        print(f"not read in {path or opts.model}: {', '.join(classifier.not_read)}")
    images = images.with_channels(classifier.channels)
    if opts.surrogate:
        surrogate, images = options.load_surrogate(opts, images)
    named = BF16 if opts.loop_precision == BF16 else opts.precision
    preflight.check_fit(classifier, images.train.images, images.num_classes, "fp32" if named == AUTO else named)
    if opts.precision == AUTO:
        opts.precision, sentence = preflight.fastest_precision(classifier, images.train.images, trains=False)
        print(f"--precision auto: {sentence}")
    if opts.loop_precision == AUTO:
        fastest, sentence = preflight.fastest_precision(classifier, images.train.images, trains=True)
        opts.loop_precision = BF16 if fastest == BF16 else FULL
        print(f"--loop-precision auto: {sentence}")
    sample = images.train.images[torch.arange(min(outputs.BATCH, len(images.train)))]
    sample = as_pixels(sample).to(device)
    if outputs.adapt(classifier, sample) == outputs.PROBABILITIES:
        print("the model returns probabilities; their logarithms are used as logits")
    if not opts.single_label:
        outputs.check_single_label(torch.cat(list(accuracy.logits(classifier, sample, fold=False))))
    preflight.check_trained_on(images, classifier.metadata, classifier.source)
    return make_setup(opts, images, classifier, Path(path).name if path else None, surrogate)


def _check_found(path: Path, metadata: Mapping[str, object], expected: Mapping[str, str]) -> None:
    """Raise InputError if weights that were found by their name are of another data set or model than `expected`.

    The file of the data set pets and the model big_x has the same name as that of pets_big and x.
    """
    other = next((name for name, value in expected.items() if metadata.get(name) not in (None, value)), None)
    if other:
        raise InputError(
            f"{path} has the weights of --{other} {metadata[other]}, not {expected[other]}",
            "name the file of the weights with --checkpoint",
        )


def pretraining(opts: argparse.Namespace) -> list[str]:
    """Return the command line that trains the original model of these options."""
    script, parser = PRETRAINING.get(opts.dataset, PRETRAINING["cifar10"]), options.Parser("")
    options.add_data(parser)
    others = parser.words(opts, ("dataset", "model"))
    return [*command(script), "--dataset", opts.dataset, "--model", opts.model, *others]


def check_files(opts: argparse.Namespace) -> None:
    """Raise InputError if a file or folder that the options name is missing: before data and weights are loaded."""
    if opts.checkpoint and not models.has_weights(opts.model, opts.checkpoint):
        checkpoint.require_file(Path(opts.checkpoint))
    retrained = [("--retrained", opts.retrained)] if opts.retrained else []
    for flag, path in (*retrained, *(("--references", path) for path in opts.references or ())):
        if not path.exists():
            raise InputError(f"there is no {path}", f"expected weights of a model trained without D_f for {flag}")
    if opts.forget_file:
        forget_set.check_forget_file(opts.forget_file)
    if opts.relabel_file:
        forget_set.read_integers(opts.relabel_file, "relabel")
    if opts.forget_dir:
        forget_set.open_folder(opts.forget_dir)


def make_setup(
    opts: argparse.Namespace,
    images: Images,
    classifier: models.Classifier,
    weights: str | None,
    surrogate: Surrogate | None = None,
) -> Setup:
    """Return what the runs of a command share.

    weights  name of the file that the model was read from
    """
    sample = opts.retain_sample
    return Setup(
        images,
        classifier,
        opts.goal,
        options.hyper_parameters(opts),
        opts.result_dir,
        sample if sample and sample < len(images.train) else None,
        surrogate,
        {
            "checkpoint": weights,
            "forget_dir": Path(os.path.abspath(opts.forget_dir)).name if opts.forget_dir else None,
            "relabel_file": opts.relabel_file.name if opts.relabel_file else None,
            **({"decoder": opts.decoder} if opts.decoder != "cpu" else {}),
        },
    )


def plan_runs(opts: argparse.Namespace, setup: Setup) -> list[Run]:
    """Return a run for each seed, k and method. For a continual run, each step is a run."""
    sizes, runs = opts.unlearn_k, []
    folder = _read_folder(opts, setup) if opts.forget_dir else None
    for seed in opts.seed:
        if folder:
            forget = forget_set.from_folder(*folder, opts.goal, seed, opts.forget_dir)
        else:
            forget = _choose_forget_set(opts, setup, seed)
        if sizes and max(sizes) > len(forget):
            source = opts.forget_file or opts.forget_dir
            raise InputError(f"--unlearn-k is {max(sizes)}, but {source} has {len(forget)} images to forget")
        if opts.continual_step and len(forget) % opts.continual_step and not sizes:
            raise InputError(
                f"--continual-step is {opts.continual_step} and there are {len(forget)} images to forget",
                "add --unlearn-k with a multiple of the step",
            )
        runs += setup.plan(opts.method, sizes or [len(forget)], seed, forget, opts.continual_step)
    return runs


def make_experiment(
    opts: argparse.Namespace,
    setup: Setup,
    runs: list[Run],
    device: torch.device,
    cache: Cache,
    trackers: Trackers | None = None,
    on_record: Callable[[dict[str, object]], object] = lambda record: None,
    report: Callable[[str], object] = lambda sentence: None,
) -> Experiment:
    """Return what carries out and measures these runs, after a check that this is possible.

    trackers   follow the runs
    on_record  called with the record of each run that was finished
    report     called with sentences about interrupted runs that are continued
    """
    side = setup.classifier.input_side(setup.images.side)
    test_batch_size = opts.test_batch_size or accuracy.default_batch_size(device, side)
    groups = tuple(EVALUATIONS[name] for name in dict.fromkeys(opts.evaluate))
    references = _load_reference_models(opts, setup, device)
    references.check(setup.classifier, runs)
    evaluator = Evaluator(setup, test_batch_size, opts.workers, cache, groups, references)
    for run in runs:
        evaluator.check(run)
    return Experiment(
        setup,
        evaluator,
        keep_models=opts.save_model,
        attack_batch_size=opts.attack_batch_size,
        cache=cache,
        cuda_graph=opts.cuda_graph == "auto",
        trackers=trackers or Trackers(),
        on_record=on_record,
        report=report,
    )


def announce(
    opts: argparse.Namespace, device: torch.device, runs: list[Run], to_do: list[Run], to_measure: list[Run]
) -> None:
    """Print what will run. In a dry run, print each run and the estimated time."""
    pairs = [(run.k, run.seed) for run in runs]
    sizes, seeds = (" ".join(map(str, dict.fromkeys(values))) for values in zip(*pairs, strict=True))
    print(
        f"{opts.dataset}, {opts.model}, {device_name(device)}: {' '.join(opts.method)}; k {sizes}, seed {seeds}; "
        f"goal {opts.goal}: {len(to_do)} run{'s' * (len(to_do) != 1)} to do, "
        f"{len(runs) - len(to_do) - len(to_measure)} done"
        + (f", {len(to_measure)} done that lack metrics" if to_measure else ""),
        flush=True,
    )
    if not opts.dry_run:
        return
    for run in runs:
        state = "measure" if run in to_measure else "done"
        if run in to_do:
            state = "resume" if run.files.state.exists() else "to do"
        step = f" step {run.settings['continual_step']}" if run.is_step else ""
        print(f"{state:7} {run.files.identity} {run.method.name:10} k = {run.k:<4} seed = {run.seed}{step}")
    if to_do:
        finished = records.read_folder(opts.result_dir)
        print(time_estimates.sentence([run.settings for run in to_do], finished, source=str(opts.result_dir)))


def notes_on_changes(changes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each key of CHANGES that has ids of runs on record, see `Experiment.changes`."""
    return [
        f"{len(changes[key])} of the runs on record ({first_three(changes[key])}): {sentence}"
        for key, sentence in CHANGES.items()
        if changes.get(key)
    ]


def check_writable(experiment: Experiment, runs: list[Run], uploads: bool = False) -> None:
    """Raise InputError unless the models that runs keep can be written and opened again: tried with the original one.

    uploads  whether the files of an upload are tried as well
    """
    run, original = next(filter(experiment.keeps, runs), None), experiment.setup.classifier
    if run is None or not distributed.is_first():
        return
    train = experiment.setup.images.train
    images = train.images[torch.arange(min(2, len(train)))].to(experiment.setup.device)
    with preflight.trial_write(original.name, run.files.model) as folder:
        path = folder / run.files.model.name
        models.save(original, path, run.settings)
        reopened = models.load_saved(path, original).to(experiment.setup.device)
        preflight.check_same_model(original, reopened, images)
        if uploads:
            (folder / "upload").mkdir()
            hub.write_files(folder / "upload", _opened_from(path, reopened), "", path.is_dir())


def _opened_from(path: Path, model: models.Classifier) -> models.Classifier:
    """Return a model that was read from `path`. Its library reads the configuration of a folder by the model's name."""
    if path.is_dir():
        model.name = f"{model.name.partition(':')[0]}:{path}"
    return model


def push_model(run: Run, setup: Setup, repository: hub.Repository) -> None:
    """Upload the saved model of a run. The same command uploads it again, as the run is not repeated."""
    if not run.files.model.exists():
        raise Diverged(f"the run diverged, so there is no model to upload; see {run.files.record}")
    model = _opened_from(run.files.model, models.load_saved(run.files.model, setup.classifier))
    digest, is_folder = tensors_sha256(model.net.state_dict()), run.files.model.is_dir()
    card = model_card.of_record(run.files.read(), setup.images.num_classes, digest, is_folder).text()
    push.push(PROGRAM, run.files.model, model, card, repository, push.command_line(PROGRAM, sys.argv[1:]))


def print_run(record: dict[str, object]) -> None:
    """Print the line of a finished run."""
    print_now(run_line(record))


def print_now(text: str) -> None:
    """Print a text at once, also to a log file."""
    print(text, flush=True)


def run_line(record: dict[str, object]) -> str:
    """Return time of day, method, k, seed, status, steps, accuracies in percent and seconds of a record.

    12:03:41  adv_imp  k 16  seed 0  forgotten after 29 steps  D_f 0.00  D_r 24.40  D_test 20.61  8.1 s
    """
    parts = [time.strftime("%H:%M:%S"), f"{record['method']:7}", f"k {record['k']:<3}", f"seed {record['seed']}"]
    parts += [f"step {record['continual_step']}"] if record["continual_step"] else []
    is_unchanged = record["status"] == "done" and not record["steps"]  # method `before`
    steps = f"{record['steps']} step{'s' * (record['steps'] != 1)}"
    ending = "not changed" if is_unchanged else ENDINGS[record["status"]].format(steps=steps)
    if record.get("robust") and record["status"] == "forgotten":  # which the run checks in changed copies alone
        ending += ", at least 95 % also in changed copies"
    elif record.get("robust"):  # D_f as stored may be forgotten before changed copies are
        ending = ending.replace("forgotten", "forgotten as used")
    parts += [ending]
    parts += [f"{name} {record[key]:.2f}" for key, name in ACCURACIES.items() if record.get(key) is not None]
    seconds = sum(value for key, value in record.items() if key.startswith("seconds_") and value)
    return "  ".join([*parts, f"{seconds:.1f} s"])


def divergence_note(results: Iterable[dict[str, object]]) -> str | None:
    """Return a sentence on what to change if any of the records is of a run that diverged."""
    diverged = list(dict.fromkeys(record["method"] for record in results if record["status"] == "diverged"))
    if not diverged:
        return None
    others = "" if diverged == ["distill"] else ", or choose distill: -CE, the loss of neggrad, has no lower bound"
    return f"{', '.join(diverged)}: the loss or the outputs are no longer finite; lower the learning rate{others}"


def _load_reference_models(opts: argparse.Namespace, setup: Setup, device: torch.device) -> ReferenceModels:
    """Load the models of --retrained and --references onto the device."""

    def load(path: Path) -> ReferenceModel:
        if path.is_dir():  # of a Hugging Face model
            model = models.load_saved(path, setup.classifier)
        else:
            try:
                model = models.load(opts.model, setup.images.num_classes, path, opts.mean, opts.std)
            except InputError as error:  # --weights-key is that of --checkpoint
                instead = "give files with one set of weights as --retrained and --references"
                raise error.without(("--checkpoint", "--weights-key"), instead) from None
            model.outputs = setup.classifier.outputs
        preflight.check_trained_on(setup.images, model.metadata, str(path))
        # a file of a main_pretrain script that names no excluded images was trained on all of them
        excluded = model.metadata.get("excluded", [] if "epochs" in model.metadata else None)
        is_known = isinstance(excluded, list) and all(type(index) is int for index in excluded)
        indices = torch.tensor(excluded, dtype=torch.int64) if is_known else None
        return ReferenceModel(model.to(device), model.sha256, str(path), indices)

    references = [load(path) for path in opts.references or ()]
    return ReferenceModels(load(opts.retrained) if opts.retrained else None, tuple(references))


def _read_folder(opts: argparse.Namespace, setup: Setup) -> tuple[Split, Tensor]:
    """Return the images of --forget-dir with the classes of their folders, and the model's predictions for them."""
    reader = options.image_reader(opts)
    split = forget_set.read_folder(opts.forget_dir, setup.images, reader)
    for note in reader.examine(split.images.files, split.images.short_side):
        print(f"{opts.forget_dir}: {note}")
    return split, accuracy.predict(
        setup.classifier, split.images, batch_size=opts.test_batch_size, workers=opts.workers
    )


def _choose_forget_set(opts: argparse.Namespace, setup: Setup, seed: int) -> forget_set.ForgetSet:
    """Return D_f of a seed, from the training images, with new labels if the goal is to relabel."""
    train, num_classes = setup.images.train, setup.images.num_classes
    if opts.forget_file:
        indices = forget_set.read_forget(opts.forget_file, len(train), forget_set.files_of(train))
    else:
        indices = forget_set.choose_forget(len(train), max(opts.unlearn_k), seed)
    labels, new_labels = train.labels[indices].cpu(), None
    if opts.relabel_file:
        new_labels = forget_set.read_new_labels(opts.relabel_file, labels, num_classes)
    elif opts.goal == "relabel":
        new_labels = forget_set.random_new_labels(labels, num_classes, seed)
    return forget_set.ForgetSet(train, indices, new_labels)
