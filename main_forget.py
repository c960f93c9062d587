"""Make a classifier forget the images in a folder: an unlearned model in the form it came in, and a report.

    python main_forget.py --model my_vit --images to_forget --output forgotten
    python main_forget.py --model resnet20 --checkpoint resnet20.th --images to_forget --output forgotten --minutes 5
    python main_forget.py --verify forgotten/report.json --images to_forget

Exit code 0 if every image was forgotten, 3 with a report if not, 2 for bad input. What it gave when last measured:
README.md, "A deletion request".
"""

import l2ul  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from dataclasses import asdict, replace
import itertools
from pathlib import Path
import time

import torch

from l2ul.cli import exit_codes
from l2ul.common import device as device_module
from l2ul.common.errors import InputError
from l2ul.common.files import REPORT, atomic, file_sha256, remove_parts, require_writable
from l2ul.data.images import Split, as_pixels
from l2ul.deletion import deployed_model as deployment
from l2ul.deletion import examine, options, report, search, signature
from l2ul.deletion import verify as audit
from l2ul.deletion.deployed_model import Deployed
from l2ul.deletion.examine import Asked
from l2ul.deletion.request import Item, class_numbers, read
from l2ul.deletion.search import Budget, Job, Trial
from l2ul.methods import registry
from l2ul.metrics import accuracy, agreement, robustness
from l2ul.objective import Forget
from l2ul.unlearn import Settings

PROGRAM = "main_forget.py"
NOT_FORGOTTEN = 3  # exit code
HOLDS = {True: "ok", False: "FAILED", None: "?"}
SEARCH, RELEARN = 0.8, 0.95  # parts of the time at which the search ends, and relearning


@exit_codes.clean_exit(PROGRAM, "nothing was written")
def main() -> None:
    opts = parse()
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    raise SystemExit(verify(opts, device) if opts.verify else forget(opts, device))


def forget(opts: argparse.Namespace, device: torch.device) -> int:
    """Carry out a request; returns the exit code."""
    budget = Budget(60 * opts.minutes, l2ul.STARTED)
    key = signature.private_key(opts.sign) if opts.sign else None
    model = load(opts)
    before, earlier = model.hashes(), earlier_requests(opts)
    asked = ask(opts, model, earlier, device)
    keep, references = (read_others(opts, flag, model, asked) for flag in ("keep_images", "reference_images"))
    print(f"{len(asked)} images to {asked.forget.goal}; {opts.method}; {device_module.device_name(device)}", flush=True)
    told = describe(opts, model, asked, before, earlier)
    wide = robustness.widened(asked.images, asked.forget, opts.also)
    job = Job(model.classifier, asked.forget, wide, opts.method, len(model.classes), opts.seed, model.as_written)
    gone = job.forgotten(model.classifier)
    trials = [] if gone.all() else try_out(opts, job, keep, budget)
    taken = next((trial for trial in trials[:1] if trial.forgotten.sum() > gone.sum()), None)
    after = model.as_written(taken.model if taken else model.classifier)
    told |= examine.examine(job, asked, after, references, lambda: budget.part(RELEARN).left > 0)
    told |= report.of_trials(trials, taken) | {"made": report.now()}
    told["seconds"] = {"total": round(budget.used, 1), "trials": round(sum(trial.seconds for trial in trials), 1)}
    told["peak_memory_mib"] = device_module.peak_memory_mib(device)
    output = write(opts, model, asked, after, told, key)
    done = sum(image["forgotten"] for image in told["images"])
    print(f"{done} of {len(asked)} images are forgotten: {output / report.PAGE}")
    return 0 if done == len(asked) else NOT_FORGOTTEN


def load(opts: argparse.Namespace) -> Deployed:
    """The classifier, with the names of its classes."""
    sizes = deployment.Sizes(opts.image_size, opts.mean, opts.std)
    model = deployment.open_deployed(opts.model, opts.checkpoint, opts.build, sizes)
    if opts.class_names:
        try:
            model.classes = opts.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"cannot read --class-names {opts.class_names}; expected text, a name a line") from None
    return model


def earlier_requests(opts: argparse.Namespace) -> list[report.Report]:
    """The reports of the requests that the model has gone through, the first first."""
    return audit.chain(Path(opts.model)) if opts.model and Path(opts.model, REPORT).is_file() else []


def ask(opts: argparse.Namespace, model: Deployed, earlier: list[report.Report], device: torch.device) -> Asked:
    """The images with what they are called and shall be called; they and the classifier are put on the device.

    An image that an earlier request was about is called what it was then, and not what it has been made to be called.
    """
    request = read(opts.images[0], model.shape, opts.labels, opts.skip_bad)
    images = request.images.to(device)
    count = accuracy.count_classes(model.classifier.to(device), images)
    model.classes = model.classes or [str(number) for number in range(count)]
    if len(model.classes) != count or count < 2:
        raise InputError(f"the model tells {count} classes apart, and has names for {len(model.classes)}")
    before = examine.logits(model.classifier, images)
    if not before.isfinite().all():
        place = int((~before.isfinite()).any(1).nonzero()[0])
        raise InputError(f"the model gives {request.items[place].file} logits that are not finite; look at its weights")
    named = [item.new_label for item in request.items]
    new = class_numbers(named, model.classes, None, "new_label").to(device) if any(named) else None
    then, now = audit.first_labels(earlier, request.items, new), before.argmax(1).tolist()
    called = torch.tensor([present if old is None else old for old, present in zip(then, now, strict=True)])
    labels = class_numbers([item.label for item in request.items], model.classes, called, "label").to(device)
    for item, same in zip(request.items, (new == labels).tolist() if any(named) else [], strict=False):
        if same:
            raise InputError(f"the new_label of {item.file} is the class it is called by; give another one")
    asked = Asked(request, images, Forget(as_pixels(images), labels, new), before, then)
    registry.get(opts.method, asked.forget.goal)
    return asked


def read_others(opts: argparse.Namespace, flag: str, model: Deployed, asked: Asked) -> Split | None:
    """Images that must keep working, or that the model never saw, none of which may be one that is to be forgotten."""
    folder, name = getattr(opts, flag), f"--{flag.replace('_', '-')}"
    if folder is None:
        return None
    found = read(folder, model.shape, skip_bad=opts.skip_bad, flag=name)
    if found.images.shape[1:] != asked.images.shape[1:]:
        raise InputError(f"{name} has images of another size than --images; give one for all by --image-size")
    forgotten = {item.pixels_sha256 for item in asked.request.items}
    both = next((item.file for item in found.items if item.pixels_sha256 in forgotten), None)
    if both:
        raise InputError(f"{both} of {name} is also to be forgotten; leave it out of one of the folders")
    images = found.images.to(asked.images.device)
    called = accuracy.predict(model.classifier, images)
    labels = called  # what an image to keep is really called matters nothing, and its folder may have any name
    if flag == "reference_images":
        labels = class_numbers([item.label for item in found.items], model.classes, called, "label")
    return Split(images, labels.to(images.device))


def try_out(opts: argparse.Namespace, job: Job, keep: Split | None, budget: Budget) -> list[Trial]:
    """Settings tried while there is time, the best first."""
    first = replace(Settings(bn="eval", seed=opts.seed), **opts.setting)
    seconds = search.prepare(job, first, budget)
    if keep:
        job.probes.append(agreement.probe("images to keep", job.model, keep.images))
    budget = budget.part(SEARCH)
    if opts.setting:
        return [job.try_out(first, opts.setting, lambda: budget.left > 0)]

    def tell(trial: Trial) -> None:
        changed = ", ".join(f"{name} {value:g}" for name, value in trial.changed.items()) or "the method's own settings"
        kept = ", ".join(f"{one.percent:.1f} % of old answers kept ({one.name})" for one in trial.kept) or trial.status
        gone = f"{int(trial.forgotten.sum())} of {len(trial.forgotten)} forgotten"
        print(f"{changed}: {gone}, {kept}, {trial.seconds:.0f} s", flush=True)

    return search.search(job, first, budget, seconds, tell)


def describe(
    opts: argparse.Namespace,
    model: Deployed,
    asked: Asked,
    before: dict[str, object],
    earlier: list[report.Report],
) -> report.Report:
    """What a report says of the request itself, of the model before, and of what does it."""
    return {
        "tool": report.tool(),
        "asked": {
            "images": opts.images[0].resolve().name,
            "goal": asked.forget.goal,
            "labels": asked.labels_from,
            "left_out": [asdict(bad) for bad in asked.request.bad],
            "method": opts.method,
            "minutes": opts.minutes,
            "seed": opts.seed,
            "also": opts.also,
        },
        "model": {"opened_by": model.opened_by, "classes": model.classes, "before": before},
        "earlier": audit.next_earlier(earlier[-1], Path(opts.model)) if earlier else [],
        "not_claimed": report.NOT_CLAIMED,
        "device": device_module.device_name(asked.images.device),
    }


def write(opts: argparse.Namespace, model: Deployed, asked: Asked, after, told: report.Report, key) -> Path:
    """Model, report, page, list and signature in one folder, which is there whole or not at all; returns which.

    One beside `--output` where others have put something there by now.
    """
    names = itertools.chain([opts.output.name], (f"{opts.output.name}-{number}" for number in itertools.count(2)))
    output = next(place for place in map(opts.output.with_name, names) if is_free(place))
    with atomic(output, replace=False) as part:
        part.mkdir()
        told["model"]["left_out"] = model.write(after, part)
        place = deployment.written(part)[0]
        again = deployment.reopen(model.opened_by, model.classes, place, opts.build)
        examine.check_same(after, again.classifier.to(asked.images.device), asked.images)
        told["model"]["after"] = again.hashes()
        if told["earlier"]:
            audit.copy_chain(Path(opts.model), part / told["earlier"][-1]["file"])
        pictures = None if opts.no_thumbnails else [report.thumbnail(image) for image in asked.images]
        (part / report.PAGE).write_text(report.page(told, pictures), encoding="utf-8")
        (part / report.FORGET_LIST).write_text(report.forget_list(told), encoding="utf-8")
        told["files"] = {name: file_sha256(part / name) for name in (report.PAGE, report.FORGET_LIST)}
        (part / REPORT).write_text(report.text(told), encoding="utf-8")
        if key:
            (part / f"{REPORT}{signature.SUFFIX}").write_text(signature.sign((part / REPORT).read_bytes(), key))
    return output


def verify(opts: argparse.Namespace, device: torch.device) -> int:
    """Check a report, and with images that they are still forgotten; returns the exit code."""
    told, folder = audit.read_report(opts.verify), opts.verify.parent
    key = signature.public_key(opts.public_key) if opts.public_key else None
    place = Path(opts.model) if opts.model else next(iter(deployment.written(folder)), None)
    if place is None or not place.exists():
        raise InputError(f"there is no model {place or 'beside ' + str(opts.verify)}; name it by --model")
    earlier, checks = audit.earlier_reports(told, folder)
    checks = audit.check_files(told, folder, deployment.files_sha256(place)) + checks
    try:
        model = reopened(opts, told["model"], place)
        checks += [audit.check_weights(told, model and model.hashes()["weights_sha256"])]
    except InputError as error:
        if checks[0].holds:  # then it is not the file that is at fault
            raise
        model = None
        checks += [audit.Check("weights", False, f"cannot be read: {error}")]
    checks += [audit.check_signature(opts.verify, key)]
    if opts.images and model:
        checks += audit.check_images(audit.wanted([*earlier, told]), called_now(opts.images, model, device))
    for check in checks:
        print(f"{HOLDS[check.holds]:6} {check.what}: {check.found}")
    return NOT_FORGOTTEN if any(check.holds is False for check in checks) else 0


def reopened(opts: argparse.Namespace, told: report.Report, place: Path) -> Deployed | None:
    """The model that a report tells how to open; None where nobody says what builds it, and nobody needs it."""
    if told["opened_by"]["model"] == deployment.BUILT and not (opts.build or opts.images):
        return None
    return deployment.reopen(told["opened_by"], told["classes"], place, opts.build)


def called_now(folders: list[Path], model: Deployed, device: torch.device) -> list[tuple[Item, int]]:
    """The images of all folders with the class that the model gives each by now."""
    classifier, found = model.classifier.to(device), []
    for folder in folders:
        request = read(folder, model.shape, skip_bad=True)
        found += zip(request.items, accuracy.predict(classifier, request.images.to(device)).tolist(), strict=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; whatever can be judged without the model is judged here."""
    opts = options.parser(PROGRAM, __doc__).parse_args(argv)
    if opts.verify:
        return opts
    if not (opts.images and opts.output):
        raise InputError("give --images FOLDER to forget and --output FOLDER to write to, or --verify a report")
    if len(opts.images) > 1:
        raise InputError(
            f"--images names {len(opts.images)} folders; a request is one folder, several are for --verify"
        )
    if opts.method == "before" or "retain" in registry.get(opts.method).needs:
        why = "forgets nothing" if opts.method == "before" else "trains on the rest of the training set"
        raise InputError(f"method {opts.method} {why}; leave out --method, or name one such as distill or adv_imp")
    opts.setting = search.named_settings(opts.setting, opts.method)
    opts.output = opts.output.resolve()
    check_output(opts)
    return opts


def check_output(opts: argparse.Namespace) -> None:
    """Raise InputError unless the output is a new or empty folder, apart from the model and the images."""
    output = opts.output
    if not is_free(output) or output == Path.cwd():
        raise InputError(f"--output {output} exists already; name a new folder, nothing is written over")
    for place in (*opts.images, opts.keep_images, opts.reference_images, opts.model):
        if place and output.is_relative_to(Path(str(place).removeprefix("hf:")).resolve()):
            raise InputError(f"--output {output} lies within {place}, which is only read; name another folder")
    require_writable(output.parent)
    remove_parts(output.parent, older_than=time.time() - 3600, prefix=f"{output.name}.")


def is_free(output: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


if __name__ == "__main__":
    main()
