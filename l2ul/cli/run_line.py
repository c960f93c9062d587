"""The line that a finished run prints."""

import time

ENDINGS = {  # what a status means
    "forgotten": "forgotten after {steps} steps",
    "cap": "not forgotten after {steps} steps",
    "diverged": "diverged after {steps} steps",
    "done": "done after {steps} steps",
    "failed": "failed",
}
ACCURACIES = {"acc_forget": "D_f", "acc_relabel": "relabelled", "acc_retain": "D_r", "acc_test": "D_test"}


def run_line(record: dict[str, object]) -> str:
    """Return time of day, method, k, seed, status, steps, accuracies in percent and seconds of a record.

    12:03:41  adv_imp  k 16  seed 0  forgotten after 29 steps  D_f 0.00  D_r 24.40  D_test 20.61  8.1 s
    """
    parts = [time.strftime("%H:%M:%S"), f"{record['method']:7}", f"k {record['k']:<3}", f"seed {record['seed']}"]
    parts += [f"step {record['continual_step']}"] if record["continual_step"] else []
    is_unchanged = record["status"] == "done" and not record["steps"]  # method `before`
    parts += ["not changed" if is_unchanged else ENDINGS[record["status"]].format(steps=record["steps"])]
    parts += [f"{name} {record[key]:.2f}" for key, name in ACCURACIES.items() if record.get(key) is not None]
    seconds = sum(value for key, value in record.items() if key.startswith("seconds_") and value)
    return "  ".join([*parts, f"{seconds:.1f} s"])
