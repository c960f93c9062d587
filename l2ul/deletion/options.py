"""The command line of a request to forget."""

from pathlib import Path

from l2ul.cli import options
from l2ul.cli.options import Parser
from l2ul.cli.parser import finite_float, nonnegative_int, positive_float, positive_int, setting
from l2ul.common.choices import CHANGES


def parser(program: str, doc: str) -> Parser:
    """All options of main_forget.py, which its first line of documentation describes."""
    found = Parser(doc.split("\n")[0], prog=program)
    for add in (add_classifier, add_request, add_search, add_report, options.add_machine):
        add(found)
    return found


def add_classifier(parser: Parser) -> None:
    group = parser.add_argument_group("the classifier")
    text = "hf:NAME, a folder of save_pretrained, torchvision:NAME, resnet20 …, or the --output of an earlier request"
    options.add(group, "--model", text, metavar="MODEL", default=None)
    text = "its weights, a file; for torchvision:NAME also the name of one of its own sets of weights"
    options.add(group, "--checkpoint", text, metavar="FILE")
    text = "a function that returns a torch module, which gives logits, in place of --model; its code is run"
    options.add(group, "--build", text, metavar="PACKAGE.MODULE:FUNCTION")
    text = "pixels a side that the middle of an image is brought to (default: as the model's own processor does)"
    options.add(group, "--image-size", text, type=positive_int)
    options.add(group, "--mean", "input means a channel (default: the model's)", type=finite_float, nargs=3)
    options.add(group, "--std", "input standard deviations a channel, likewise", type=positive_float, nargs=3)
    options.add(group, "--class-names", "text file of the classes' names, one a line", type=Path, metavar="FILE")


def add_request(parser: Parser) -> None:
    group = parser.add_argument_group("the request")
    text = "the images to forget: a folder, or one with a folder a label; with --verify those of several requests"
    options.add(group, "--images", text, type=Path, nargs="+", metavar="FOLDER")
    text = "CSV of file, label, new_label (default: labels.csv in the folder; no label: what the model calls an image)"
    options.add(group, "--labels", text, type=Path, metavar="FILE")
    options.add(group, "--skip-bad", "leave out files that cannot be read as images", action="store_true")
    options.add(group, "--output", "a new folder for the model and its report", type=Path, metavar="FOLDER")


def add_search(parser: Parser) -> None:
    group = parser.add_argument_group("how it is forgotten")
    options.add(group, "--method", "any that needs no other training images", default="distill", metavar="NAME")
    options.add(group, "--minutes", "that the whole command may take", type=positive_float, default=10.0)
    text = "forget the images as well when changed so, at the price of more damage (default: as they are)"
    options.add(group, "--also", text, nargs="+", choices=CHANGES, default=[])
    text = "settings of the method, such as distill_steps=300; then no others are tried"
    options.add(group, "--setting", text, type=setting, nargs="+", default=[], metavar="NAME=VALUE")
    text = "images that must keep working: the damage to them counts as well"
    options.add(group, "--keep-images", text, type=Path, metavar="FOLDER")
    text = "images that the model never saw, to measure membership inference with"
    options.add(group, "--reference-images", text, type=Path, metavar="FOLDER")
    options.add(group, "--seed", "of attack and loop", type=nonnegative_int, default=0)


def add_report(parser: Parser) -> None:
    group = parser.add_argument_group("the report")
    options.add(group, "--no-thumbnails", "keep the pictures out of it", action="store_true")
    options.add(group, "--sign", "sign it with this Ed25519 key", type=Path, metavar="KEY.pem")
    text = "check a report.json, its model and signature, and with --images that they are still forgotten"
    options.add(group, "--verify", text, type=Path, metavar="REPORT")
    options.add(group, "--public-key", "that the signature has to be by", type=Path, metavar="KEY.pem")
