"""The command line of `main_forget.py`. This module does not import torch, so that `--help` is quick."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import datetime
import os
from pathlib import Path

from l2ul.cli import options, push
from l2ul.cli.options import Parser
from l2ul.cli.parser import finite_float, nonnegative_int, positive_float, positive_int, setting
from l2ul.common.choices import CHANGES, CLASS_ORDERS, InvalidValue, Number
from l2ul.common.errors import InputError
from l2ul.deletion.report_schema import is_date
from l2ul.methods import registry
from l2ul.methods.settings import Value

SHARE = Number(float, 0, maximum=1)
EPILOG = """\
examples:
  python main_forget.py --model my_vit --images to_forget --output forgotten
      forget all images in to_forget with a Hugging Face model that save_pretrained wrote to my_vit
  python main_forget.py --model resnet20 --checkpoint resnet20.th --images to_forget --output forgotten --minutes 5
      the same for a file of weights, in at most 5 minutes
  python main_forget.py --model my_vit --images to_forget --output forgotten --dry-run
      check the request and print what would be done
  python main_forget.py --verify forgotten/report.json --images to_forget
      check that the model and its report are unchanged and that the images are still forgotten
  python main_forget.py --verify forgotten/report.json --images to_forget --again
      repeat the request and check that it ends with the same weights
  python main_forget.py --verify forgotten/report.json --push my_vit
      upload the unlearned model to the Hugging Face Hub if it is the one of the report

glossary:
  forgotten   the model misclassifies the image: it predicts another class than its label. With a new label: it
              predicts the new label
  as stored   the pixels of the file decide
  as used     also in at least 95 % of 64 random copies (mirrored, cropped, compressed, …), with weights rounded to 16,
              8 and 4 bits, and with recalibrated batch-norm
  D_f         the images to forget
  agreement   share of images for which the unlearned model predicts the same class as the original model
  distill     the method of this project: it keeps the outputs on images made from D_f and the model, and needs no other
              images
  recognised  the model predicts the image as its label. An image that was not recognised before the request never
              counts as forgotten

exit codes:
  0         every image that was recognised is forgotten: as used, or with --setting robust=0 or a method other than
            distill as stored; with --verify: no check failed
  1         out of memory or disk space; or the upload of --push failed, and the output is on this machine
  2         invalid input
  3         an image is still recognised, or none was recognised before; with --verify: a check failed
  130, 143  stopped by Ctrl-C or SIGTERM; nothing was written, and the same command starts again
"""


# Flags that do not decide the weights of a request with fixed settings.
NOT_REPEATED = {
    *("output", "dry_run", "min_known", "setting", "minutes", "max_steps", "keep_images", "reference_images"),
    *("request_id", "controller", "requested_on", "inventory", "no_thumbnails", "sign", "push", "push_public"),
    *("verify", "public_key", "again", "original", "device", "no_cuda", "threads"),
}
# Flags that --verify takes, and those of them that say how --again carries out the request.
OF_VERIFY = {
    *("verify", "images", "model", "build", "public_key", "again", "original", "push", "push_public"),
    *("max_image_pixels", "device", "no_cuda", "threads"),
}
OF_AGAIN = OF_VERIFY - {"model", "public_key", "push", "push_public"}
REPEATED_BESIDES = ("--output", "--min-known", "--setting", "--minutes", "--max-steps", "--device", "--threads")


def parse(program: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, by default of this process. Raise InputError if they contradict."""
    parsed = parser(program)
    args = parsed.parse_args(arguments)
    if args.verify:
        given = (action for action in parsed.flags if getattr(args, action.dest) != action.default)
        other = next((action.option_strings[0] for action in given if action.dest not in OF_VERIFY), None)
        if other:
            raise InputError(f"{other} is for requests", "leave it out with --verify")
        if args.original and not args.again:
            raise InputError("--original is for --again", "leave it out", "add --again")
        return args
    for flag, value in (("--again", args.again), ("--original", args.original), ("--public-key", args.public_key)):
        if value:
            raise InputError(f"{flag} is for --verify", "leave it out", "give the report as --verify REPORT")
    if not (args.images and args.output):
        raise InputError("give --images FOLDER to forget and --output FOLDER to write to, or --verify REPORT")
    if len(args.images) > 1:
        raise InputError(
            f"--images names {len(args.images)} folders", "give one folder per request (only --verify takes several)"
        )
    args.output = Path(os.path.realpath(args.output))
    return args


def again(
    request: argparse.Namespace, chosen: Mapping[str, Value] | None, max_steps: int | None, device: str, threads: int
) -> list[str]:
    """Return the command line, after the name of the script, that repeats a request with the settings it ended with.

    request    options of the request
    chosen     values of all settings of the model that was written; None: the model is unchanged
    max_steps  steps after which the time limit ended the run; None if it ended by itself
    """
    words = parser("").words(request, NOT_REPEATED)
    settings = registry.loop_settings(request.method, chosen or {})
    words += ["--setting", *(f"{name}={value}" for name, value in settings.items())] if settings else []
    words += ["--max-steps", str(max_steps)] if max_steps else []
    words += ["--minutes", f"{10 * request.minutes:g}", "--min-known", "0", "--device", device]
    words += ["--threads", str(threads)] if device == "cpu" else []
    return [*words, "--output", f"{request.output.name}-again"]


def parse_again(
    program: str,
    words: Sequence[str],
    *,
    images: Path | None = None,
    original: Path | None = None,
    build: str | None = None,
) -> argparse.Namespace:
    """Return the options of a request from the words that `again` made and a report contains.

    images, original  where the images and the original model are now; None: where the words say
    build             the function of --build. That of the report is not used, because its code would be run

    Raises InputError if the words are not those of a request.
    """
    flags = {action.option_strings[0]: action for action in parser("").flags if action.dest not in NOT_REPEATED}
    known = {*flags, *REPEATED_BESIDES}
    unknown = next(
        (word for word in words if word.startswith("-") and word not in known and not _is_number(word)), None
    )
    if unknown is not None:
        raise InputError(
            f"the command in the report has {unknown}, which is not a flag of a request", "repair the report"
        )
    args = parse(program, words)
    if args.build and not build:
        raise InputError("the model of the request is built by code of yours", "give its function as --build")
    args.build = build
    args.images = [images] if images else args.images
    if original and args.checkpoint:
        args.checkpoint = original
    elif original:
        args.model = str(original)
    return args


@contextlib.contextmanager
def advising(flags: set[str], instead: str) -> Iterator[None]:
    """Leave out of InputErrors inside the block the advice that names other flags of the script.

    flags    names of the values of flags that are taken, such as OF_VERIFY
    instead  the advice in its place
    """
    foreign = {action.option_strings[0] for action in parser("").flags if action.dest not in flags}
    try:
        yield
    except InputError as error:
        raise error.without(foreign, instead) from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _date(text: str) -> str:
    """Return a date such as 2026-11-20. Raise InvalidValue for another text or a date in the future."""
    if not is_date(text):
        raise InvalidValue(f"{text!r} is not allowed", "expected a date such as 2026-11-20")
    if datetime.date.fromisoformat(text) > datetime.date.today() + datetime.timedelta(
        days=1
    ):  # it may be tomorrow elsewhere
        raise InvalidValue(f"{text!r} is in the future", "expected the date on which the request was made")
    return text


def _line(text: str) -> str:
    """Return a text. Raise InvalidValue if it is blank or has several lines."""
    if not text.strip() or not text.isprintable():
        raise InvalidValue(f"{text!r} is not allowed", "expected one line of text")
    return text


def parser(program: str) -> Parser:
    """Return the parser of `main_forget.py`."""
    description = "Make an image classifier forget the images in a folder, and write the unlearned model and a report."
    new = Parser(description, prog=program, epilog=EPILOG, glossary=False)
    for add_group in (_add_model, _add_request, _add_method, _add_report, options.add_machine):
        add_group(new)
    return new


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model (--model or --build is required)")
    text = (
        "hf:NAME; timm:NAME; torchvision:NAME; a folder that save_pretrained of transformers or save_for_hf of timm "
        "wrote; an architecture of this project, such as resnet20; or the --output folder of an earlier request"
    )
    options.add(group, "--model", text, metavar="MODEL", default=None)
    text = "file of weights; for torchvision:NAME also the name of one of its pretrained weights"
    options.add(group, "--checkpoint", text, metavar="FILE")
    text = "which weights of a checkpoint with several, such as model_ema (default: the only ones that fit)"
    options.add(group, "--weights-key", text, metavar="KEY")
    text = "function that returns a torch.nn.Module from images to logits, in place of --model; its code is run"
    options.add(group, "--build", text, metavar="PACKAGE.MODULE:FUNCTION")
    text = "resize the short side of images to N pixels and crop the central square (default: as the model defines)"
    options.add(group, "--image-size", text, type=positive_int)
    text = "mean of each input channel (3, or 1 for grey images) in [0,1] (default: the model's; for --build 0)"
    options.add(group, "--mean", text, type=finite_float, nargs="+")
    text = "standard deviation of each input channel (default: the model's; for --build 1)"
    options.add(group, "--std", text, type=positive_float, nargs="+")
    options.add(group, "--class-names", "text file with one class name per line", type=Path, metavar="FILE")
    text = (
        "order of the class names: string (0, 1, 10, 11, 2, …, as torchvision's ImageFolder sorts folders) or numeric "
        "(default: as the model or --class-names gives them, else by number)"
    )
    options.add(group, "--class-order", text, choices=CLASS_ORDERS)


def _add_request(parser: Parser) -> None:
    group = parser.add_argument_group("request")
    text = (
        "folder of the images to forget, or of subfolders named by label (required). With --verify: the folders of one "
        "or more requests (optional)"
    )
    options.add(group, "--images", text, type=Path, nargs="+", metavar="FOLDER")
    options.add(
        group,
        "--output",
        "new folder for the model and its report (required, not with --verify)",
        type=Path,
        metavar="FOLDER",
    )
    text = (
        "CSV file with the columns file, label, new_label (default: labels.csv in the folder of images; an image "
        "without a label gets the model's prediction as its label)"
    )
    options.add(group, "--labels", text, type=Path, metavar="FILE")
    options.add_image_files(group, "that of the last request on the model or of its training, else ignore")
    options.add(group, "--skip-bad", "leave out files that cannot be read as images", action="store_true")
    text = (
        "share of the labelled images for which the model must predict the label. With fewer, the request stops: model "
        "or labels are probably not those in use (default: 0.5; of up to 4 images all but one; 0: no check)"
    )
    options.add(group, "--min-known", text, type=SHARE, metavar="X")
    options.add_single_label(group)
    text = "check the request, print what would be done and stop; nothing is written"
    options.add(group, "--dry-run", text, action="store_true")


def _add_method(parser: Parser) -> None:
    group = parser.add_argument_group("method")
    names = [name for name, method in registry.METHODS.items() if method.trains and "retain" not in method.needs]
    text = f"unlearning method: {', '.join(names)} (default: distill)"
    options.add(group, "--method", text, type=options.method_name, default="distill", metavar="NAME")
    options.add(group, "--minutes", "time limit of the whole command", type=positive_float, default=10.0)
    text = "end each run of the search after N steps (default: no limit)"
    options.add(group, "--max-steps", text, type=positive_int)
    text = (
        "settings of the method, such as distill_steps=300. Only these are run, unless all are of robust, "
        "loop_precision and distill_frozen: then the others are searched (default: search within the time limit; "
        "distill: robust=1)"
    )
    options.add(group, "--setting", text, type=setting, nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    text = "also forget these changed copies of the images, which damages the model more (default: none)"
    options.add(group, "--also", text, nargs="+", choices=CHANGES, default=[])
    text = (
        "folder of unlabelled images of the same kind as the training images, or of public images of other classes. "
        "Methods with a teacher such as distill use them in place of the training images (default: stand-ins made of "
        "the images to forget)"
    )
    options.add(group, "--surrogate", text, type=Path, metavar="FOLDER")
    text = "folder of images that must keep their predictions; the search takes agreement on them into account"
    options.add(group, "--keep-images", text, type=Path, metavar="FOLDER")
    text = "folder of images that the model was not trained on, for measuring membership inference"
    options.add(group, "--reference-images", text, type=Path, metavar="FOLDER")
    options.add(group, "--seed", "seed of the attack and the loop", type=nonnegative_int, default=0)


def _add_report(parser: Parser) -> None:
    group = parser.add_argument_group("report")
    options.add(group, "--request-id", "reference of the request, for the report", type=_line, metavar="TEXT")
    options.add(group, "--controller", "who is responsible for the request, for the report", type=_line, metavar="TEXT")
    options.add(group, "--requested-on", "date of the request, for the report", type=_date, metavar="YYYY-MM-DD")
    text = (
        "TOML file that lists what else contains the images (the original model, backups, derived and quantised "
        "models) and who was informed, for the report"
    )
    options.add(group, "--inventory", text, type=Path, metavar="FILE")
    options.add(group, "--no-thumbnails", "leave the images out of the report", action="store_true")
    options.add(group, "--sign", "sign the report with this Ed25519 private key", type=Path, metavar="KEY.pem")
    text = (
        "check a report.json, its model and its signature instead of forgetting; with --images also that the images "
        "are still forgotten"
    )
    options.add(group, "--verify", text, type=Path, metavar="REPORT")
    text = (
        "with --verify: repeat the request from the original model, and compare weights and predictions with the report"
    )
    options.add(group, "--again", text, action="store_true")
    text = (
        "with --again: the original model's file or folder (default: where the request read it, from the same working "
        "folder)"
    )
    options.add(group, "--original", text, type=Path, metavar="PATH")
    push.add_push(group, "if every image that was recognised is forgotten, or with --verify if no check fails")
    text = "with --verify: the Ed25519 public key that must have signed the report"
    options.add(group, "--public-key", text, type=Path, metavar="KEY.pem")
