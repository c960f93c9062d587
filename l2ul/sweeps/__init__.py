"""Many runs at once on Ray: the trials of a sweep, the workers that do them, search with Optuna, SLURM job scripts."""
