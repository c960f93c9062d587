"""Make an image classifier forget the images in a folder: write the unlearned model and a report.

    python main_forget.py --model my_vit --images to_forget --output forgotten
    python main_forget.py --model resnet20 --checkpoint resnet20.th --images to_forget --output forgotten --minutes 5
    python main_forget.py --verify forgotten/report.json --images to_forget
    python main_forget.py --verify forgotten/report.json --images to_forget --again

Exit code: 0 if every image that was recognised is forgotten, 3 with a report if not or if none was recognised, 2 for
invalid input.
"""

import l2ul  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from collections.abc import Sequence
from pathlib import Path
import time

from l2ul.cli import exit_codes, push
from l2ul.common.choices import STOPPED
from l2ul.common.errors import InputError, option
from l2ul.common.text import one_line
from l2ul.deletion import options

PROGRAM = "main_forget.py"
NOT_FORGOTTEN = 3  # exit code
LESS_MEMORY = "forget fewer images per request, or use --device cpu"
LESS_MEMORY_TO_VERIFY = "give fewer folders of --images at once, or use --device cpu"
PASSED = {True: "ok", False: "FAILED", None: "?"}


@exit_codes.clean_exit(PROGRAM, exit_codes.NOTHING_WRITTEN, less_memory=LESS_MEMORY)
def main() -> None:
    args = options.parse(PROGRAM)
    raise SystemExit(verify(args) if args.verify else forget(args))


def forget(args: argparse.Namespace) -> int:
    """Carry out a request, or with --dry-run check it; return the exit code."""
    # After parsing, so that --help is quick.
    import torch

    from l2ul.common import device as devices
    from l2ul.common import precision
    from l2ul.common.progress import progress_bar
    from l2ul.deletion import checks, inventory, output, report, signature, states
    from l2ul.deletion.candidates import TimeBudget, damage_note
    from l2ul.deletion.report_schema import PAGE, REPORT
    from l2ul.deletion.request import read_reference_images, read_unlabelled
    from l2ul.deletion.verify import check_no_chain, earlier_rows

    # Check what can be checked without the model.
    budget = TimeBudget(60 * args.minutes, l2ul.STARTED)
    device = devices.choose_device(args.device, args.no_cuda, args.threads, log)
    precision.use(device, "fp32")  # of all verdicts
    deletion = make_deletion(args, args.setting)
    others = (args.keep_images, args.reference_images, args.surrogate)
    output.check_output(args.output, (*args.images, *others, args.model))
    key = signature.private_key(args.sign) if args.sign else None
    statements = inventory.read_inventory(args.inventory) if args.inventory else None
    repository = push.open_repository(args)

    # Open the model and read the images.
    model, hashes_before, chain = open_original(args)
    for note in model.notes:
        log(note)
    if model.not_read:
        log(f"not read in {args.checkpoint or args.model}: {', '.join(model.not_read)}")
    if model.path and not chain:
        check_no_chain(model.path, hashes_before["weights_sha256"])
    earlier_folder = Path(args.model) if chain else None
    model.classifier.to(device)
    request = read_images(args, model, chain)
    for note in request.folder.notes:
        log(note)
    if model.unreached:
        log(f"no gradient of the predictions reaches {', '.join(model.unreached)}: these weights may stay as they are")
    for file in request.folder.unreadable:
        log(f"left out: {file.file}: {file.why}")
    deletion.check(model, request, args.min_known, args.single_label)
    keep = read_unlabelled(args.keep_images, option("keep_images"), model, request, args.skip_bad)
    surrogate = read_unlabelled(args.surrogate, option("surrogate"), model, request, args.skip_bad)
    references = read_reference_images(args.reference_images, model, request, args.skip_bad, surrogate)
    output.check_writable(args.output, model, request, args.build, uploads=repository is not None)
    prepared = deletion.prepare(model, request, surrogate)
    unlearner, settings = prepared.unlearner, prepared.settings
    recognised, how = unlearner.recognised, " as used" if unlearner.as_used else ""
    label_notes = request.label_notes(recognised)
    for note in label_notes:
        log(note)
    log(
        f"{states.images(len(request))} to forget{how}, goal {request.forget.goal}; {args.method}; "
        f"{devices.device_name(device)}; search in {unlearner.precision} for at most {args.minutes:g} min"
    )
    if args.dry_run:
        print(*map(one_line, request.summary()), sep="\n")
        copies = ", as stored or as a copy of --also" if args.also else ""
        print(f"recognised before: {int(recognised.sum())} of {states.images(len(request))}{copies}")
        left = int((~unlearner.forgotten(model.classifier)).sum())
        print(f"to be unlearned: {left} of {states.images(len(request))}")
        print(f"dry run: nothing was written; the output would be {args.output}")
        return 0

    # Search settings that forget all images with the least damage.
    output.remove_interrupted(args.output)
    found = prepared.carry_out(budget, keep, lambda candidate: log_candidate(candidate, recognised))
    if found.early_end:
        log(found.early_end)

    # Check the unlearned model.
    log("checking the unlearned model")
    others = ("images to keep", keep) if keep is not None else None
    if others is None and references:
        others = ("reference images", references.images)
    measured = checks.measure(unlearner, request, found.model, references, budget, progress_bar, others)
    contents = {"outcome": states.count(measured["images"]).outcome} | measured
    contents |= report.describe_run() | report.describe_result(found, recognised)
    contents |= {
        "asked": report.describe_request(
            request,
            deletion,
            minutes=args.minutes,
            request_id=args.request_id,
            controller=args.controller,
            requested_on=args.requested_on,
            label_notes=label_notes,
            surrogate=(args.surrogate, surrogate) if args.surrogate else None,
        ),
        "inventory": statements,
        "model": {
            "opened_by": model.opened_by,
            "classes": request.class_names,
            "before": hashes_before,
            "not_read": model.not_read,
            "unreached": model.unreached,
        },
        "earlier": earlier_rows(chain, earlier_folder),
        "seconds": {"total": round(budget.used, 1), "trials": round(sum(one.seconds for one in found.candidates), 1)},
        "peak_memory_mib": devices.peak_memory_mib(device),
        "device": devices.device_name(device),
        "precision": {"search": unlearner.precision, "checks": "fp32"},
    }
    free = {"robust": settings.robust, "loop_precision": settings.loop_precision}  # which leave the search free
    best = found.best
    stopped_at = best.steps if best and best.status == STOPPED else None
    command = options.again(args, contents["chosen"] or free, stopped_at, device.type, torch.get_num_threads())
    contents["again"] = {"command": command}

    # Write the model and its report.
    folder = output.write(
        args.output,
        model,
        found.model,
        request,
        contents,
        build=args.build,
        earlier_folder=earlier_folder,
        with_thumbnails=not args.no_thumbnails,
        key=key,
    )
    counted, left_out = contents["asked"]["counted"], len(request.folder.unreadable)
    headline = states.headline(contents["images"], request.forget.goal, args.also, counted, left_out)
    if best and (damage := damage_note(best.agreement)):
        log(damage)
    if best and chain:
        log(
            f"not checked: whether images of earlier requests ({len(chain)}) are still forgotten; check it with "
            f"--verify {folder / REPORT} and the folders of all requests as --images"
        )
    log(f"{headline}: {folder / PAGE}")
    successful = states.count(contents["images"]).successful
    if repository:
        upload(args, folder / REPORT, repository, None if successful else "an image is not forgotten")
    return 0 if successful else NOT_FORGOTTEN


def upload(args: argparse.Namespace, report: Path, repository, reason: str | None = None) -> None:
    """Upload the model of a report for --push. With a reason not to, print it and the command that does it still."""
    from l2ul.deletion.deployed_model import reopen, written_models
    from l2ul.deletion.model_card import of_report
    from l2ul.deletion.report_schema import read_report
    from l2ul.models import hub

    own = ["--model", args.model] if args.verify and args.model else []
    own += ["--build", args.build] if args.build else []
    public = ["--push-public"] if args.push_public else []
    again = push.command_line(PROGRAM, ["--verify", str(report), *own, "--push", repository.name, *public])
    if reason:
        print(f"not uploaded: {reason}; this command uploads the model all the same: {again}")
        return
    with exit_codes.clean_exit(
        PROGRAM, f"the report is {report}; this command uploads the model: {again}", less_memory="free some memory"
    ):
        model = Path(args.model) if args.verify and args.model else written_models(report.parent)[0]
        content = read_report(report)
        opened = reopen(content["model"]["opened_by"], content["model"]["classes"], model, args.build)
        card = of_report(content, content["model"]["after"]["weights_sha256"], None if model.is_dir() else hub.WEIGHTS)
        push.push(PROGRAM, model, opened.classifier, card.text(), repository, again, opened.dtypes)


def open_original(args: argparse.Namespace):
    """Return the original model of a request, its hashes, and the reports of the earlier requests on it."""
    from l2ul.deletion.deployed_model import InputFormat, open_model
    from l2ul.deletion.verify import read_chain

    input_format = InputFormat(args.image_size, args.mean, args.std)
    model = open_model(args.model, args.checkpoint, args.build, input_format, args.class_names, args.weights_key)
    hashes = model.hashes()
    return model, hashes, read_chain(args.model, hashes["weights_sha256"])


def read_images(args: argparse.Namespace, model, chain):
    """Return the request: the images to forget, their labels and the predictions of the model."""
    from l2ul.deletion import request

    metadata = model.classifier.metadata
    reader = request.choose_reader(chain, metadata, args.exif_orientation, args.white_level, args.max_image_pixels)
    read = request.read_images(args.images[0], model.to_pixels, args.labels, args.skip_bad, reader=reader)
    return request.make_request(read, model, chain, args.class_order)


def make_deletion(args: argparse.Namespace, settings: Sequence[tuple[str, str]]):
    """Return how a request is carried out with these settings, names and values as text."""
    from l2ul.common.progress import progress_bar
    from l2ul.deletion.flow import Deletion

    has_surrogate = args.surrogate is not None
    return Deletion(args.method, settings, args.seed, has_surrogate, args.also, args.max_steps, progress_bar)


@exit_codes.clean_exit(PROGRAM, exit_codes.NOTHING_WRITTEN, less_memory=LESS_MEMORY_TO_VERIFY)
def verify(args: argparse.Namespace) -> int:
    """Check a report, its model and its images; return the exit code."""
    from l2ul.common import device as devices
    from l2ul.common import precision
    from l2ul.deletion import signature
    from l2ul.deletion import verify as verification

    with advising_to_repeat():
        repeated = recorded_request(args) if args.again else None
    if repeated:
        args.device, args.threads = args.device or repeated.device, args.threads or repeated.threads
        repeated.max_image_pixels = max(args.max_image_pixels, repeated.max_image_pixels)
    device = devices.choose_device(args.device, args.no_cuda, args.threads)
    precision.use(device, "fp32")
    key = signature.public_key(args.public_key) if args.public_key else None
    repository = push.open_repository(args)
    model = Path(args.model) if args.model else None
    remedy = "give the images of the requests as --images, and the model in use as --model"
    with options.advising(options.OF_VERIFY, remedy):
        results = verification.verify(
            args.verify,
            model=model,
            build=args.build,
            image_folders=args.images or (),
            key=key,
            device=device,
            max_pixels=args.max_image_pixels,
        )
    print_checks(results)
    if repeated:
        with advising_to_repeat():
            again = repeat(repeated, args.verify, device)
        print_checks(again)
        results += again
    failed = [check.name for check in results if check.passed is False]
    if repository and failed:
        print(f"not uploaded: {', '.join(failed)} failed")
    elif repository:
        upload(args, args.verify, repository)
    return NOT_FORGOTTEN if failed else 0


def print_checks(checks: Sequence) -> None:
    for check in checks:
        print(one_line(f"{PASSED[check.passed]:6} {check.name}: {check.finding}"), flush=True)


def recorded_request(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options of the request that the report of --verify says how to repeat."""
    from l2ul.deletion.report_schema import read_report

    report = read_report(args.verify)
    if "again" not in report:
        raise InputError(f"{args.verify} does not say how to repeat the request", "leave out --again")
    folders = args.images or [None]
    own = next((one for one in folders if one and one.resolve().name == report["asked"].get("images")), folders[0])
    return options.parse_again(
        PROGRAM, report["again"]["command"], images=own, original=args.original, build=args.build
    )


def advising_to_repeat():
    """Return a context manager: in messages, only advice that holds for --verify --again."""
    remedy = "to repeat the request, restore its files, or name its images with --images and its model with --original"
    return options.advising(options.OF_AGAIN, remedy)


def repeat(args: argparse.Namespace, path: Path, device) -> list:
    """Carry out the request of a report again and return the checks of its result. Nothing is written."""
    from l2ul.common import precision
    from l2ul.deletion import verify
    from l2ul.deletion.report import describe_surrogate
    from l2ul.deletion.report_schema import AS_USED, read_report
    from l2ul.deletion.request import read_unlabelled
    from l2ul.methods import registry

    report = read_report(path)
    try:
        with advising_to_repeat():
            model, hashes, chain = open_original(args)
    except InputError as error:
        if not Path(args.checkpoint or args.model or "").exists():
            raise
        return [verify.Check("original model", False, f"cannot be opened: {error}")]
    results = [verify.check_original(report, hashes), verify.check_files_exist(report, args.images[0])]
    if all(check.passed for check in results):
        model.classifier.to(device)
        request = read_images(args, model, chain)
        results.append(verify.check_request(report, request.folder.files, request.forget.labels.tolist()))
    if all(check.passed for check in results):
        recorded = [*args.setting, *registry.absent_settings(args.method, dict(args.setting))]
        deletion = make_deletion(args, recorded)
        of_search = report.get("precision", {"search": "fp32"})["search"]
        precision.require(device, of_search, "the request was carried out in it: repeat it on such a device")
        surrogate = read_unlabelled(args.surrogate, option("surrogate"), model, request, args.skip_bad)
        counted = report["asked"].get("counted")  # the model may be that of a run with robust=0
        as_used = counted == AS_USED if counted else bool(deletion.settings.robust)
        unlearner = deletion.unlearner(model, request, surrogate, as_used, of_search)
        if surrogate is not None:
            row, recorded = describe_surrogate(args.surrogate, surrogate), report["asked"].get("surrogate") or {}
            same = row["sha256"] == recorded.get("sha256")
            finding = f"{row['images']} in {row['folder']} are {'those' if same else 'not those'} of the request"
            results.append(verify.Check("images of --surrogate", same, finding))
    if all(check.passed for check in results):
        results += verify.check_again(report, model, request, unlearner, deletion.settings)
    return results


def log(text: str) -> None:
    print(one_line(f"{time.strftime('%H:%M:%S')}  {text}"), flush=True)


def log_candidate(candidate, recognised) -> None:
    """Print a finished candidate of the search. Only images that the original model recognised count as forgotten."""
    from l2ul.deletion.candidates import describe

    limit = f"; the limit of time or steps stopped it at step {candidate.steps}" if candidate.status == STOPPED else ""
    agreement = ", ".join(f"agreement {kept.percent:.1f} % ({kept.name})" for kept in candidate.kept)
    forgotten = f"{int((candidate.forgotten & recognised).sum())} of {int(recognised.sum())} forgotten"
    if candidate.stored is not None and not candidate.stored.equal(candidate.forgotten):
        forgotten += f" as used, {int((candidate.stored & recognised).sum())} as stored"
    log(
        f"{describe(candidate.changed)}: {forgotten}, {agreement or candidate.status}, {candidate.seconds:.0f} s{limit}"
    )


if __name__ == "__main__":
    main()
