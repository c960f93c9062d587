"""Make a trained image classifier forget single training images, and measure what that costs.

    python main_unlearn.py                                     # the embedded digits
    python main_unlearn.py --dataset cifar10 --model resnet20 --checkpoint resnet20.th --unlearn-k 16 --seed 0 1 2

For every seed, k and method: load → attack → weigh → unlearn → measure → record. A run whose record is in
result_data/runs is not done again. What the commands gave when last measured: README.md, "Measured".
"""

import argparse
import time

from l2ul import data, evaluate, methods, options, records, running
from l2ul.errors import InputError
from l2ul.experiment import HYPER_PARAMETERS, Experiment, Run
from l2ul.files import remove_parts, require_writable
import models
from models import checkpoint

PROGRAM = "main_unlearn.py"


@running.ending(PROGRAM)
def main() -> None:
    opts = parse()
    device = running.choose_device(opts.device, opts.no_cuda, opts.threads)
    for folder in ("runs", "models") if opts.save_model else ("runs",):
        require_writable(opts.result_dir / folder)
        remove_parts(opts.result_dir / folder, older_than=time.time() - 3600)
    experiment = load(opts, device)
    runs = plan(opts, experiment)
    pending = [run for run in runs if opts.rerun or not experiment.is_done(run)]
    announce(opts, device, runs, pending)
    if opts.dry_run:
        return
    experiment.carry_out(pending)
    print(records.table([run.files.read() for run in runs]).to_string(index=False))
    print(f"records: {opts.result_dir / 'runs'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; whatever can be judged without data or weights is judged here."""
    parser = options.Parser(__doc__.split("\n")[0], prog=PROGRAM)
    for add in (
        options.add_data,
        options.add_weights,
        options.add_unlearning,
        options.add_attack,
        options.add_output,
        options.add_machine,
    ):
        add(parser)
    opts = parser.parse_args(argv)
    options.fill_defaults(opts)
    for name in opts.method:
        methods.get(name)
    models.check_name(opts.model)
    if opts.unlearn_k and min(opts.unlearn_k) < 1:
        raise InputError(f"--unlearn-k is {min(opts.unlearn_k)}; expected 1 or more images to forget")
    if opts.relabel_file and opts.goal != "relabel":
        raise InputError("--relabel-file is given but the goal is misclassify; add --goal relabel")
    if opts.relabel_file and not opts.forget_file and len(opts.seed) > 1:
        raise InputError("--relabel-file fits one D_f, but each of several seeds chooses another; add --forget-file")
    return opts


def load(opts: argparse.Namespace, device) -> Experiment:
    """Data set and classifier on the device, after a look whether they fit each other."""
    path = opts.checkpoint or checkpoint.find(opts.dataset, opts.model, opts.data_dir)
    if path is None and opts.model in models.OWN:
        tried = checkpoint.candidates(opts.dataset, opts.model, opts.data_dir)
        raise InputError(
            f"no weights of {opts.model} for {opts.dataset}: looked for {tried[0]} and {tried[2]}; "
            f"train them with a main_pretrain script or name a file with --checkpoint"
        )
    images = data.load(opts.dataset, opts.data_dir, image_size=opts.image_size).to(device)
    classifier = models.load(opts.model, images.num_classes, path, opts.mean, opts.std).to(device)
    evaluate.check_fit(classifier, images.train.images, images.num_classes)
    return Experiment(
        images,
        classifier,
        opts.goal,
        {name: getattr(opts, name) for name in HYPER_PARAMETERS},
        opts.result_dir,
        opts.test_batch_size,
        opts.attack_batch_size,
        opts.workers,
        models.save if opts.save_model else None,
        models.saved_suffix(classifier),
    )


def plan(opts: argparse.Namespace, experiment: Experiment) -> list[Run]:
    """Every run that was asked for, seed by seed and k by k."""
    train, num_classes = experiment.images.train, experiment.images.num_classes
    listed = data.read_forget(opts.forget_file, len(train)) if opts.forget_file else None
    sizes = opts.unlearn_k or [len(listed)]
    if listed is not None and max(sizes) > len(listed):
        raise InputError(f"--unlearn-k is {max(sizes)}, but {opts.forget_file} lists {len(listed)} images")
    runs = []
    for seed in opts.seed:
        forget = listed if listed is not None else data.choose_forget(len(train), max(sizes), seed)
        true, new = train.labels[forget].cpu(), None
        if opts.relabel_file:
            new = data.read_new_labels(opts.relabel_file, true, num_classes)
        elif opts.goal == "relabel":
            new = data.random_new_labels(true, num_classes, seed)
        runs += experiment.plan(opts.method, sizes, seed, forget, new)
    return runs


def announce(opts: argparse.Namespace, device, runs: list[Run], pending: list[Run]) -> None:
    """One line that says what will run; for a dry run, the runs."""
    many = {"k": [run.k for run in runs], "seed": [run.seed for run in runs]}
    shape = ", ".join(f"{name} {' '.join(map(str, dict.fromkeys(values)))}" for name, values in many.items())
    print(
        f"{opts.dataset}, {opts.model}, {running.device_name(device)}: {' '.join(opts.method)}; {shape}; "
        f"goal {opts.goal}: {len(pending)} runs to do, {len(runs) - len(pending)} done",
        flush=True,
    )
    if opts.dry_run:
        for run in runs:
            state = "to do" if run in pending else "done "
            print(f"{state} {run.files.identity} {run.method.name:10} k = {run.k:<4} seed = {run.seed}")


if __name__ == "__main__":
    main()
