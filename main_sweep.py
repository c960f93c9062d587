"""Run many experiments at once, on this machine or a Ray cluster: all combinations of settings, or a search.

    # list 24 runs: 2 methods × 2 seeds × 3 radii × 2 learning rates
    python main_sweep.py --method adv adv_imp --seed 0 1 --pgd-eps 1:4:3 --unlearn-lr 0.003 0.01 --dry-run
    # search 20 settings for the one that forgets D_f and keeps the highest accuracy on D_r
    python main_sweep.py --method adv_imp --search 20 --pgd-eps 1:5 --unlearn-lr 1e-4:1e-2:log

Takes the flags of main_unlearn.py, each with several values or a range, and writes the same records. Runs that have a
record are not repeated, so the same command continues after an interruption, also on another machine. The packages of
the extra "sweep" are needed: pip install -e '.[sweep]', or start with uv run --extra sweep in place of python.
"""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

from pathlib import Path
import sys

from l2ul.cli import exit_codes
from l2ul.sweeps import options, slurm

PROGRAM = options.PROGRAM


@exit_codes.clean_exit(PROGRAM, exit_codes.CONTINUES, larger_batches=exit_codes.LARGER_BATCHES)
def main() -> None:
    sweep = options.parse(description=__doc__)
    if sweep.opts.slurm:
        program, command = str(user_script() or PROGRAM), slurm.without_flag(sys.argv[1:])
        print(slurm.script(program, command, sweep.opts.slurm, sweep.opts.gpus_per_trial != 0), end="")
        return
    # These modules import torch: after parsing, so that --help is quick.
    from l2ul.sweeps import ray_cluster
    from l2ul.sweeps.sweep import SweepRunner, with_precision
    import main_tables

    tables = main_tables.parse(["--result-dir", str(sweep.result_dir), "--figures", "1", "6"])
    if not sweep.opts.dry_run:
        main_tables.open_output(tables)
        ray_cluster.require_packages()
    runner = SweepRunner(with_precision(sweep), user_script(), lambda text: print(text, flush=True))
    failed = runner.run()
    if sweep.opts.dry_run:
        return
    files = main_tables.make(tables)
    runner.track([path for path in files if path.suffix == ".png"], failed)
    if failed:
        raise SystemExit(f"{PROGRAM}: {failed} trials failed; their records say why; the same command repeats them")


def user_script() -> Path | None:
    """Return the script that was started, if it is one of the user that imports this module.

    Such a script registers methods, models, data sets or metrics before it calls `main`.
    """
    started, this = sys.modules["__main__"], sys.modules[__name__]
    imports_this = started is not this and any(value is this or value is main for value in vars(started).values())
    return Path(started.__file__).resolve() if imports_this else None


if __name__ == "__main__":
    main()
