"""Make a trained image classifier forget single training images, and measure what that costs.

    # forget 16 handwritten digits; needs no data, weights or GPU
    python main_unlearn.py
    # forget 16 images of CIFAR-10, with three seeds
    python main_unlearn.py --dataset cifar10 --model resnet20 --checkpoint resnet20.th --unlearn-k 16 --seed 0 1 2
    # forget the images that forget.txt lists, of your images in data/pets/train and data/pets/val
    python main_unlearn.py --dataset pets --model torchvision:resnet50 --checkpoint pets.pt --forget-file forget.txt
    # compute adversarial examples and accuracies on eight GPUs
    torchrun --nproc-per-node 8 main_unlearn.py --dataset imagenet --unlearn-k 64

For each seed, k and method: load → attack → importance → unlearn → evaluate → record. A run that has a record in
result_data/runs is not repeated, so the same command continues after an interruption.
"""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse

from l2ul.cli import exit_codes, unlearn_options

PROGRAM = unlearn_options.PROGRAM


@exit_codes.clean_exit(PROGRAM, exit_codes.CONTINUES, shared=True, larger_batches=exit_codes.LARGER_BATCHES)
def main() -> None:
    opts = unlearn_options.parse(description=__doc__)
    run(opts)  # imports torch: after parsing, so that --help answers at once


def run(opts: argparse.Namespace) -> None:
    """Do the runs that have no record yet, and print the table of all runs."""
    from l2ul.cli import push
    from l2ul.cli import unlearn_command as command
    from l2ul.common import distributed
    from l2ul.common.cache import Cache
    from l2ul.common.device import choose_device
    from l2ul.data import folder
    from l2ul.reporting import summary

    with distributed.process_group():
        device = choose_device(opts.device, opts.no_cuda, opts.threads, print)
        command.use_precision(opts, device)
        folder.check_decoder(opts.decoder, device)
        cache = Cache()
        repository = None
        if distributed.is_first():
            repository = push.open_repository(opts)  # of --push: before any work
            command.open_result_folders(opts)
            cache = command.open_cache(opts)
        trackers = command.open_trackers(opts, command.print_now)

        setup = command.load_setup(opts, device)  # data set and original model
        runs = command.plan_runs(opts, setup)  # seeds × k × methods
        experiment = command.make_experiment(
            opts, setup, runs, device, cache, trackers, command.print_run, command.print_now
        )

        to_do, to_measure = experiment.pending(runs, opts.rerun)
        command.check_writable(experiment, to_do, uploads=repository is not None)
        command.announce(opts, device, runs, to_do, to_measure)
        for note in command.notes_on_changes(experiment.changes([run for run in runs if run not in to_do])):
            print(note, flush=True)
        if not opts.dry_run:
            experiment.add_metrics(to_measure)  # of runs on record that lack metrics of --evaluate
            experiment.carry_out(to_do)  # each run: attack → importance → unlearn → evaluate → record
            for note in setup.images.decoding_notes():
                print(note)
            if distributed.is_first():
                results = [run.files.read() for run in runs]
                print(summary.brief_text(summary.brief(results)))
                if note := command.divergence_note(results):
                    print(note)
                print(f"records: {opts.result_dir / 'runs'}")
                if opts.save_model:
                    print(f"models and their cards: {opts.result_dir / 'models'}")
            if repository:
                command.push_model(runs[0], setup, repository)


if __name__ == "__main__":
    main()
