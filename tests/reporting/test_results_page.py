"""Test the page of all results: well-formed, offline, with all numbers, and for damaged and hostile inputs."""

import base64
import hashlib
from html.parser import HTMLParser
import io
import json
import re
import shutil
import subprocess

from conftest import ROOT
import numpy as np
from PIL import Image
import pytest
from tabled import BEFORE, NONE, RECORD, folder, tables  # noqa: F401 fixtures
import torch

from l2ul.data import datasets
from l2ul.data.images import Images, Split
from l2ul.reporting import missing, read_records, results_page, rows, run_details, summary
from l2ul.reporting.results_page import Sections
import main_tables

REFERENCE = ROOT / "result_data" / "reference" / "digits"
VOID = {"meta", "input", "img", "br"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\u2028"


class Page(HTMLParser):
    """Parses a page. `tables` has the cells of each table by id, and `scripts` the text of each script by type."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables, self.scripts, self.text = [], [], {}, {}, []
        self.feed(text)
        self.close()
        assert not self.open
        self.data = json.loads(self.scripts["application/json"])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.tables[attributes.get("id")] = []
        elif tag == "tr":
            list(self.tables.values())[-1].append([])
        elif tag in ("th", "td"):
            list(self.tables.values())[-1][-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("type", "code")] = text
        elif any(tag in ("th", "td") for tag, _ in self.open):
            list(self.tables.values())[-1][-1][-1] += text
        self.text.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def cells(self, table, *first):
        """Return the cells of the first row of a table that begins with these, by heading."""
        heads, *lines = self.tables[table]
        return dict(zip(heads, next(line for line in lines if tuple(line[: len(first)]) == first), strict=True))


def make(*folders, data_dir="nowhere", with_thumbnails=True, selection=None):
    records, problems = read_records.read(folders)
    selection = selection or summary.Selection()
    blocks = summary.select(rows.blocks(records), None, selection)
    frame, shown = summary.summarise(blocks, selection), results_page.runs(blocks, selection)
    details = run_details.details(shown, data_dir, with_thumbnails, report=lambda sentence: None)
    sections = Sections(missing=missing.parts(blocks, selection), problems=problems)
    return results_page.page(frame, blocks, shown, details, [], sections)


@pytest.fixture(scope="module")
def digits():
    return make(REFERENCE)


def test_the_page_is_one_file_that_loads_nothing(digits):
    page = Page(digits)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)[^\s\"'>]", digits.split("<script")[0])
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert "url(" not in digits
    assert [attributes.get("type") for attributes in page.all("script")] == ["application/json", None]
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.scripts["code"].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")
    assert make(REFERENCE) == digits


def test_elements_that_the_script_looks_up_are_there(digits):
    page = Page(digits)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    named = set(re.findall(r"one\(\"#([\w-]+)\"\)", page.scripts["code"]))
    assert named <= ids
    labelled = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labelled <= ids
    assert set(page.data["facets"]) == set(results_page.FACETS)
    assert page.data["docs"]["acc_test"] == "accuracy on the test set, in percent"
    assert page.data["docs"]["steps"] == "optimizer steps taken"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_names_of_images_and_terms_are_not_taken_for_methods_of_javascript(digits):
    code = Page(digits).scripts["code"].partition("const rows = ")[0]
    values = {"runs": [], "forget": [["constructor", "__proto__"]], "sources": [{"classes": [], "images": {}}]}
    values |= {"docs": {}, "values": []}
    start = f"""
        globalThis.document = {{ getElementById: () => ({{ textContent: {json.dumps(json.dumps(values))} }}) }};
        {code}
        const made = [];
        make = (tag, attributes, ...children) => (made.push(attributes.title), tag);
        plot = (title) => title;
        forgetSet({{ forget: 0, source: 0, goal: "misclassify", before: [1, 2], after: [2, 1] }});
        forgetSet({{ forget: 0, source: null, goal: "misclassify", before: [1, 2], after: [2, 1] }});
        values({{ constructor: 1 }});
        console.log(JSON.stringify(made.filter((title) => title)));
    """
    done = subprocess.run(["node", "-e", start], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    images = ["constructor, prediction class 1 → class 2", "__proto__, prediction class 2 → class 1"]
    assert json.loads(done.stdout) == [f"image {image}" for image in images] * 2


def test_tables_show_means_with_spread_number_of_runs_and_published_figures(folder):  # noqa: F811
    net = {"model": "resnet18", "k": 256}
    seeds = [net | {"seed": seed, "acc_test": 70.0 + seed, "seconds_unlearn": 1.0 + seed} for seed in range(3)]
    where = folder(net | BEFORE, *seeds, net | {"seed": 3, "status": "cap"}, net | {"method": "oracle", "k": 2})
    page = Page(make(where))
    row = page.cells("means", "adv", "256")
    assert row["D_test"] == "71.00 ± 1.00 (3 of 4; 1 cap)"
    assert row["D_test, published ¹"] == "36.69"
    assert (row["seconds"], row["runs"]) == ("1.5", "4")
    assert page.cells("means", "StructGuard", "256")["trains on"] == "not known"
    assert page.cells("means", "oracle", "256")["trains on"] == "D_f, D_r"  # published, without runs of ours
    assert "Published by others" in " ".join(page.text)
    assert len(page.tables["runs"]) == 1 + 6
    values = [attributes["data-v"] for attributes in page.all("td") if "data-v" in attributes]
    assert "71.0" in values
    assert "data set cifar10, model resnet18, goal misclassify" in " ".join(" ".join(page.text).split())


def test_rows_have_what_they_are_filtered_by(folder):  # noqa: F811
    faces = {"dataset": "utkface", "age_grouping": "TNN", "needs_retain": True, "goal": "relabel"}
    page = Page(make(folder({}, faces, {"surrogate": "pets", "seed": 5})))
    filtered = [attributes for attributes in page.all("tr") if "data-row" in attributes]
    assert {attributes["data-dataset"] for attributes in filtered} == {"cifar10", "utkface TNN"}
    assert {attributes["data-needs"] for attributes in filtered} == {"D_f", "D_f, D_r", "D_f, surrogate"}
    means = [attributes["data-row"] for attributes in filtered[:3]]
    assert sorted(means) == sorted(attributes["data-row"] for attributes in filtered[3:]) == ["0", "1", "2"]


def test_further_metrics_have_a_table_of_their_own(folder):  # noqa: F811
    page = Page(make(folder({"metric_tow": 0.5, "acc_yours": 7.0}, {"seed": 1, "metric_tow": 0.25}, BEFORE)))
    assert page.tables["metrics"][0] == ["method", "ToW", "yours", "trains on"]
    assert page.tables["metrics"][1:] == [["adv", "0.3750 ± 0.1768", "7.00 (n=1)", "D_f"]]


def test_details_of_runs_hold_curve_settings_and_the_images_once(digits):
    data = Page(digits).data
    assert len(data["runs"]) == 7
    assert len(data["forget"]) == len(data["sources"]) == 1
    (forget,), (source,) = data["forget"], data["sources"]
    images = datasets.load("digits", "nowhere")
    assert source["classes"] == images.classes
    assert {int(name): label for name, (label, _) in source["images"].items()} == {
        index: int(images.train.labels[index]) for index in forget
    }
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(source["images"][str(forget[0])][1].split(",")[1]))))
    shown = images.train.images[forget[0]].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(picture - shown).mean() < 8  # WebP is not exact
    for run in data["runs"]:
        record = json.loads((REFERENCE / "runs" / f"{run['id']}.json").read_text())
        kept = {name: value for role in run["values"].values() for name, value in data["values"][role].items()}
        assert kept == {name: value for name, value in record.items() if value is not None}
        predictions = np.load(REFERENCE / "runs" / f"{run['id']}.npz")
        assert run["before"] == predictions["forget_before"].tolist()
        assert run["after"] == predictions["forget_after"].tolist()
        if record["method"] != "before":
            assert run["curve"]["steps"][-1] == record["steps"]
            assert dict(run["curve"]["terms"])["acc_forget"][-1] == record["acc_forget"]
        assert not run["notes"]


def test_no_thumbnails_leaves_out_images_and_keeps_labels():
    page = make(REFERENCE, with_thumbnails=False)
    assert "data:image" not in page
    (source,) = Page(page).data["sources"]
    assert all(url is None and isinstance(label, int) for label, url in source["images"].values())


def test_first_images_of_each_run_have_the_thumbnails_if_there_are_too_many(monkeypatch):
    monkeypatch.setattr(run_details, "MOST_THUMBNAILS", 3)
    data = Page(make(REFERENCE)).data
    (images,) = (source["images"] for source in data["sources"])
    assert [bool(images[str(index)][1]) for index in data["forget"][0]] == [True] * 3 + [False] * 13


def test_names_are_text_wherever_they_stand(folder, monkeypatch):  # noqa: F811
    split = Split(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    hostile = Images(HOSTILE, 2, [HOSTILE, "b"], split, split)
    monkeypatch.setitem(datasets.LOADERS, HOSTILE, lambda data_dir, **options: hostile)
    names = {"dataset": HOSTILE, "model": HOSTILE, "method": HOSTILE, "device": HOSTILE, HOSTILE: HOSTILE}
    where = folder(names | {"course": f"a={HOSTILE.replace(' ', '')}"}, {"status": "failed", "error": HOSTILE} | NONE)
    (where / "runs" / "00.txt").write_text(f"3\n{HOSTILE.rstrip(chr(0x2028))}\n")
    (where / "runs" / "00.csv").write_text('step,"' + HOSTILE.replace('"', '""') + '"\n1,2.0\n')
    (where / "runs" / f"{HOSTILE.replace('/', '')}.json").write_text("{}")
    text = make(where)
    page = Page(text)
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    run = next(run for run in page.data["runs"] if run["id"] == "00")
    assert run["curve"]["terms"][0][0] == HOSTILE
    assert page.data["sources"][0]["classes"][0] == HOSTILE
    assert page.data["values"][run["values"]["further keys"]] == {HOSTILE: HOSTILE}
    assert HOSTILE in [attributes.get("data-dataset") for attributes in page.all("tr")]
    assert text.count("alert(1)") > 5
    assert "<img" not in text
    assert text.count("</script>") == 2


def test_records_alone_give_a_page_with_notes(folder, tmp_path):  # noqa: F811
    runs = ({"seed": 0}, {"seed": 1}, {"seed": 2, "status": "diverged"} | NONE, {"seed": 3, "future_key": 5})
    where = folder(*runs, {"seed": 4, "status": "failed", "error": "line 1\nline 2"} | NONE)
    for name, content in {
        "01.npz": b"no",
        "01.csv": b"\xff\x00",
        "01.txt": b"\xff",
        "02.csv": b"step,a\n1,\n2,inf\n",
    }.items():
        (where / "runs" / name).write_bytes(content)
    np.savez(where / "runs" / "03.npz", forget_before=np.array([1, 2]), forget_after=np.array([[7], [8]]))
    (where / "runs" / "03.txt").write_text("1\n2\n3\n99999999999999999999999\n")
    (where / "runs" / "03.csv").write_text("step,a\n1,0.5\n2,\n3,1e999\nx,2\n4,7\n")
    (where / "runs" / "99.json").write_text("{")
    (where / "runs" / "98.json").write_text(json.dumps(RECORD | {"model": "\ud800"}))
    page = Page(make(where))
    by_id = {run["id"]: run for run in page.data["runs"]}
    assert len(by_id) == 5
    assert "There are no predictions: " in by_id["00"]["notes"][0]
    assert "The images of D_f are not known: " in by_id["00"]["notes"][1]
    assert "is damaged" in by_id["01"]["notes"][0]
    assert "cannot be read: it is not a table" in by_id["01"]["notes"][2]
    assert by_id["02"]["curve"] is None
    assert by_id["03"]["curve"] == {"steps": [1, 2, 3, 4], "terms": [["a", [0.5, None, None, 7]]]}
    assert (by_id["03"]["before"], by_id["03"]["after"]) == ([1, 2], [7, 8])
    assert page.data["forget"][by_id["03"]["forget"]] == [3, "99999999999999999999999"]  # a later step of several
    assert "Images and labels of D_f are not shown: cifar10 is not complete" in by_id["03"]["notes"][0]
    assert page.data["values"][by_id["03"]["values"]["further keys"]] == {"future_key": 5}
    assert by_id["04"]["notes"] == []
    assert page.data["values"][by_id["04"]["values"]["result"]]["error"] == "line 1\nline 2"
    assert "99.json: is not JSON" in " ".join(page.text)
    assert "98.json: is not JSON" in " ".join(page.text)
    assert page.cells("runs", "adv", "2")["status"] == "diverged"


def test_a_long_curve_is_thinned(folder):  # noqa: F811
    where = folder({})
    (where / "runs" / "00.csv").write_text("step,a\n" + "".join(f"{step},{step / 7}\n" for step in range(1, 5001)))
    (run,) = Page(make(where)).data["runs"]
    assert len(run["curve"]["steps"]) == run_details.MOST_POINTS
    assert (run["curve"]["steps"][0], run["curve"]["steps"][-1]) == (1, 5000)
    assert run["curve"]["terms"][0][1][-1] == 714.3


def test_the_same_name_in_two_folders_gives_two_runs(folder):  # noqa: F811
    where = folder({}, into="a/runs")
    folder({"seed": 1}, into="b/runs")
    shutil.move(where / "b" / "runs" / "01.json", where / "b" / "runs" / "00.json")
    assert [run["id"] for run in Page(make(where)).data["runs"]] == ["00", "00.1"]


def test_the_script_writes_the_page_beside_the_tables_with_figures(folder, tables, tmp_path):  # noqa: F811
    folder(BEFORE, {}, {"seed": 1}, {"k": 64})
    tables("--html", "--figures", 1, "--expected", tmp_path)
    page = Page((tmp_path / "tables" / main_tables.PAGE).read_text())
    (figure,) = page.all("figure")
    assert (figure["data-dataset"], figure["data-goal"]) == ("cifar10", "misclassify")
    source = page.all("img")[0]["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(source) == (tmp_path / "tables" / "cifar10_resnet20_1_accuracy_against_k.png").read_bytes()
    text = " ".join(page.text)
    assert "Expected: these runs beside the reference runs" in text
    assert "rows with several reference runs are within their spread" in text
    assert "Missing: no record yet" in text
    assert "python main_unlearn.py --dataset cifar10" in text


def test_a_page_without_runs_says_so(folder, tables, tmp_path):  # noqa: F811
    folder({})
    tables("--html", "--seed", 9)
    page = Page((tmp_path / "tables" / main_tables.PAGE).read_text())
    assert "There is no record of the selected runs." in " ".join(page.text)
    assert page.data["runs"] == []
    (tmp_path / "runs" / "00.json").write_text("{}")
    tables("--html")
    assert "00.json: is incomplete" in (tmp_path / "tables" / main_tables.PAGE).read_text()
