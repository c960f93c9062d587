"""Run a function in several processes with the environment of torchrun. They are forked, which saves imports."""

import contextlib
import multiprocessing
import os
from pathlib import Path
import socket
import sys

import torch


def _one(rank: int, size: int, port: int, folder: Path, work, arguments) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        sys.stdout, sys.stderr = (stack.enter_context(open(folder / f"{rank}.{kind}", "w")) for kind in ("out", "err"))
        torch.save(work(*arguments), folder / f"{rank}.pt")


def run_processes(folder: Path, size: int, work, *arguments) -> tuple[list[int], list[object], list[str], list[str]]:
    """Call `work(*arguments)` in `size` processes; return their exit codes, results, standard outputs and errors."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_one, args=(rank, size, port, folder, work, arguments)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.is_alive():  # as torchrun does after an error
            process.kill()
            process.join()
    kept = [folder / f"{rank}.pt" for rank in range(size)]
    results = [torch.load(path, weights_only=False) if path.exists() else None for path in kept]
    outputs = ([(folder / f"{rank}.{kind}").read_text() for rank in range(size)] for kind in ("out", "err"))
    return [process.exitcode for process in started], results, *outputs
