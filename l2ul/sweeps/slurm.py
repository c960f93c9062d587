"""The SLURM job script that starts a Ray cluster and a sweep on it."""

import shlex

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=l2ul-sweep
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --time=24:00:00
#SBATCH --output=sweep-%j.log
#SBATCH --requeue
# Printed by main_sweep.py --slurm. Submit it with sbatch in the folder of the scripts, on a file system that all nodes
# share. Set time, partition and account above as your cluster requires. A job that was stopped, for example by its time
# limit, continues when it is submitted again.
set -euo pipefail
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_AUTH_MODE=token
uv sync --quiet --extra sweep  # once, before all nodes use it
uv run --no-sync ray get-auth-token --generate > /dev/null  # secret of the cluster, in your home on all nodes
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # a different port for each job on a node
start=(uv run --no-sync ray symmetric-run --address "$head:$port" --min-nodes {nodes} --num-cpus "$SLURM_CPUS_ON_NODE")
srun "${{start[@]}}" -- {command}
"""


def script(program: str, arguments: list[str], nodes: int = 1, gpus: bool = True) -> str:
    """Return a job script that runs `program` with these arguments on whole nodes, with their GPUs or without."""
    command = shlex.join(["python", program, *arguments, "--address", "auto"])
    lines = "#SBATCH --gpus-per-node=8  # as many as a node has\n" if gpus else ""
    return SCRIPT.format(nodes=nodes, gpus=lines, command=command)


def without_flag(arguments: list[str]) -> list[str]:
    """Return the arguments of a command line without --slurm and its number."""
    place = next(index for index, word in enumerate(arguments) if word.partition("=")[0] == "--slurm")
    following = arguments[place + 1 : place + 2]
    has_number = "=" not in arguments[place] and following != [] and following[0].isdecimal()
    return arguments[:place] + arguments[place + 1 + has_number :]
