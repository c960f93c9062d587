"""What an auditor reads in a request: outcome, threats, inventory, model card, and the repetition of the request."""

import json
import re
import shlex
import shutil

from conftest import FAST_REQUEST, TinyNet, save_images, tiny_net
import pytest
import requested as finished
import torch

from l2ul.common.errors import InputError
from l2ul.data import images as image_sets
from l2ul.deletion import options, states
from l2ul.deletion.flow import FREE
from l2ul.deletion.inventory import read_inventory
from l2ul.deletion.report import THREATS
from l2ul.deletion.report_schema import FORGOTTEN, NOT_RECOGNISED, STILL_RECOGNISED
import main_forget

BUILT = ["--build", "conftest:tiny_net"]
_folders, tmp_path, requested = finished._folders, finished.tmp_path, finished.requested  # fixtures
STILL = ["--setting", "distill_steps=1", "distill_cycles=1", "distill_lr=1e-9"]
INVENTORY = """
[[backups]]
name = "nightly <backup>"
action = "deleted"
date = 2026-11-20
location = "tape 7"

[[recipients]]
name = "Example Hospital"
action = "open"
note = "has the model since March"
"""


def verify(script, tmp_path, *words, images=("in",), output="out"):
    folders = ["--images", *(tmp_path / one for one in images)] if images else []
    path = tmp_path / output / "report.json"
    code, out, err = script(main_forget.main, "--verify", path, *folders, *BUILT, *words)
    return code, out + err


def test_reference_controller_date_inventory_and_threats_are_in_the_report(forget, tiny, tmp_path):
    (tmp_path / "copies.toml").write_text(INVENTORY)
    words = ["--request-id", "DSR-7", "--controller", "A & B", "--requested-on", "2026-11-01"]
    code, report, printed = forget(*words, "--inventory", tmp_path / "copies.toml")
    assert code == 0, printed
    asked = report["asked"]
    assert [asked[key] for key in ("request_id", "controller", "requested_on")] == ["DSR-7", "A & B", "2026-11-01"]
    assert next(iter(report.items())) == ("outcome", "removed from predictions")
    assert report["inventory"]["backups"][0]["date"] == "2026-11-20"
    assert report["threats"] == THREATS
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (
        "DSR-7",
        "A &amp; B",
        "2026-11-01",
        "nightly &lt;backup&gt;",
        "has the model since March",
        "nothing stated",
    ):
        assert text in page
    assert '<td class="bad">open</td>' in page
    assert "can find the images" in page
    assert f"carried out {report['made'][:10]} {report['made'][11:16]} UTC on" in page
    assert "(forgotten in " in page
    assert "<code>python</code> <code>main_forget.py</code> " in page  # a line of the command ends between words
    assert page.count("Threat:") == 6  # all but those of tests that this request did not need
    row = report["recalibration"]
    assert (row["images"], row["count"], row["before"]) == ("mixes of the images of the request", 512, 0)
    assert f"{row['after']:.1f} % after its batch-norm statistics are recomputed from 512 mixes" in page
    save_images(tmp_path / "keep", tiny[1][10:20])
    code, report, _ = forget("--keep-images", tmp_path / "keep", output="plain")
    assert (report["recalibration"]["images"], report["recalibration"]["count"]) == ("images to keep", 10)
    assert report["inventory"] is None
    assert "The operator made no statement" in (tmp_path / "plain" / "report.html").read_text()


class Fragile(TinyNet):
    """Return no finite logits once the statistics of batch-norm are recalibrated."""

    def forward(self, x):
        return super().forward(x) / int(self.features[1].num_batches_tracked == 25)  # steps of training


def test_logits_that_are_not_finite_after_the_recalibration_do_not_end_the_request(forget, tmp_path):
    model = ["--build", "test_report:Fragile", "--checkpoint", tmp_path / "tiny.pth"]
    code, report, printed = forget(model=model)
    assert code == 0, printed
    assert report["recalibration"]["after"] == report["recalibration"]["original_after"] == 0
    assert report["robustness"]["recalibrated"] is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "[[backup]]\nname = 'a'\naction = 'kept'",
            "there is no table backup; expected some of .*did you mean backups",
        ),
        ("[[backups]]\nname = 'a'\nactoin = 'kept'", "backups has no actoin; .*did you mean action"),
        ("[[backups]]\nname = 'a'", r"backups\[0\].action is missing"),
        ("[[backups]]\nname = ' '\naction = 'kept'", "expected text that is not empty"),
        ("[[backups]]\nname = 1\naction = 'kept'", r"backups\[0\].name is 1; expected text"),
        ("[[backups]]\nname = 'a'\naction = 'gone'", 'action is "gone"; expected one of deleted, replaced'),
        ("[[backups]]\nname = 'a'\naction = 'kept'\ndate = '1.2.2026'", "expected a date such as 2026-11-20"),
        ("[[backups]]\nname = 'a'\naction = 'kept'\ndate = 2026-11-20T10:00:00", "expected a date such as"),
        ("backups = 3", "backups is 3; expected a list"),
        ("backups = [3]", r"backups\[0\] is 3; expected an object"),
        ("[backups]\nname = 'a'", "backups is .*; expected a list"),
        ("{}", "it is not TOML"),
        (b"\xff\xfe\xfa", "it is not TOML"),
        ("a = " + "[" * 5000, "nested too deeply|it is not TOML"),
        (None, "No such file"),
    ],
)
def test_a_wrong_inventory_is_refused(tmp_path, content, expected):
    path = tmp_path / "copies.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as error:
        read_inventory(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["2026-13-01", "1.2.2026", "20261101", "2999-01-01", ""])
def test_wrong_dates_are_refused(text):
    with pytest.raises(SystemExit):
        options.parse("main_forget.py", ["--model", "m", "--images", "i", "--output", "o", "--requested-on", text])


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        ([FORGOTTEN, FORGOTTEN], "removed from predictions"),
        ([FORGOTTEN, NOT_RECOGNISED], "removed from predictions"),
        ([FORGOTTEN, STILL_RECOGNISED], "partly removed from predictions"),
        ([NOT_RECOGNISED, STILL_RECOGNISED], "not removed from predictions"),
        ([NOT_RECOGNISED], "nothing to remove"),
    ],
)
def test_the_outcome_follows_from_the_states(found, outcome):
    rows = [{"state": state, "new_label": None} for state in found]
    assert states.count(rows).outcome == outcome
    assert states.headline(rows, "misclassify").startswith(f"{outcome}: ")


@pytest.mark.parametrize(
    ("found", "earlier", "outcome"),
    [
        ([NOT_RECOGNISED] * 2, False, "nothing to remove"),
        ([NOT_RECOGNISED] * 2, True, "removed from predictions"),
        ([NOT_RECOGNISED, FORGOTTEN], False, "removed from predictions"),
        ([NOT_RECOGNISED, STILL_RECOGNISED], False, "not removed from predictions"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])  # another class than the label, or the new label
def test_images_that_were_not_recognised_are_not_removed_by_a_new_label(found, earlier, outcome, before):
    row = {"label": 1, "new_label": 2, "called_before": before, "forgotten_earlier": earlier}
    counts = states.count([row | {"state": state} for state in found])
    assert (counts.outcome, counts.successful) == (outcome, outcome == "removed from predictions")


def test_the_headline_says_that_relabelled_images_were_not_recognised():
    rows = [{"state": NOT_RECOGNISED, "label": 1, "new_label": 2, "called_before": 0}] * 3
    assert states.headline(rows, "relabel", counted="as used") == (
        "nothing to remove: the model recognised none of 3 images before; it predicts the new label of 3 now"
    )


def test_a_row_without_a_state_is_recognised_by_its_predicted_class():
    row = {"label": 1, "new_label": None, "forgotten": True}
    assert states.state(row | {"called_before": 0}) == NOT_RECOGNISED
    assert states.state(row | {"called_before": 1}) == states.state(row) == FORGOTTEN


def test_the_same_weights_and_predictions_result_again(forget, script, tmp_path):
    code, report, printed = forget("--seed", 3)
    assert code == 0, printed
    code, printed = verify(script, tmp_path, "--again")
    assert code == 0, printed
    assert f"ok     weights again: sha256 {report['model']['after']['weights_sha256']}, as in the report" in printed
    assert "ok     predictions again: 6 of 6 images as in the report" in printed
    words = report["again"]["command"]  # the command gives the same weights as well
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<code>{word}</code>" in page for word in ("--seed", "3", "distill_lr=0.02"))
    words = [tmp_path / "repeated" if word == "out-again" else word for word in words]
    code, out, err = script(main_forget.main, *words)
    assert code == 0, out + err
    repeated = json.loads((tmp_path / "repeated" / "report.json").read_text())
    assert repeated["model"]["after"] == report["model"]["after"]


def test_names_in_another_unicode_normal_form_are_the_same(forget, script, tmp_path):
    for old, new in (("3", "\u00e9"), ("5", "f")):
        (tmp_path / "in" / f"{old}.png").rename(tmp_path / "in" / f"{new}.png")
    code, _, printed = forget()
    assert code == 0, printed
    (tmp_path / "in" / "\u00e9.png").rename(tmp_path / "in" / "e\u0301.png")  # as on macOS
    code, printed = verify(script, tmp_path, "--again")
    assert (code, "ok     weights again" in printed) == (0, True), printed


def test_a_report_from_before_a_setting_is_repeated_as_it_was(forget, script, tmp_path):
    steps = ("distill_steps=40", "distill_cycles=1", "distill_mixes=16", "robust_pool=64", "robust_images=32")
    forget("--setting", *steps, "distill_lr=0.01", "robust_classes=1")
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    assert report["chosen"], "the model was changed"
    report["again"]["command"].remove("robust_classes=1.0")
    path.write_text(json.dumps(report))
    assert "ok     weights again" in verify(script, tmp_path, "--again")[1]
    report["again"]["command"].insert(report["again"]["command"].index("--setting") + 1, "robust_classes=0.0")
    path.write_text(json.dumps(report))
    assert "FAILED weights again" in verify(script, tmp_path, "--again")[1]


def test_images_of_surrogate_are_named_and_needed_again(forget, script, tiny, tmp_path):
    save_images(tmp_path / "week", tiny[1][10:20])
    code, report, printed = forget("--surrogate", tmp_path / "week")
    assert code == 0, printed
    assert (report["asked"]["surrogate"]["folder"], report["asked"]["surrogate"]["images"]) == ("week", 10)
    assert "10 unlabelled images in week" in (tmp_path / "out" / "report.html").read_text()
    code, printed = verify(script, tmp_path, "--again")
    assert code == 0, printed
    assert "ok     images of --surrogate: 10 in week are those of the request" in printed
    next((tmp_path / "week").iterdir()).unlink()
    code, printed = verify(script, tmp_path, "--again")
    assert (code, "FAILED images of --surrogate: 9 in week are not those" in printed) == (3, True)


def test_the_same_image_may_be_in_several_folders_of_surrogate(forget, tiny, tmp_path):
    for name in ("cat", "dog"):  # the labels are not read
        save_images(tmp_path / "week" / name, tiny[1][10:20])
    (tmp_path / "week" / "labels.csv").write_text("of other software")
    code, report, printed = forget("--surrogate", tmp_path / "week")
    assert (code, report["asked"]["surrogate"]["images"]) == (0, 10), printed


def test_a_run_that_the_time_limit_ended_is_repeated(forget, script, tmp_path):
    settings = ["--setting", "distill_steps=40", "distill_mixes=16", "distill_lr=0.01"]
    _, report, printed = forget(*settings, "--max-steps", 23)
    assert (report["trials"][0]["status"], report["trials"][0]["steps"]) == ("stopped", 23), printed
    if report["chosen"]:
        assert "--max-steps" in report["again"]["command"]
    assert "ended at the limit of time or steps" in (tmp_path / "out" / "report.html").read_text()
    code, printed = verify(script, tmp_path, "--again")
    assert "ok     weights again" in printed


def test_an_unchanged_model_and_a_chain_are_repeated(requested, forget, script, tiny, tmp_path):
    forget(*STILL, output="same")
    code, printed = verify(script, tmp_path, "--again", output="same")
    assert (code, "ok     weights again" in printed) == (3, True)  # the images are still recognised
    save_images(tmp_path / "next", tiny[1][6:10])
    _, _, printed = forget(output="second", images="next", model=["--model", tmp_path / "out", *BUILT])
    code, printed = verify(script, tmp_path, "--again", images=["in", "next"], output="second")
    assert "ok     weights again" in printed
    assert "ok     predictions again: 4 of 4" in printed


def edit_state(report):
    report["images"][0]["state"] = NOT_RECOGNISED


def edit_probability(report):
    report["images"][1]["label_confidence_after"] = 0.5


@pytest.mark.parametrize("change", [edit_state, edit_probability])
def test_an_edited_report_is_noticed(requested, script, tmp_path, change):
    path, page = tmp_path / "out" / "report.json", tmp_path / "out" / "report.html"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    code, printed = verify(script, tmp_path)
    assert (code, "FAILED report.json: contradicts report.html" in printed) == (3, True)
    page.write_text(re.sub('<meta name="report.*', "", page.read_text()))  # the same in both, without its digest
    code, printed = verify(script, tmp_path, "--again")
    assert code == 3
    assert "ok     weights again" in printed
    assert "FAILED predictions again: 5 of 6 images as in the report; others: " in printed


@pytest.mark.parametrize(
    ("setting", "exit_code", "expected"),
    [
        ("distill_lr=1e30", 3, "FAILED weights again: the run diverged"),
        ("distill_lr=-1", 2, "distill_lr"),
    ],
)
def test_the_checks_are_printed_before_a_repetition_that_fails(
    requested, script, tmp_path, setting, exit_code, expected
):
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    words = report["again"]["command"]
    (place,) = (index for index, word in enumerate(words) if word.startswith("distill_lr="))
    words[place] = setting
    path.write_text(json.dumps(report))
    code, printed = verify(script, tmp_path, "--again")
    assert (code, expected in printed) == (exit_code, True), printed
    assert "FAILED report.json: contradicts report.html" in printed


def swap_model(tmp_path):
    torch.save(tiny_net(1).state_dict(), tmp_path / "tiny.pth")


def damage_model(tmp_path):
    (tmp_path / "tiny.pth").write_bytes(b"nothing")


def remove_image(tmp_path):
    (tmp_path / "in" / "3.png").unlink()


def add_image(tmp_path):
    save_images(tmp_path / "more", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    (tmp_path / "more" / "0.png").rename(tmp_path / "in" / "9.png")


def change_image(tmp_path):
    shutil.copy(tmp_path / "in" / "3.png", tmp_path / "in" / "4.png")
    (tmp_path / "in" / "3.png").write_bytes((tmp_path / "in" / "2.png").read_bytes())


def label_image(tmp_path):
    (tmp_path / "in" / "labels.csv").write_text("file,label\n0.png,4\n")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (swap_model, "FAILED original model: not the original model of the report"),
        (damage_model, "FAILED original model: cannot be opened: "),
        (remove_image, "FAILED original images: missing in .*: 3.png"),
        (change_image, "FAILED request: images and labels: "),
        (add_image, "FAILED request: images and labels: not in the report: 9.png"),
        (label_image, "FAILED request: images and labels: another label: 0.png"),
    ],
)
def test_other_inputs_are_noticed_and_nothing_is_repeated(requested, script, tmp_path, change, expected):
    change(tmp_path)
    code, printed = verify(script, tmp_path, "--again")
    assert code == 3, printed
    assert re.search(expected, printed), printed
    assert "weights again" not in printed


def test_the_original_may_have_moved(requested, script, tmp_path):
    (tmp_path / "tiny.pth").rename(tmp_path / "elsewhere.pth")
    code, printed = verify(script, tmp_path, "--again")
    assert (code, "there is no checkpoint" in printed) == (2, True), printed
    code, printed = verify(script, tmp_path, "--again", "--original", tmp_path / "elsewhere.pth")
    assert code == 0, printed


def set_words(*words):
    return lambda report: report["again"].update(command=list(words))


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (set_words("--help"), BUILT, "has --help, which is not a flag of a request"),
        (set_words("-h"), BUILT, "has -h, which"),
        (set_words("--build=os:abort"), BUILT, "has --build=os:abort, which"),
        (set_words("--images", "in", "--output", "x", "--sign", "key"), BUILT, "has --sign, which"),
        (lambda report: None, [], "its function as --build"),
        (lambda report: report.pop("again"), BUILT, "does not say how to repeat the request"),
    ],
)
def test_a_report_cannot_make_the_command_run_code_or_end_early(requested, script, tmp_path, change, words, expected):
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    code, out, err = script(main_forget.main, "--verify", path, "--again", "--images", tmp_path / "in", *words)
    assert (code, expected in err) == (2, True), out + err


def test_the_help_names_the_settings_that_leave_the_search_on():
    (action,) = (flag for flag in options.parser("").flags if flag.dest == "setting")
    assert all(name in action.help for name in FREE)


def test_times_are_shown_in_utc():
    assert states.readable_time("2026-11-20T12:03:41+00:00") == "2026-11-20 12:03 UTC"
    assert states.readable_time("2026-11-20T12:03:41+01:00") == "2026-11-20T12:03:41+01:00"


def test_the_command_to_repeat_has_exact_settings():
    words = ["--model", "my net", "--images", "in", "--output", "a/out", "--mean", "-0.5", "0", "0", "--also", "jpeg"]
    args = options.parse("main_forget.py", [*words, "--sign", "key.pem", "--requested-on", "2026-11-01"])
    again = options.again(args, {"distill_lr": 1 / 3, "unlearn_lr": 1.0, "pgd_eps": 1.0}, 7, "cpu", 2)
    assert "my net" in again
    assert [again[again.index("--setting") + 1], "--sign" in again] == [f"distill_lr={1 / 3!r}", False]
    parsed = options.parse_again("main_forget.py", shlex.split(shlex.join(again)))
    assert (parsed.mean, parsed.also, parsed.max_steps, parsed.threads) == ([-0.5, 0, 0], ["jpeg"], 7, 2)
    assert parsed.setting == [("distill_lr", str(1 / 3))]


def test_a_hugging_face_folder_gets_a_model_card_without_names_and_pictures(script, vit_folder, tmp_path):
    images = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_images(tmp_path / "in", images)
    words = ["--model", vit_folder, "--images", tmp_path / "in", "--output", tmp_path / "out", *FAST_REQUEST]
    code, out, err = script(main_forget.main, *words)
    assert code in (0, 3), out + err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"**{report['outcome']}, as stored**" in card
    used = states.count(report["images"]).as_used
    assert re.search(rf"\| forgotten as used, also in changed copies,.* \| {used} \|", card)
    assert report["model"]["after"]["weights_sha256"] in card
    assert not any(row[key] in card for row in report["images"] for key in ("file", "sha256", "pixels_sha256"))
    assert "data:image" not in card
    assert ("robust_pool" in card) == bool(report["chosen"]["robust"])
    assert report["recalibration"] is None  # no batch-norm
    assert "recalibrated" not in report["robustness"]
    assert "recalibrated" not in report["images"][0]["survives"]
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", "--again"]
    code, out, err = script(main_forget.main, *words)
    assert "ok     weights again" in out, out + err
    (tmp_path / "out" / "model" / ".DS_Store").write_bytes(b"of a file manager")
    assert script(main_forget.main, *words[:2])[0] == 0
    (tmp_path / "out" / "model" / "README.md").write_text("another card")
    code, out, _ = script(main_forget.main, *words[:2])
    assert (code, "FAILED model: not the model of the report: README.md" in out) == (3, True)


def test_a_request_of_images_that_stay_uint8_gives_the_same_weights(forget, monkeypatch):
    also = ["--also", "flipped"]
    code, report, printed = forget(*also)
    monkeypatch.setattr(image_sets, "MAX_FLOATS", 0)
    code, other, printed = forget(*also, output="stored")
    assert code == 0, printed
    assert other["model"]["after"]["weights_sha256"] == report["model"]["after"]["weights_sha256"]
    assert other["images"] == report["images"]
