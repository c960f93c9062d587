"""Wrong requests end with one sentence and exit code 2, and nothing is written."""

import json
import os
from pathlib import Path  # noqa: F401  # a --build function that returns no module
import shutil

from conftest import tiny_net
from helpers import write_image
import pytest
import torch
from torch import nn

import main_forget


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.mean((1, 2, 3))


class Several(Net):
    """Return logits inside another object."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap((self.scale * x).mean((2, 3)))


def pair():
    return Several(lambda logits: (logits, logits))


def named():
    return Several(lambda logits: {"out": logits})


def fails():
    raise ZeroDivisionError("no network today")


@pytest.fixture
def place(tmp_path):
    """A folder with two images and the weights of a network."""
    for number in range(2):
        write_image(tmp_path / "in" / f"{number}.png", seed=number)
    torch.save(tiny_net().state_dict(), tmp_path / "tiny.pt")
    return tmp_path


def script_program(place):
    torch.jit.save(torch.jit.trace(tiny_net(), torch.rand(1, 3, 8, 8)), place / "program.pt")


def exported_program(place):
    torch.export.save(torch.export.export(tiny_net(), (torch.rand(1, 3, 8, 8),)), place / "program.pt2")


def whole_module(place):
    torch.save(tiny_net(), place / "module.pt")


def damaged(place):
    (place / "damaged.pt").write_bytes((place / "tiny.pt").read_bytes()[:1000])


def not_a_number(place):
    state = tiny_net().state_dict()
    next(iter(state.values())).fill_(float("nan"))
    torch.save(state, place / "nan.pt")


def whole_numbers(place):
    torch.save({0: torch.ones(1), 1: torch.ones(1)}, place / "keys.pt")


def broken_zip(place):
    content = (place / "tiny.pt").read_bytes()
    central = content.rindex(b"PK\x01\x02")
    (place / "zip.pt").write_bytes(content[:central] + b"XX" + content[central + 2 :])


def odd_name(place):
    (place / "in" / "0.png").rename(place / "in" / os.fsdecode(b"caf\xe9.png"))


def empty_folder(place):
    (place / "empty").mkdir()


def truncated(place):
    path = write_image(place / "in" / "2.jpg", (64, 64))
    path.write_bytes(path.read_bytes()[:600])


def text(place):
    (place / "in" / "notes.txt").write_text("no write_image")


def other_size(place):
    write_image(place / "in" / "wide.png", (16, 8))


def large(place):
    write_image(place / "large" / "0.png", (4, 4))


def mixed(place):
    write_image(place / "in" / "3" / "a.png")


def deep(place):
    write_image(place / "deep" / "3" / "more" / "a.png")


def table(content):
    return lambda place: (place / "in" / "labels.csv").write_text(content)


def wrong_label(place):
    write_image(place / "labelled" / "cat" / "a.png")


def contradiction(place):
    for label in "12":
        write_image(place / "twice" / label / "a.png")


def also_kept(place):
    write_image(place / "keep" / "a.png", seed=1)


def other_images(place):
    write_image(place / "more" / "a.png", seed=9)


def full_output(place):
    write_image(place / "out" / "a.png")


def bad_key(place):
    (place / "key.pem").write_text("no key")


def names(place):
    (place / "names.txt").write_text("cat\ndog\n")


def bad_names(place):
    (place / "bad_names.txt").write_bytes(b"\xff\xfe\xfa")


def no_report(place):
    (place / "report.json").write_text(json.dumps({"some": "thing"}))


TINY = "--build conftest:tiny_net --checkpoint {}/tiny.pt"
REST = "--images {}/in --output {}/out"
CASES = [
    (None, f"{REST}", "no classifier is named; give --model"),
    (None, f"--model resnet20 {REST}", "no weights are given for resnet20; give their file as --checkpoint"),
    (None, f"--model resnet21 --checkpoint {{}}/tiny.pt {REST}", "unknown model 'resnet21'"),
    (None, f"--model {{}}/my_vit {REST}", "name a folder that exists, or name a module of your own with --build"),
    (None, f"--model resnet20 --checkpoint {{}}/none.pt {REST}", "there is no checkpoint"),
    (None, f"--model resnet20 --checkpoint {{}}/tiny.pt {REST}", "does not fit resnet20"),
    (None, f"--model {{}}/tiny.pt {REST}", "is a file; give the architecture as --model"),
    (empty_folder, f"--model {{}}/empty {REST}", "expected what save_pretrained writes"),
    (script_program, f"--model {{}}/program.pt {REST}", "is a TorchScript program"),
    (script_program, f"--build conftest:tiny_net --checkpoint {{}}/program.pt {REST}", "is a TorchScript program"),
    (exported_program, f"--model {{}}/program.pt2 {REST}", "is a torch.export program"),
    (whole_module, f"--build conftest:tiny_net --checkpoint {{}}/module.pt {REST}", "could run code when read"),
    (damaged, f"--build conftest:tiny_net --checkpoint {{}}/damaged.pt {REST}", "is damaged or is no checkpoint"),
    (None, f"--build conftest {REST}", "expected package.module:function"),
    (None, f"--build no_such_module:net {REST}", "cannot be imported"),
    (None, f"--build test_main_forget_errors:fails {REST}", "failed (ZeroDivisionError: no network today)"),
    (None, f"--build test_main_forget_errors:Path {REST}", "expected a torch.nn.Module"),
    (None, f"--build test_main_forget_errors:Net {REST}", "expected one logit per class"),
    (
        None,
        f"--build test_main_forget_errors:pair {REST}",
        "returns a tuple of 2 x 3, 2 x 3, where several entries may be the logits",
    ),
    (
        None,
        f"--build test_main_forget_errors:named {REST}",
        "returns a dict with 'out', from which no logits can be taken",
    ),
    (whole_numbers, f"--build conftest:tiny_net --checkpoint {{}}/keys.pt {REST}", "holds no state dict"),
    (broken_zip, f"--build conftest:tiny_net --checkpoint {{}}/zip.pt {REST}", "is damaged or is no checkpoint"),
    (odd_name, f"{TINY} {REST}", "is not UTF-8; rename the file or folder"),
    (table("file,label\n0.png,1,\n1.png,2,\n"), f"{TINY} {REST}", "a row has more fields than the first one"),
    (None, f"--build torch.nn:Identity {REST}", "has no weights; expected a classifier"),
    (None, f"--model resnet20 {TINY} {REST}", "give one of them"),
    (None, f"{TINY} --images {{}}/none --output {{}}/out", "is not a folder"),
    (empty_folder, f"{TINY} --images {{}}/empty --output {{}}/out", "contains no image"),
    (truncated, f"{TINY} {REST}", "1 of 3 files in"),
    (text, f"{TINY} {REST}", "notes.txt: no image of a known format"),
    (other_size, f"{TINY} {REST}", "give it with --image-size"),
    (large, f"{TINY} --images {{}}/large --output {{}}/out", "the model does not accept images of 4 x 4 pixels"),
    (mixed, f"{TINY} {REST}", "beside folders of labels"),
    (deep, f"{TINY} --images {{}}/deep --output {{}}/out", "inside the folder of a label"),
    (wrong_label, f"{TINY} --images {{}}/labelled --output {{}}/out", "label 'cat' is not a class of the model"),
    (contradiction, f"{TINY} --images {{}}/twice --output {{}}/out", "are the same image with different labels"),
    (table("file,label\n7.png,1\n"), f"{TINY} {REST}", "lists '7.png', which is not in"),
    (table("file,class\n0.png,1\n"), f"{TINY} {REST}", "expected file, and label or new_label"),
    (table("file,label\n0.png,1\n0.png,2\n"), f"{TINY} {REST}", "more than once"),
    (table("file,label\n0.png ,1\n"), f"{TINY} {REST}", "lists '0.png ', which is not in"),
    (table("file;label\n0.png;1\n"), f"{TINY} {REST}", "separated by commas"),
    (table(f"file,label\n0.png,{'9' * 5000}\n"), f"{TINY} {REST}", "is not a class of the model"),
    (table("file,label\n0.png,9\n"), f"{TINY} {REST}", "label '9' is not a class of the model"),
    (
        table("file,new_label\n0.png,1\n"),
        f"{TINY} {REST}",
        "1.png has no new_label; give one for every image, or for none",
    ),
    (table("file,label,new_label\n0.png,1,1\n1.png,1,2\n"), f"{TINY} {REST}", "give another class"),
    (table(""), f"{TINY} {REST}", "cannot read the label table"),
    (full_output, f"{TINY} {REST}", "exists already; give a new folder"),
    (None, f"{TINY} --images {{}}/in --output {{}}/in/out", "which must stay unchanged"),
    (also_kept, f"{TINY} {REST} --keep-images {{}}/keep", "is also an image to forget"),
    (also_kept, f"{TINY} {REST} --surrogate {{}}/keep", "of --surrogate is also an image to forget"),
    (
        other_images,
        f"{TINY} {REST} --surrogate {{}}/more --reference-images {{}}/more",
        "is also an image of --surrogate",
    ),
    (None, f"{TINY} {REST} --surrogate {{}}/in --method neggrad", "is for methods with a teacher"),
    (names, f"{TINY} {REST} --class-names {{}}/names.txt", "has 5 classes, but 2 class names are given"),
    (None, f"{TINY} {REST} --method oracle", "trains on the retain set"),
    (None, f"{TINY} {REST} --method nothing", "unknown method 'nothing'"),
    (None, f"{TINY} {REST} --setting steps=3", "method distill has no setting steps"),
    (None, f"{TINY} {REST} --setting unlearn_lr=0.1", "method distill has no setting unlearn_lr"),
    (not_a_number, f"--build conftest:tiny_net --checkpoint {{}}/nan.pt {REST}", "logits that are not finite"),
    (None, "--model hf:{} --images {}/in --output {}/out", "which must stay unchanged"),
    (None, f"{TINY} --images {{}}/in --output .", "exists already"),
    (None, f"{TINY} {REST} --minutes 0", "'0' is not allowed; expected a number above 0"),
    (bad_key, f"{TINY} {REST} --sign {{}}/key.pem", "is not a usable key"),
    (no_report, "--verify {}/report.json", "is not a report of a deletion request"),
    (None, "--verify {}/none.json", "is not a report of a deletion request"),
    (None, f"{TINY} {REST} --inventory {{}}/none.toml", "cannot read the inventory"),
    (None, f"{TINY} {REST} --requested-on 1.2.2026", "'1.2.2026' is not allowed; expected a date such as 2026-11-20"),
    (None, f"{TINY} {REST} --requested-on 2999-01-01", "'2999-01-01' is in the future"),
    (None, f"{TINY} {REST} --again", "--again is for --verify"),
    (None, "--verify {}/report.json --original {}", "--original is for --again"),
    (None, "", "give --images FOLDER to forget and --output FOLDER"),
    (None, f"{TINY} --images {{}}/in {{}}/in --output {{}}/out", "--images names 2 folders"),
    (None, "--verify {}/report.json --dry-run", "--dry-run is for requests"),
    (bad_names, f"{TINY} {REST} --class-names {{}}/bad_names.txt", "cannot read --class-names"),
    (None, f"{TINY} --images {{}}/in --output {{}}/tiny.pt/out", "cannot write to"),
    (None, f"{TINY} --images {{}}/in --output {{}}/{'long' * 60}", "cannot write to --output"),
    (None, f"{TINY} --images {{}}/in --output /", "--output / exists already"),
]


@pytest.mark.parametrize(("spoil", "words", "expected"), CASES, ids=[f"{n}-{case[2]}" for n, case in enumerate(CASES)])
@pytest.mark.parametrize("dry_run", [False, True])
def test_wrong_requests(script, place, spoil, words, expected, dry_run):
    if "--sign" in words:
        pytest.importorskip("cryptography")
    if dry_run and "--verify" in words:
        pytest.skip("--verify has no dry run")
    if spoil:
        spoil(place)
    before = sorted(place.rglob("*"))
    code, out, err = script(
        main_forget.main, *words.replace("{}", str(place)).split(), *(["--dry-run"] if dry_run else [])
    )
    assert code == 2, out + err
    assert expected in err
    assert err.count("\n") == 1
    assert sorted(place.rglob("*")) == before  # nothing was written


def test_the_output_cannot_be_the_working_folder(script, place, monkeypatch):
    empty_folder(place)
    monkeypatch.chdir(place / "empty")
    code, _, err = script(main_forget.main, *f"{TINY} {REST}".replace("{}", str(place)).split()[:-1], ".")
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_its_library_does_not_write_is_refused_before_the_search(script, place, vit_folder, dry_run):
    folder = shutil.copytree(vit_folder, place / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_attentions": True}))
    before = sorted(place.rglob("*"))
    words = f"--model {folder} {REST}".replace("{}", str(place)).split()
    code, out, err = script(main_forget.main, *words, *(["--dry-run"] if dry_run else []))
    assert code == 2, out + err
    assert "cannot be written again in its form (ValueError: The `output_attentions` attribute" in err
    assert err.count("\n") == 1
    assert sorted(place.rglob("*")) == before
