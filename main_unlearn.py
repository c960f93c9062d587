"""Make a trained image classifier forget single training images, and measure what that costs.

    python main_unlearn.py                                     # the embedded digits
    python main_unlearn.py --dataset cifar10 --model resnet20 --checkpoint resnet20.th --unlearn-k 16 --seed 0 1 2
    torchrun --nproc-per-node 8 main_unlearn.py --dataset imagenet --unlearn-k 64    # attack and measure on all GPUs

For every seed, k and method: load → attack → weigh → unlearn → measure → record. A run whose record is in
result_data/runs is not done again. What the commands gave when last measured: README.md, "Measured".
"""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse
import functools
from pathlib import Path
import time

import torch
from torch import Tensor

from l2ul import attack
from l2ul.cli import exit_codes, options
from l2ul.cli.run_line import run_line
from l2ul.common import device as device_module
from l2ul.common import distributed, precision
from l2ul.common.cache import GIB, PREFIX, Cache
from l2ul.common.errors import InputError
from l2ul.common.files import remove_parts, require_writable
from l2ul.data import folder as streaming
from l2ul.data import forget_set
from l2ul.data.images import Images, Split
from l2ul.experiments import records, torchrun
from l2ul.experiments.execution import Experiment
from l2ul.experiments.measurement import Measuring
from l2ul.experiments.reference_models import Peer, Peers
from l2ul.experiments.runs import HYPER_PARAMETERS, Run, Setup
from l2ul.methods import registry
from l2ul.metrics import accuracy
from l2ul.metrics.groups import EVALUATIONS
import models
from models import checkpoint

PROGRAM = "main_unlearn.py"


@exit_codes.clean_exit(PROGRAM, shared=True)
def main() -> None:
    opts = parse()
    with distributed.process_group():
        unlearn(opts)


def unlearn(opts: argparse.Namespace) -> None:
    """Do the runs of a command that have no record yet, and print the table of all."""
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    precision.use(device, opts.precision)
    streaming.check_decoder(opts.decoder, device)
    cache = Cache()
    if distributed.is_first():
        open_results(opts)
        cache = open_cache(opts)
    setup = load(opts, device)
    runs = plan(opts, setup)
    experiment = prepare(opts, setup, runs, device, cache)
    if distributed.is_first():
        carry_out(opts, device, experiment, runs)
        distributed.call_others(None)
    else:
        torchrun.assist(experiment.measuring)


def carry_out(opts: argparse.Namespace, device, experiment: Experiment, runs: list[Run]) -> None:
    """Do and record what is not on record yet, or for a dry run list it."""
    pending, to_measure = to_do(opts, experiment, runs)
    announce(opts, device, runs, pending, to_measure)
    if opts.dry_run:
        return
    experiment.measure(to_measure)
    experiment.carry_out(pending)
    print(records.table([run.files.read() for run in runs]).to_string(index=False))
    print(f"records: {opts.result_dir / 'runs'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; whatever can be judged without data or weights is judged here."""
    parser = options.Parser(__doc__.split("\n")[0], prog=PROGRAM)
    for add in (*options.RUN_GROUPS, options.add_weights, options.add_machine):
        add(parser)
    opts = parser.parse_args(argv)
    options.fill_defaults(opts)
    for name in opts.method:
        registry.get(name, opts.goal)
    models.check_name(opts.model)
    if opts.unlearn_k and min(opts.unlearn_k) < 1:
        raise InputError(f"--unlearn-k is {min(opts.unlearn_k)}; expected 1 or more images to forget")
    check_forget(opts)
    check_evaluations(opts)
    return opts


def check_forget(opts: argparse.Namespace) -> None:
    """Raise InputError where the options about D_f contradict each other."""
    if opts.relabel_file and opts.goal != "relabel":
        raise InputError("--relabel-file is given but the goal is misclassify; add --goal relabel")
    if opts.relabel_file and not opts.forget_file and len(opts.seed) > 1:
        raise InputError("--relabel-file fits one D_f, but each of several seeds chooses another; add --forget-file")
    if opts.forget_dir and (opts.forget_file or opts.relabel_file):
        raise InputError("--forget-dir names images and their classes; leave out --forget-file and --relabel-file")
    step = opts.continual_step
    if step and opts.unlearn_k and (len(opts.unlearn_k) > 1 or opts.unlearn_k[0] % step):
        raise InputError(
            f"--continual-step is {step} and --unlearn-k is {' '.join(map(str, opts.unlearn_k))}; "
            f"expected one multiple of the step, such as {4 * step}"
        )


def check_evaluations(opts: argparse.Namespace) -> None:
    """Raise InputError where a group of metrics lacks the nets that all of it needs, or nets are given to no end."""
    for flag, given in (("retrained", opts.retrained), ("references", opts.references)):
        needs = {
            name: [group.against.get(metric) == f"{flag}_sha256" for metric in group.names]
            for name, group in EVALUATIONS.items()
        }
        lacking = [name for name in opts.evaluate if all(needs[name]) and not given]
        if lacking:
            raise InputError(
                f"--evaluate {lacking[0]} compares with nets trained without D_f; name what a main_pretrain script "
                f"trained with --exclude by --{flag}"
            )
        if given and not any(any(needs[name]) for name in opts.evaluate):
            use = " or ".join(f"--evaluate {name}" for name, whether in needs.items() if any(whether))
            raise InputError(f"--{flag} is given, but nothing is measured against it; add {use}")


def open_results(opts: argparse.Namespace) -> None:
    """The folders that results go to, without what killed processes left there."""
    for folder in ("runs", "models") if opts.save_model or opts.continual_step else ("runs",):
        require_writable(opts.result_dir / folder)
        remove_parts(opts.result_dir / folder, older_than=time.time() - 3600)


def open_cache(opts: argparse.Namespace) -> Cache:
    """Where results that would come out the same again are kept; nowhere where that folder cannot be written to."""
    if opts.no_cache:
        return Cache()
    try:
        require_writable(opts.cache_dir)
    except InputError as error:
        print(f"nothing is cached: {error}")
        return Cache()
    remove_parts(opts.cache_dir, older_than=time.time() - 3600, prefix=PREFIX)
    return Cache(opts.cache_dir, int(opts.cache_gib * GIB))


def load(opts: argparse.Namespace, device, images: Images | None = None) -> Setup:
    """Data set (or `images`, which are it) and classifier on the device, after a look whether they fit each other."""
    label = options.data_label(opts)
    path = opts.checkpoint or checkpoint.find(label, opts.model, opts.data_dir)
    if path is None and opts.model in models.OWN:
        tried = checkpoint.candidates(label, opts.model, opts.data_dir)
        raise InputError(
            f"no weights of {opts.model} for {label}: looked for {tried[0]} and {tried[2]}; "
            f"train them with a main_pretrain script or name a file with --checkpoint"
        )
    images = images or options.load_data(opts)
    for note in images.notes:
        print(note)
    images = images.to(device)
    with distributed.local_first():  # which may download them
        classifier = models.load(opts.model, images.num_classes, path, opts.mean, opts.std).to(device)
    accuracy.check_fit(classifier, images.train.images, images.num_classes)
    accuracy.check_trained_on(images, told_by(classifier), classifier.source)
    return set_up(opts, images, classifier, Path(path).name if path else None)


def set_up(opts: argparse.Namespace, images: Images, classifier: models.Classifier, weights: str | None) -> Setup:
    """What the runs of a command share, with data set and classifier (of a file of that name) as they are."""
    sample = opts.retain_sample
    return Setup(
        images,
        classifier,
        opts.goal,
        {name: getattr(opts, name) for name in HYPER_PARAMETERS},
        opts.result_dir,
        sample if sample and sample < len(images.train) else None,
        {
            "checkpoint": weights,
            "forget_dir": opts.forget_dir.name if opts.forget_dir else None,
            **({"decoder": opts.decoder} if opts.decoder != "cpu" else {}),
        },
        models.saved_suffix(classifier),
    )


def told_by(classifier: models.Classifier) -> dict[str, object]:
    """What the file of its weights tells of a classifier."""
    return {name: checkpoint.metadata_value(classifier.metadata, name) for name in classifier.metadata}


def load_peers(opts: argparse.Namespace, setup: Setup, device) -> Peers:
    """The nets of --retrained and --references, on the device."""

    def load_peer(flag: str, path: Path) -> Peer:
        if not path.exists():
            raise InputError(f"there is no {path}; name with {flag} the weights of a net that was trained without D_f")
        if path.is_dir():  # of a Hugging Face net
            net = models.load_saved(path, setup.classifier)
        else:
            net = models.load(opts.model, setup.images.num_classes, path, opts.mean, opts.std)
        told = told_by(net)
        accuracy.check_trained_on(setup.images, told, str(path))
        excluded = told.get("excluded", [] if "epochs" in told else None)  # pretrained here on every image, or not told
        known = isinstance(excluded, list) and all(type(index) is int for index in excluded)
        return Peer(net.to(device), net.sha256, str(path), torch.tensor(excluded, dtype=torch.int64) if known else None)

    references = [load_peer("--references", path) for path in opts.references or ()]
    return Peers(load_peer("--retrained", opts.retrained) if opts.retrained else None, tuple(references))


def plan(opts: argparse.Namespace, setup: Setup) -> list[Run]:
    """Every run that was asked for, seed by seed and k by k."""
    sizes, runs = opts.unlearn_k, []
    folder = read_folder(opts, setup) if opts.forget_dir else None
    for seed in opts.seed:
        if folder:
            forget = forget_set.from_folder(*folder, opts.goal, seed, opts.forget_dir)
        else:
            forget = choose(opts, setup, seed)
        if sizes and max(sizes) > len(forget):
            where = opts.forget_file or opts.forget_dir
            raise InputError(f"--unlearn-k is {max(sizes)}, but {where} has {len(forget)} images to forget")
        if opts.continual_step and len(forget) % opts.continual_step and not sizes:
            raise InputError(
                f"--continual-step is {opts.continual_step} and there are {len(forget)} images to forget; "
                f"add --unlearn-k with a multiple of the step"
            )
        runs += setup.plan(opts.method, sizes or [len(forget)], seed, forget, opts.continual_step)
    return runs


def read_folder(opts: argparse.Namespace, setup: Setup) -> tuple[Split, Tensor]:
    """The images of --forget-dir with their folders' classes, and what the classifier calls them."""
    found = forget_set.read_folder(opts.forget_dir, setup.images)
    called = accuracy.predict(setup.classifier, found.images, batch_size=opts.test_batch_size, workers=opts.workers)
    return found, called


def choose(opts: argparse.Namespace, setup: Setup, seed: int) -> forget_set.ForgetSet:
    """D_f of a seed from the training images, and what they are to be called, to relabel."""
    train, num_classes = setup.images.train, setup.images.num_classes
    if opts.forget_file:
        indices = forget_set.read_forget(opts.forget_file, len(train))
    else:
        indices = forget_set.choose_forget(len(train), max(opts.unlearn_k), seed)
    true, new = train.labels[indices].cpu(), None
    if opts.relabel_file:
        new = forget_set.read_new_labels(opts.relabel_file, true, num_classes)
    elif opts.goal == "relabel":
        new = forget_set.random_new_labels(true, num_classes, seed)
    return forget_set.ForgetSet(train, indices, new)


def prepare(opts: argparse.Namespace, setup: Setup, runs: list[Run], device, cache: Cache) -> Experiment:
    """How these runs are carried out and measured, after a look whether they can be."""
    side = setup.classifier.input_side(setup.images.side)
    test_batch_size = opts.test_batch_size or accuracy.default_batch_size(device, side)
    evaluations = tuple(EVALUATIONS[name] for name in dict.fromkeys(opts.evaluate))
    peers = load_peers(opts, setup, device)
    peers.check(setup.classifier, runs)
    measuring = Measuring(setup, test_batch_size, opts.workers, cache, evaluations, peers)
    for run in runs:
        measuring.check(run)
    return Experiment(
        setup,
        measuring,
        save=models.save,
        load=lambda path: models.load_saved(path, setup.classifier).to(device),
        keep_models=opts.save_model,
        attack_batch_size=opts.attack_batch_size or attack.default_batch_size(device, side),
        scratch_dir=opts.result_dir / "scratch",
        cache=cache,
        on_record=lambda record: print(run_line(record), flush=True),
        report=functools.partial(print, flush=True),
    )


def to_do(opts: argparse.Namespace, experiment: Experiment, runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that are not done yet, and those whose record only lacks metrics."""
    to_measure = [run for run in runs if not opts.rerun and experiment.can_be_measured(run)]
    pending = [run for run in runs if run not in to_measure and (opts.rerun or not experiment.is_done(run))]
    return pending, to_measure


def announce(opts: argparse.Namespace, device, runs: list[Run], pending: list[Run], to_measure: list[Run]) -> None:
    """One line that says what will run; for a dry run, the runs."""
    many = {"k": [run.k for run in runs], "seed": [run.seed for run in runs]}
    shape = ", ".join(f"{name} {' '.join(map(str, dict.fromkeys(values)))}" for name, values in many.items())
    print(
        f"{opts.dataset}, {opts.model}, {device_module.device_name(device)}: {' '.join(opts.method)}; {shape}; "
        f"goal {opts.goal}: {len(pending)} runs to do, {len(runs) - len(pending) - len(to_measure)} done"
        + (f", {len(to_measure)} done but to be measured again for more metrics" if to_measure else ""),
        flush=True,
    )
    if opts.dry_run:
        for run in runs:
            pending_state = "resume" if run.files.state.exists() else "to do"
            state = pending_state if run in pending else "measure" if run in to_measure else "done"
            step = f" step {run.settings['continual_step']}" if run.is_step else ""
            print(f"{state:7} {run.files.identity} {run.method.name:10} k = {run.k:<4} seed = {run.seed}{step}")


if __name__ == "__main__":
    main()
