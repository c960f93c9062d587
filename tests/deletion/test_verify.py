"""Verification of reports: files, signatures, the chain of requests, and whether images are still forgotten."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
import sys

from conftest import CLASSES, TinyNet, predicted_classes, save_images
from PIL import Image
import pytest
import requested as finished
import torch

from l2ul.common.errors import InputError
from l2ul.data.image_files import ImageReader
from l2ul.deletion import deployed_model as deployed
from l2ul.deletion import report_schema, strategies, verify
from l2ul.deletion.request import ImageFile
import main_forget

BUILT = ["--build", "conftest:tiny_net"]
_folders, tmp_path, requested = finished._folders, finished.tmp_path, finished.requested  # fixtures


def test_a_chain_of_requests_is_kept_and_the_images_of_all_are_checked(requested, forget, script, tiny, tmp_path):
    save_images(tmp_path / "next", tiny[1][6:10])
    code, report, printed = forget(output="second", images="next", model=["--model", tmp_path / "out", *BUILT])
    assert code == 0, printed
    assert [one["images"] for one in report["earlier"]] == [6]
    assert "not checked: whether images of earlier requests (1) are still forgotten; check it with --verify" in printed
    report_path = tmp_path / "second" / "report.json"
    folders = ["--images", tmp_path / "in", tmp_path / "next"]
    code, out, _ = script(main_forget.main, "--verify", report_path, *folders, *BUILT)
    row = next(line for line in out.splitlines() if "images of request 1" in line)
    still = (predicted_classes(tmp_path / "second" / "model.pth", tiny[1][:6]) != tiny[2][:6]).sum()
    assert f"{still} of 6 images forgotten as stored" in row
    assert (code == 0) == (still == 6)
    assert "ok     images of request 2: 4 of 4" in out
    earlier = tmp_path / "second" / "earlier" / "1.json"
    earlier.write_text(earlier.read_text().replace('"goal"', '"Goal"'))
    code, out, _ = script(main_forget.main, "--verify", report_path)
    assert (code, "FAILED earlier/1.json: changed" in out) == (3, True)


def test_changed_files_and_remembered_images_fail(requested, script, tmp_path):
    path = tmp_path / "out" / "report.json"
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, out.count("ok     "), out.count("?      ")) == (0, 4, 2)
    assert "?      weights: not checked: give the function that builds the model as --build" in out
    assert "?      signature of report.json: none: the author of the report is unknown" in out
    (tmp_path / "out" / "report.html").write_text("another page")
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED report.html: changed" in out) == (3, True)
    code, out, _ = script(main_forget.main, "--verify", path, "--model", tmp_path / "tiny.pth")
    assert "FAILED model: not the model of the report: model.pth, tiny.pth" in out
    torch.save(torch.load(tmp_path / "tiny.pth", weights_only=True), tmp_path / "out" / "model.pth")
    code, out, _ = script(main_forget.main, "--verify", path, "--images", tmp_path / "in", *BUILT)
    assert code == 3
    assert "FAILED images of request 1: 0 of 6 images forgotten as stored; forgotten in the report, but not" in out


def test_an_unfulfilled_request_is_told_apart_from_a_changed_model(forget, script, tiny, tmp_path):
    code, report, printed = forget("--setting", "distill_lr=1e-9", "distill_steps=3", "distill_mixes=8", "robust=0")
    assert code == 3, printed
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *BUILT]
    code, out, _ = script(main_forget.main, *words)
    assert code == 3
    assert "0 of 6 images forgotten as stored; the request was not fulfilled for 0.png, 1.png, 2.png, …, as" in out
    assert out.count("FAILED") == 1  # the model is that of the report
    assert "in the report, but not now" not in out


def test_signed_reports(forget, script, tmp_path, monkeypatch):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(keys[0].private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    for number, key in enumerate(keys):
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"public{number}.pem").write_bytes(public)
    assert forget("--sign", tmp_path / "key.pem")[0] == 0
    words = ["--verify", tmp_path / "out" / "report.json", "--public-key"]
    assert script(main_forget.main, *words, tmp_path / "public0.pem")[0] == 0
    code, out, _ = script(main_forget.main, *words, tmp_path / "public1.pem")
    assert (code, "FAILED signature of report.json: invalid" in out) == (3, True)
    path = tmp_path / "out" / "report.json"
    path.write_text(path.read_text().replace('"forgotten": true', '"forgotten": false', 1))
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED signature of report.json: invalid" in out) == (3, True)
    (tmp_path / "out" / "report.json.sig").unlink()
    code, out, _ = script(main_forget.main, *words, tmp_path / "public0.pem")
    assert (code, "FAILED signature of report.json: missing" in out) == (3, True)
    (tmp_path / "out" / "report.json.sig").write_bytes(b"\xff\x00 no text")
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED signature of report.json: invalid" in out) == (3, True)
    for name in ("cryptography", "cryptography.exceptions", "cryptography.hazmat.primitives"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = script(main_forget.main, "--verify", path)
    assert (code, "signatures need the package cryptography" in err) == (2, True)


def edited(path, change):
    """Change a report as somebody who wants to hide something might."""
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def remove_image(report):
    del report["images"][0]


def replace_list(report):
    report["files"]["forget_list.csv"] = hashlib.sha256(b"\xff").hexdigest()


def change_weights(report):
    report["model"]["after"]["weights_sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove_image, "FAILED forget_list.csv: contradicts the report"),
        (replace_list, "FAILED forget_list.csv: contradicts the report"),
        (change_weights, "FAILED weights: not those"),
    ],
)
def test_an_edited_report_fails(requested, script, tmp_path, change, expected):
    path = tmp_path / "out" / "report.json"
    edited(path, change)
    if change == replace_list:
        (tmp_path / "out" / "forget_list.csv").write_bytes(b"\xff")
    code, out, _ = script(main_forget.main, "--verify", path, *BUILT)
    assert (code, expected in out) == (3, True)


def test_a_damaged_model_fails(requested, script, tmp_path):
    model = tmp_path / "out" / "model.pth"
    model.write_bytes(model.read_bytes()[:500])
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *BUILT]
    code, out, _ = script(main_forget.main, *words)
    assert code == 3
    assert "FAILED model: not the model of the report" in out
    assert "FAILED weights: cannot be read" in out
    assert "download it again" not in out  # advice for weights that a command is given


def test_verify_advises_only_what_it_takes(forget, script, tiny, tmp_path):
    save_images(tmp_path / "others", tiny[1][20:30])
    settings = ["robust=0", "distill_steps=16", "distill_mixes=16", "distill_lr=0.02"]
    code, _, printed = forget("--surrogate", tmp_path / "others", "--setting", *settings)
    assert code == 0, printed
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *BUILT]
    remedy = (
        "; to repeat the request, restore its files, or name its images with --images and its model with --original"
    )
    for change in (
        lambda: (tmp_path / "others").rename(tmp_path / "elsewhere"),
        lambda: (tmp_path / "in" / "0.png").write_text("damaged"),
        lambda: (tmp_path / "tiny.pth").unlink(),
    ):
        change()
        code, _, err = script(main_forget.main, *words, "--again")
        assert (code, remedy in err) == (2, True), err
        assert not {"--skip-bad", "--checkpoint", "--image-size"} & set(re.findall(r"--[a-z-]+", err))
    code, out, _ = script(main_forget.main, *words)
    assert (code, "?      files that cannot be read: 1 (0.png: no image of a known format)" in out) == (3, True)
    for given in (["--skip-bad"], ["--minutes", 3], ["--dry-run"]):
        code, _, err = script(main_forget.main, *words, *given)
        assert (code, f"{given[0]} is for requests; leave it out with --verify" in err) == (2, True)
    code, _, err = script(main_forget.main, "--public-key", "key.pem")
    assert (code, "--public-key is for --verify" in err) == (2, True)


def test_a_request_with_another_method_is_repeated(forget, script, tmp_path):
    _, report, printed = forget("--method", "adv", "--setting", "unlearn_lr=0.01", "max_passes=20", "bn=eval")
    assert report["chosen"]["bn"] == "eval", printed
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *BUILT]
    _, out, err = script(main_forget.main, *words, "--again")
    assert "ok     weights again" in out, err
    code, _, printed = forget("--method", "adv", "--setting", "bn=train", output="other")
    assert (code, "setting bn is train, but deletion requests leave" in printed) == (2, True)


def places(value, way=()):
    """Yield the paths of keys to all values of a report."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*way, key))


def test_a_report_with_any_wrong_value_is_refused_or_can_be_checked(requested, forget, script, tmp_path):
    forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    path, words = tmp_path / "second" / "report.json", ["--images", tmp_path / "in", *BUILT]
    report = json.loads(path.read_text())
    del report["trials"], report["robustness"], report["images"][2:]
    ways = [way for way in places(report) if way]
    refused = 0
    for way in ways:
        for wrong in (None, [], {}, "../../etc/passwd", -3, 0.5):
            spoilt = copy.deepcopy(report)
            place = spoilt
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = wrong
            path.write_text(json.dumps(spoilt))
            try:
                checked = report_schema.read_report(path)
            except InputError:
                refused += 1
                continue
            verify.check_files(checked, path.parent, {})
            verify.check_chain(checked, path.parent)
            verify.check_images(verify.requirements([checked]), [])
            with contextlib.suppress(InputError):
                deployed.reopen(
                    checked["model"]["opened_by"], checked["model"]["classes"], tmp_path / "tiny.pth", BUILT[1]
                )
    assert refused > 100
    for name in ("images", "files"):
        path.write_text(json.dumps(report | {name: type(report[name])()}))
        code, _, err = script(main_forget.main, "--verify", path, *words)
        assert (code, "is not a report of a deletion request" in err) == (2, True)


def test_an_image_of_an_earlier_request_keeps_its_first_label(requested, forget, script, tiny, tmp_path):
    code, report, _ = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert (code, report["trials"]) == (0, [])  # the images are forgotten already
    assert {(row["state"], row["forgotten_earlier"]) for row in report["images"]} == {("not recognised before", True)}
    page = (tmp_path / "second" / "report.html").read_text()
    assert "0 of 6 images are forgotten as stored (0 as used), 6 were not recognised before (6 forgotten by" in page
    assert [row["label"] for row in report["images"]] == tiny[2][:6].tolist()
    assert report["asked"]["labels"] == "predictions of the model; for 6 images the label of an earlier request"
    words = ["--verify", tmp_path / "second" / "report.json", "--images", tmp_path / "in", *BUILT]
    code, out, _ = script(main_forget.main, *words)
    assert code == 0
    for number in (1, 2):
        assert f"ok     images of request {number}: 6 of 6 images forgotten as stored" in out


def test_a_request_as_used_forgets_what_an_earlier_one_forgot_as_stored_only(requested, script, tmp_path):
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["images"]
    count = sum(not row["forgotten_as_used"] for row in rows)
    words = ["--model", tmp_path / "out", *BUILT, "--images", tmp_path / "in", "--output", tmp_path / "second"]
    code, out, err = script(main_forget.main, *words, "--dry-run")
    assert (code, count > 0) == (0, True), err
    assert f"recognised before: {count} of 6" in out
    assert f"to be unlearned: {count} of 6" in out


def test_files_that_are_left_out_are_named(forget, tmp_path):
    (tmp_path / "in" / "damaged.png").write_bytes(b"no image")
    code, report, printed = forget("--skip-bad")
    assert (code, [one["file"] for one in report["asked"]["left_out"]]) == (0, ["damaged.png"])
    assert "left out: damaged.png: no image of a known format" in printed
    assert "0 are still recognised; 1 unreadable file left out: " in printed
    assert "still recognised; 1 unreadable file left out</title>" in (tmp_path / "out" / "report.html").read_text()


def test_an_image_that_was_neither_recognised_nor_relabelled_is_not_recognised_later(forget, script, tiny, tmp_path):
    rows = [f"{n}.png,{(label + 1) % CLASSES},{(label + 2) % CLASSES}" for n, label in enumerate(tiny[2][:6].tolist())]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,label,new_label", *rows]))
    code, report, printed = forget("--min-known", 0, "--max-steps", 1)
    assert (code, [row["state"] for row in report["images"]]) == (3, 6 * ["still recognised"]), printed
    (tmp_path / "in" / "labels.csv").unlink()
    words = ["--model", tmp_path / "out", *BUILT, "--images", tmp_path / "in", "--output", tmp_path / "second"]
    code, out, err = script(main_forget.main, *words, "--dry-run")  # as used
    assert (code, "recognised before: 0 of 6" in out) == (0, True), out + err
    words = ["--verify", tmp_path / "out" / "report.json", *BUILT, "--images", tmp_path / "in"]
    code, out, _ = script(main_forget.main, *words)
    assert "FAILED images of request 1: 0 of 0 images forgotten as stored; 6 not recognised before" in out


def test_again_counts_images_as_the_request_did_if_the_model_is_that_of_a_run_as_stored(
    monkeypatch, forget, script, tmp_path
):
    monkeypatch.setattr(strategies.Robust, "has_time_for_cycle", lambda *_: False)
    monkeypatch.setattr(strategies, "_steps_as_stored", lambda *_: 60)
    code, report, printed = forget("--setting", "robust=1", "--minutes", 10)
    assert (code, report["asked"]["counted"], report["chosen"]["robust"]) == (3, "as used", 0), printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Adversarial examples: mixes of images that were synthesised with the original model, moved" in page
    words = ["--verify", tmp_path / "out" / "report.json", *BUILT, "--images", tmp_path / "in", "--again"]
    code, out, err = script(main_forget.main, *words)
    assert (code, "ok     predictions again: 6 of 6 images as in the report" in out) == (0, True), out + err
    code, report, printed = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert (code, report["trials"]) == (0, []), printed
    assert "6 were not recognised before (6 forgotten by an earlier request)" in printed


def test_another_label_than_in_an_earlier_request_is_refused(requested, forget, tiny, tmp_path):
    again = ["--model", tmp_path / "out", *BUILT]
    now = predicted_classes(tmp_path / "out" / "model.pth", tiny[1][:6])
    save_images(tmp_path / "now", tiny[1][:6], now)  # to forget these might bring the true labels back
    code, report, printed = forget(images="now", output="second", model=again)
    assert (code, report) == (2, None)
    assert re.search(r"png has the label \d, but \d in an earlier request, as which the model might", printed)
    save_images(tmp_path / "first", tiny[1][:6], tiny[2][:6])
    assert forget(images="first", output="second", model=again)[0] == 0


def test_a_class_that_an_earlier_request_gave_an_image_can_be_forgotten(forget, tiny, tmp_path):
    rows = [f"{number}.png,{(int(label) + 1) % CLASSES}" for number, label in enumerate(tiny[2][:6])]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,new_label", *rows]))
    assert forget()[0] == 0
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    code, report, printed = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert (code, [row["state"] for row in report["images"]]) == (0, 6 * ["forgotten"]), printed


class Rolled(TinyNet):
    """The same weights with other code: the classes in another order."""

    def forward(self, x):
        return super().forward(x).roll(1, 1)


class Wide(TinyNet):
    """The same weights with code that does not accept the images."""

    def forward(self, x):
        return super().forward(x.repeat(1, 1, 1, 2))


class Broken(TinyNet):
    """The same weights with code that raises another exception."""

    def forward(self, x):
        return {}["logits"]


class NotFinite(TinyNet):
    """The same weights with code that divides by zero."""

    def forward(self, x):
        return super().forward(x) / 0


@pytest.mark.parametrize(
    ("build", "finding"),
    [
        ("Rolled", r"0 of 6 images as in the report; others: 0\.png"),
        ("Wide", "the model does not accept the images"),
        ("Broken", "the model does not accept the images: 'logits'"),
        ("NotFinite", "the logits of an image are not finite"),
    ],
)
def test_other_code_for_the_same_weights_fails(requested, script, tmp_path, build, finding):
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", "--build"]
    code, out, _ = script(main_forget.main, *words, "conftest:tiny_net")
    assert (code, "ok     predictions: 6 of 6 images as in the report" in out) == (0, True)
    code, out, _ = script(main_forget.main, *words, f"test_verify:{build}")
    assert "ok     weights: those of the report" in out
    assert code == 3
    assert re.search(f"FAILED predictions: {finding}", out)


def test_the_images_of_each_request_are_verified_as_it_read_them(forget, script, tiny, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for place in (tmp_path / "in").iterdir():
        Image.open(place).save(place, exif=exif)
    save_images(tmp_path / "others", tiny[1][6:8])
    assert forget()[0] == 0
    words = ["--exif-orientation", "obey", "--seed", 1]
    code, report, printed = forget(
        *words, images="others", output="second", model=["--model", tmp_path / "out", *BUILT]
    )
    assert (code, report["asked"]["exif_orientation"]) == (0, "obey"), printed
    folders = [tmp_path / "in", tmp_path / "others"]
    report = tmp_path / "second" / "report.json"
    model = deployed.reopen(
        json.loads(report.read_text())["model"]["opened_by"], [], report.parent / "model.pth", BUILT[1]
    )
    read, predictions = ImageReader.read_with_properties, {}

    def recorded(reader, path):
        image, about = read(reader, path)
        if path.parent == folders[0]:
            pixels = model.to_pixels(image)[None] / 255
            predictions[reader.exif_orientation, path.name] = int(model.classifier(pixels).argmax())
        return image, about

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageReader, "read_with_properties", recorded)
        code, out, err = script(main_forget.main, "--verify", report, "--images", *folders, *BUILT)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["images"]
    done = sum(predictions["ignore", row["file"]] != row["label"] for row in rows)
    assert f"images of request 1: {done} of 6 images forgotten as stored" in out, out + err
    assert "images of request 2: 2 of 2 images forgotten as stored" in out


def test_the_file_of_a_model_in_use_may_have_another_name(requested, script, tmp_path):
    shutil.copy(tmp_path / "out" / "model.pth", tmp_path / "production.pth")
    words = ["--verify", tmp_path / "out" / "report.json", *BUILT, "--model", tmp_path / "production.pth"]
    code, out, err = script(main_forget.main, *words)
    assert (code, "ok     model: unchanged" in out) == (0, True), out + err


def test_a_second_model_beside_the_report_is_refused(requested, script, tmp_path):
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    code, _, err = script(main_forget.main, "--verify", tmp_path / "out" / "report.json")
    assert (code, "(model.pth, model.safetensors); give the one in use as --model" in err) == (2, True)


def test_a_broken_chain_is_an_error_before_the_search(requested, forget, tmp_path):
    forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    (tmp_path / "second" / "earlier" / "1.json").unlink()
    code, report, printed = forget(output="third", model=["--model", tmp_path / "second", *BUILT])
    assert (code, report) == (2, None)
    assert "the chain of requests in" in printed
    assert "images to forget" not in printed


def test_the_file_of_an_output_is_no_original_model(requested, forget, tmp_path):
    file = [*BUILT, "--checkpoint", tmp_path / "out" / "model.pth"]
    code, report, printed = forget(output="second", model=file)
    assert (code, report) == (2, None)
    assert f"model.pth is the model of the request in {tmp_path / 'out'}; give --model {tmp_path / 'out'}, " in printed
    (tmp_path / "out" / "report.json").write_text("{}")  # of other software
    assert forget(output="second", model=file)[0] in (0, 3)


def test_a_replaced_model_does_not_continue_a_chain(requested, forget, tmp_path):
    shutil.copy(tmp_path / "tiny.pth", tmp_path / "out" / "model.pth")
    code, report, printed = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert (code, report) == (2, None)
    assert "out is not the one of the report there: it was replaced or changed; " in printed


def test_a_report_in_the_working_folder_starts_no_chain(requested, tiny, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "out")
    words = [*tiny[0], "--images", tmp_path / "in", "--output", tmp_path / "second", "--dry-run"]
    code, out, err = script(main_forget.main, *words)
    assert (code, "recognised before: 6 of 6" in out) == (0, True), err


def test_contradicting_requests_on_two_classes_supersede_each_other():
    model = {"classes": ["no", "yes"]}
    found = verify.requirements([{"model": model, "images": [image_row(label, None)]} for label in (0, 1)])
    assert [(one.request, one.superseded) for one in found] == [(2, False), (1, True)]
    checks = verify.check_images(found, [(ImageFile("a", "a", "a"), 0)])
    assert [check.passed for check in checks] == [None, True]  # of the first request, nothing is confirmed


def test_an_image_can_be_relabelled_as_its_original_class(requested, forget, tiny, tmp_path):
    rows = [f"{number}.png,{int(label)}" for number, label in enumerate(tiny[2][:6])]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,new_label", *rows]))
    code, report, printed = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert code == 0, printed
    assert [row["called_after"] for row in report["images"]] == tiny[2][:6].tolist()


def image_row(label, new_label, name="a"):
    return {"file": name, "sha256": name, "pixels_sha256": name, "label": label, "new_label": new_label}


@pytest.mark.parametrize(
    ("first", "second", "superseded"),
    [
        ((3, None), (3, None), False),
        ((3, None), (5, None), False),
        ((3, None), (3, 5), False),
        ((3, None), (5, 3), True),  # not 3, then 3
        ((3, 5), (3, 6), True),
        ((3, 5), (3, None), False),
        ((3, 5), (5, None), True),
    ],
)
def test_a_requirement_holds_until_a_later_request_contradicts_it(first, second, superseded):
    model = {"classes": list("0123456")}
    rows = [[image_row(*first), image_row(1, None, "b")], [image_row(*second)]]
    found = verify.requirements([{"model": model, "images": images} for images in rows])
    assert {(one.request, one.file, one.superseded) for one in found} == {
        (1, "a", superseded),
        (2, "a", False),
        (1, "b", False),
    }
    text = verify.check_images(found, [])[0].finding
    assert ("1 superseded by a later request" in text) == superseded
