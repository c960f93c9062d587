"""The job script that starts a Ray cluster under SLURM and a sweep on it."""

import shlex

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=l2ul-sweep
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --time=24:00:00
#SBATCH --output=sweep-%j.log
#SBATCH --requeue
# Printed by main_sweep.py --slurm. Call sbatch with it in the folder of the scripts, on a file system that all nodes
# see; set time, partition and account above as your cluster wants them. A job that was stopped, by its time too, goes
# on where it was when it is submitted again.
set -euo pipefail
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_AUTH_MODE=token
uv sync --quiet --extra sweep  # once, before all nodes use it
uv run --no-sync ray get-auth-token --generate > /dev/null  # keeps others out; in your home, which all nodes see
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # jobs on one node do not meet
start=(uv run --no-sync ray symmetric-run --address "$head:$port" --min-nodes {nodes} --num-cpus "$SLURM_CPUS_ON_NODE")
srun "${{start[@]}}" -- {command}
"""


def script(program: str, words: list[str], nodes: int = 1, gpus: bool = True) -> str:
    """A job script that gives `program` these words on so many whole nodes, with their GPUs or without."""
    command = shlex.join(["python", program, *words, "--address", "auto"])
    lines = "#SBATCH --gpus-per-node=8  # as many as a node has\n" if gpus else ""
    return SCRIPT.format(nodes=nodes, gpus=lines, command=command)
