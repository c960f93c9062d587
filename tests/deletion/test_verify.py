"""Reports are checked: files, signatures, the chain of requests, and that images are still forgotten."""

import contextlib
import copy
import json
import sys

from conftest import predicted_classes, save_images
import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.deletion import deployed_model as deployed
from l2ul.deletion import verify as audit
import main_forget

BUILT = ["--build", "conftest:tiny_net"]


def test_requests_in_a_row_keep_a_chain_and_earlier_images_stay_forgotten_or_are_named(forget, script, tiny, tmp_path):
    save_images(tmp_path / "next", tiny[1][6:10])
    assert forget()[0] == 0
    code, report, told = forget(output="second", images="next", model=["--model", tmp_path / "out", *BUILT])
    assert code == 0, told
    assert [one["images"] for one in report["earlier"]] == [6]
    report_path = tmp_path / "second" / "report.json"
    folders = ["--images", tmp_path / "in", tmp_path / "next"]
    code, out, _ = script(main_forget.main, "--verify", report_path, *folders, *BUILT)
    row = next(line for line in out.splitlines() if "images of request 1" in line)
    still = (predicted_classes(tmp_path / "second" / "model.pth", tiny[1][:6]) != tiny[2][:6]).sum()
    assert f"{still} of 6 images forgotten" in row
    assert (code == 0) == (still == 6)
    assert "ok     images of request 2: 4 of 4" in out
    earlier = tmp_path / "second" / "earlier" / "1.json"
    earlier.write_text(earlier.read_text().replace('"goal"', '"Goal"'))
    code, out, _ = script(main_forget.main, "--verify", report_path)
    assert (code, "FAILED earlier/1.json: changed" in out) == (3, True)


def test_a_report_that_no_longer_holds_is_told(forget, script, tmp_path):
    forget()
    path = tmp_path / "out" / "report.json"
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, out.count("ok     "), out.count("?      ")) == (0, 3, 2)
    assert "?      weights: not looked at: name by --build what builds the model" in out
    assert "?      signature of report.json: none: nothing tells who wrote this report" in out
    (tmp_path / "out" / "report.html").write_text("another page")
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED report.html: changed" in out) == (3, True)
    code, out, _ = script(main_forget.main, "--verify", path, "--model", tmp_path / "tiny.pth")
    assert "FAILED model: not the model of the report: model.pth, tiny.pth" in out
    torch.save(torch.load(tmp_path / "tiny.pth", weights_only=True), tmp_path / "out" / "model.pth")
    code, out, _ = script(main_forget.main, "--verify", path, "--images", tmp_path / "in", *BUILT)
    assert code == 3
    assert "FAILED images of request 1: 0 of 6 images forgotten; not forgotten: 0.png, 1.png, 2.png, …" in out


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
    verify = ["--verify", tmp_path / "out" / "report.json", "--public-key"]
    assert script(main_forget.main, *verify, tmp_path / "public0.pem")[0] == 0
    code, out, _ = script(main_forget.main, *verify, tmp_path / "public1.pem")
    assert (code, "FAILED signature of report.json: wrong" in out) == (3, True)
    path = tmp_path / "out" / "report.json"
    path.write_text(path.read_text().replace('"forgotten": true', '"forgotten": false', 1))
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED signature of report.json: wrong" in out) == (3, True)
    (tmp_path / "out" / "report.json.sig").unlink()
    code, out, _ = script(main_forget.main, *verify, tmp_path / "public0.pem")
    assert (code, "FAILED signature of report.json: missing" in out) == (3, True)
    (tmp_path / "out" / "report.json.sig").write_bytes(b"\xff\x00 no text")
    code, out, _ = script(main_forget.main, "--verify", path)
    assert (code, "FAILED signature of report.json: wrong" in out) == (3, True)
    for name in ("cryptography", "cryptography.exceptions", "cryptography.hazmat.primitives"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = script(main_forget.main, "--verify", path)
    assert (code, "signatures need the package cryptography" in err) == (2, True)


def edited(path, change):
    """Rewrite a report as one who wants to hide something may."""
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def list_less(report):
    del report["images"][0]


def other_weights(report):
    report["model"]["after"]["weights_sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (list_less, "FAILED forget_list.csv: says otherwise than the report"),
        (other_weights, "FAILED weights: not those"),
    ],
)
def test_a_report_that_was_edited_contradicts_itself(forget, script, tmp_path, change, expected):
    forget()
    path = tmp_path / "out" / "report.json"
    edited(path, change)
    code, out, _ = script(main_forget.main, "--verify", path, *BUILT)
    assert (code, expected in out) == (3, True)


def test_a_model_that_was_damaged_is_a_check_that_fails(forget, script, tmp_path):
    forget()
    model = tmp_path / "out" / "model.pth"
    model.write_bytes(model.read_bytes()[:500])
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *BUILT]
    code, out, _ = script(main_forget.main, *words)
    assert code == 3
    assert "FAILED model: not the model of the report" in out
    assert "FAILED weights: cannot be read" in out


def places(value, way=()):
    """The ways to all values within a report."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*way, key))


def test_whatever_is_wrong_in_a_report_it_is_none_or_can_be_checked(forget, script, tmp_path):
    forget()
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
                told = audit.read_report(path)
            except InputError:
                refused += 1
                continue
            audit.check_files(told, path.parent, {})
            audit.earlier_reports(told, path.parent)
            audit.check_images(audit.wanted([told]), [])
            with contextlib.suppress(InputError):
                deployed.reopen(told["model"]["opened_by"], told["model"]["classes"], tmp_path / "tiny.pth", BUILT[1])
    assert refused > 100
    for name in ("images", "files"):
        path.write_text(json.dumps(report | {name: type(report[name])()}))
        code, _, err = script(main_forget.main, "--verify", path, *words)
        assert (code, "is no report of a request" in err) == (2, True)


def test_an_image_that_is_asked_for_again_is_called_what_it_was_at_first(forget, script, tiny, tmp_path):
    forget()
    code, report, _ = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert (code, report["trials"]) == (0, [])  # it is forgotten already
    assert [row["label"] for row in report["images"]] == tiny[2][:6].tolist()
    assert report["asked"]["labels"] == "the model's own predictions, of 6 before an earlier request"
    words = ["--verify", tmp_path / "second" / "report.json", "--images", tmp_path / "in", *BUILT]
    code, out, _ = script(main_forget.main, *words)
    assert code == 0
    for number in (1, 2):
        assert f"ok     images of request {number}: 6 of 6 images forgotten" in out


def test_a_broken_chain_is_told_before_any_work(forget, tmp_path):
    forget()
    forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    (tmp_path / "second" / "earlier" / "1.json").unlink()
    code, report, told = forget(output="third", model=["--model", tmp_path / "second", *BUILT])
    assert (code, report) == (2, None)
    assert "the chain of requests in" in told
    assert "images to misclassify" not in told


def test_of_two_classes_an_image_cannot_be_neither():
    model = {"classes": ["no", "yes"]}
    found = audit.wanted([{"model": model, "images": [asked(label, None)]} for label in (0, 1)])
    assert [(one.request, one.superseded) for one in found] == [(2, False), (1, True)]


def test_an_image_may_be_called_again_what_it_was(forget, tiny, tmp_path):
    forget()
    rows = [f"{number}.png,{int(label)}" for number, label in enumerate(tiny[2][:6])]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,new_label", *rows]))
    code, report, told = forget(output="second", model=["--model", tmp_path / "out", *BUILT])
    assert code == 0, told
    assert [row["called_after"] for row in report["images"]] == tiny[2][:6].tolist()


def asked(label, new_label, name="a"):
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
def test_what_requests_want_holds_until_a_later_one_wants_what_cannot_hold_as_well(first, second, superseded):
    model = {"classes": list("0123456")}
    rows = [[asked(*first), asked(1, None, "b")], [asked(*second)]]
    found = audit.wanted([{"model": model, "images": images} for images in rows])
    assert {(one.request, one.file, one.superseded) for one in found} == {
        (1, "a", superseded),
        (2, "a", False),
        (1, "b", False),
    }
    text = audit.check_images(found, [])[0].found
    assert ("1 were later to be called otherwise" in text) == superseded
