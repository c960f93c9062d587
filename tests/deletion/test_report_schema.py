"""The schema of `report.json`: every difference is named, and committed reports fit."""

import copy
import json

from conftest import ROOT
import pytest

from l2ul.common.errors import InputError
from l2ul.deletion import verify
from l2ul.deletion.report_schema import Report, find_error, read_report

COMMITTED = sorted((ROOT / "result_data" / "reference" / "requests").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_committed_reports_fit_and_can_be_verified(path, tmp_path):
    report = read_report(path)
    assert all(check.passed is False for check in verify.check_files(report, tmp_path, {}))
    assert verify.check_chain(report, tmp_path) == ([report][:0], [])
    rows = verify.requirements([report])
    assert [row.label for row in rows] == [row["label"] for row in report["images"]]
    assert not any(row.superseded for row in rows)


@pytest.mark.reference
def test_a_committed_report_can_start_a_chain(tmp_path):
    text = COMMITTED[0].read_text()
    (tmp_path / "report.json").write_text(text)
    weights = json.loads(text)["model"]["after"]["weights_sha256"]
    chain = verify.read_chain(tmp_path, weights)
    assert chain == [json.loads(text)]
    (row,) = verify.earlier_rows(chain, tmp_path)
    assert (row["file"], row["images"], row["forgotten"]) == ("earlier/1.json", 16, 16)
    second = tmp_path / "second"
    second.mkdir()
    verify.copy_chain(tmp_path, second / row["file"])
    later = json.loads(text) | {"earlier": [row]}
    later["model"] = chain[0]["model"] | {"before": chain[0]["model"]["after"]}
    (second / "report.json").write_text(json.dumps(later))
    assert verify.read_chain(second, weights) == [*chain, later]


@pytest.mark.reference
def test_reports_without_optional_keys_fit():
    report = json.loads(COMMITTED[0].read_text())
    for key in ("damage", "robustness", "relearning", "membership", "trials", "chosen", "not_claimed", "seconds"):
        del report[key]
    del report["images"][0]["survives"], report["asked"]["also"], report["tool"]["torch"]
    assert find_error(report, Report) is None


def changed(keys, value):
    def change(report):
        for key in keys[:-1]:
            report = report[key]
        report[keys[-1]] = value

    return change


@pytest.mark.reference
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda report: report.pop("tool"), "tool is missing"),
        (lambda report: report["model"].pop("after"), "model.after is missing"),
        (lambda report: report["files"].pop("report.html"), "files.report.html is missing"),
        (changed(["images"], []), r"images is \[\]; expected at least one entry"),
        (changed(["images", 1, "label"], "cat"), r'images\[1\].label is "cat"; expected a whole number'),
        (changed(["images", 0, "label"], -3), r"images\[0\].label is -3; expected the number of a class"),
        (changed(["images", 0, "label"], True), r"images\[0\].label is true; expected a whole number"),
        (changed(["images", 0, "new_label"], 0.5), r"images\[0\].new_label is 0.5; expected a whole number"),
        (changed(["images", 0, "forgotten"], 1), r"images\[0\].forgotten is 1; expected true or false"),
        (changed(["model"], None), "model is null; expected an object"),
        (changed(["model", "classes", 2], 5), r"model.classes\[2\] is 5; expected text"),
        (changed(["model", "after", "files", "model.pt"], []), r"model.after.files.model.pt is \[\]; expected text"),
        (changed(["model", "opened_by", "image_size"], 0), "image_size is 0; expected a whole number from 1 to 65536"),
        (
            changed(["model", "opened_by", "mean"], [1, 2]),
            r"mean is \[1, 2\]; expected 1 or 3 numbers, one per channel",
        ),
        (changed(["model", "opened_by", "std"], [1, 2, 0]), r"std is \[1, 2, 0\]; expected 1 or 3 numbers above 0"),
        (changed(["model", "opened_by", "mean"], [1, 2, 10**400]), r"mean\[2\] is 10*…; expected a number"),
        (changed(["damage", 0, "percent"], float("nan")), r"damage\[0\].percent is NaN; expected a number"),
        (changed(["robustness"], {"flipped": "all"}), 'robustness.flipped is "all"; expected a whole number'),
        (
            changed(["earlier"], [{"file": "../1.json", "sha256": "", "made": "", "images": 1, "forgotten": 1}]),
            "earlier is .*; expected the files earlier/1.json, earlier/2.json",
        ),
    ],
)
def test_differences_are_named_with_their_place(tmp_path, change, expected):
    report = copy.deepcopy(json.loads(COMMITTED[0].read_text()))
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=f"is not a report of a deletion request .*{expected}"):
        read_report(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", r"the file is \[\]; expected an object"),
        (b"not JSON", "the file is not JSON text"),
        (b"\xff", "the file is not JSON text"),
        (b"[" * 100_000, "the file is not JSON text"),
        (None, "No such file"),
    ],
)
def test_files_that_are_not_reports(tmp_path, content, expected):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_report(path)
