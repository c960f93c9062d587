"""Deletion requests through `main_forget.py`: the written model, the report, the search, dry runs and progress."""

import contextlib
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time

from conftest import (
    CLASSES,
    FAST_REQUEST,
    ROOT,
    TinyNet,
    WithAverage,
    load_tiny_net,
    predicted_classes,
    save_images,
    tiny_net,
)
from PIL import Image
import pytest
import torch

from l2ul.common import progress
from l2ul.common.errors import InputError
from l2ul.common.files import file_sha256
from l2ul.deletion import candidates, checks, deployed_model, output, states
from l2ul.deletion.candidates import Candidate
from l2ul.metrics import preflight
from l2ul.unlearn import Settings
import main_forget

pytestmark = pytest.mark.usefixtures("fast_report")


class FullPrecision(torch.nn.Module):
    """Return float32 tensors for inputs of any type."""

    def forward(self, x):
        return x * torch.ones(1, 3, 1, 1, device=x.device)


def full_precision():
    net = tiny_net()
    net.register_module("full", FullPrecision())
    net.register_forward_pre_hook(lambda net, inputs: (net.full(inputs[0]),))
    return net


def with_numpy():
    """Return a net that looks at the pixels with NumPy, which has no bfloat16."""
    net = tiny_net()
    net.register_forward_pre_hook(lambda net, inputs: (torch.from_numpy(inputs[0].detach().numpy()) * 0 + inputs[0],))
    return net


def test_images_are_forgotten_and_the_model_is_written_in_its_own_form(forget, tiny, tmp_path):
    before = file_sha256(tmp_path / "tiny.pth")
    code, report, printed = forget()
    assert (code, report["images"][0]["forgotten"]) == (0, True), printed
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert list(written) == [
        "epoch",
        "state_dict",
    ]  # the tensors of the optimizer may contain information about the images
    assert report["model"]["left_out"] == ["optimizer"]
    _, images, labels = tiny
    now = predicted_classes(tmp_path / "out" / "model.pth", images)
    assert (now[:6] != labels[:6]).all()
    assert [row["called_after"] for row in report["images"]] == now[:6].tolist()
    assert [row["label"] for row in report["images"]] == labels[:6].tolist()  # the predictions of the model
    assert file_sha256(tmp_path / "tiny.pth") == before == report["model"]["before"]["files"]["tiny.pth"]
    assert "6 of 6 images are forgotten" in printed
    (note,) = report["asked"]["label_notes"]
    assert note.startswith(f"6 of 6 images have no label (0.png: predicted as {labels[0]} (")
    assert note in printed


def test_weights_that_no_gradient_reaches_are_named(forget, tiny, tmp_path):
    state = load_tiny_net(tmp_path / "tiny.pth").state_dict()
    both = {f"{part}.{name}": tensor for part in ("net", "average") for name, tensor in state.items()}
    torch.save(both, tmp_path / "both.pt")
    words = ["--build", "conftest:WithAverage", "--checkpoint", tmp_path / "both.pt"]
    code, report, printed = forget(model=words)
    assert (code, report["model"]["unreached"]) == (0, ["net.*"]), printed
    assert "no gradient of the predictions reaches net.*: these weights may stay as they are" in printed
    assert "net.*: these may be unchanged, and still contain" in (tmp_path / "out" / "report.html").read_text()
    model = WithAverage()
    model.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    assert (model.net.eval()(tiny[1][:6] / 255).argmax(1) == tiny[2][:6]).all()  # as the note says


def test_the_page_needs_no_other_files_and_agrees_with_the_report(forget, tmp_path):
    _, report, _ = forget()
    page = (tmp_path / "out" / "report.html").read_text()
    used = sum(row["forgotten_as_used"] for row in report["images"])
    assert (
        f"predictions: 6 of 6 images are forgotten as stored ({used} as used), 0 were not recognised before, 0" in page
    )
    assert page.count("prediction before: <bdi>") == page.count("prediction after: <bdi>") == 6
    assert "agreement with the original model: adversarial examples" in page
    assert "Adversarial examples: mixes of the images of the request, moved" in page
    assert page.count("data:image/png;base64,") == 6
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    for sentence in report["not_claimed"]:
        assert sentence.split(".")[0] in page
    for row in report["images"]:
        assert row["sha256"] in page
    names = (tmp_path / "out" / "forget_list.csv").read_text()
    assert ".png" not in names
    assert names.count("\n") == 7


def test_no_thumbnails_leaves_the_images_out_of_the_page(forget, tmp_path):
    forget("--no-thumbnails")
    assert "data:image" not in (tmp_path / "out" / "report.html").read_text()


def test_images_are_relabelled_as_the_label_table_says(forget, tiny, tmp_path):
    _, images, labels = tiny
    rows = [f"{number}.png,{(int(labels[number]) + 1) % CLASSES}" for number in range(6)]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,new_label", *rows]))
    code, report, printed = forget()
    assert code == 0, printed
    assert report["asked"]["goal"] == "relabel"
    assert (
        "Removed from predictions: the model predicts the new label of 6 of 6 images"
        in (tmp_path / "out" / "report.html").read_text()
    )
    now = predicted_classes(tmp_path / "out" / "model.pth", images)
    assert (now[:6] == (labels[:6] + 1) % CLASSES).all()


def test_new_labels_of_images_that_were_not_recognised_are_no_success(forget, script, tiny, tmp_path):
    labels = tiny[2][:6].tolist()
    rows = [f"{number}.png,{(label + 1) % CLASSES},{(label + 2) % CLASSES}" for number, label in enumerate(labels)]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,label,new_label", *rows]))
    code, report, printed = forget("--min-known", 0)
    assert (code, report["outcome"]) == (3, "nothing to remove"), printed
    assert "the model recognised none of 6 images before; it predicts the new label of 6 now" in printed
    path = tmp_path / "out" / "report.json"
    words = ["--verify", path, "--images", tmp_path / "in", "--build", "conftest:tiny_net"]
    code, out, err = script(main_forget.main, *words)
    assert (code, "?      images of request 1: 0 of 0 images" in out) == (0, True), out + err
    path.write_text(json.dumps(report | {"outcome": "removed from predictions"}))  # as earlier versions wrote it
    code, out, err = script(main_forget.main, *words)
    assert code == 3, out + err
    assert "FAILED report.json: its outcome is 'removed from predictions', but" in out


def test_exit_code_3_with_a_report_if_not_all_images_are_forgotten(forget):
    code, report, printed = forget("--setting", "distill_steps=1", "distill_cycles=1", "distill_lr=1e-9")
    assert code == 3
    assert "0 of 6 images are forgotten" in printed
    assert report["chosen"] is None  # the model is unchanged
    assert report["trials"][0]["changed"]["distill_steps"] == 1


def test_nothing_is_done_if_the_model_misclassifies_all_images_already(forget, script, tiny, tmp_path):
    _, images, labels = tiny
    save_images(tmp_path / "wrong", images[:3], (labels[:3] + 1) % CLASSES)
    code, report, printed = forget("--min-known", 0, images="wrong")
    assert (code, report["trials"], report["chosen"]) == (3, [], None), printed
    assert report["model"]["before"]["weights_sha256"] == report["model"]["after"]["weights_sha256"]
    assert not any(row["was_called"] or row["forgotten"] for row in report["images"])
    assert "nothing to remove: the model recognised none of 3 images before" in printed
    assert "Nothing to remove: the model" in (tmp_path / "out" / "report.html").read_text()
    code, out, _ = script(main_forget.main, *verify_words(tmp_path, "wrong"))
    assert "?      images of request 1: 0 of 0 images forgotten as stored; 3 not recognised before: " in out


def test_images_that_were_not_recognised_before_never_count_as_forgotten(forget, script, tiny, tmp_path):
    _, images, labels = tiny
    given = labels[:6].clone()
    given[:2] = (given[:2] + 1) % CLASSES
    save_images(tmp_path / "part", images[:6], given)
    code, report, printed = forget(images="part")
    assert code == 0, printed
    states = {row["file"].split("/")[1]: row["state"] for row in report["images"]}
    expected = {f"{number}.png": "forgotten" if number > 1 else "not recognised before" for number in range(6)}
    assert states == expected
    assert report["trials"][0]["forgotten"] == 4
    assert "4 of 4 forgotten, " in printed
    (note,) = report["asked"]["label_notes"]
    assert note in printed
    start = "2 of 6 images are not predicted as their label"
    assert re.match(rf"{start} \(\d/\d.png: predicted as \d \(\d\d.\d %\), label \d; \d/\d.png", note)
    assert f"<p>{note}.</p>" in (tmp_path / "out" / "report.html").read_text()
    assert re.search(
        r"4 of 6 images are forgotten as stored \(\d as used\), 2 were not recognised before, 0 are", printed
    )
    lines = (tmp_path / "out" / "forget_list.csv").read_text().splitlines()
    assert lines[0].endswith(",forgotten,state")
    assert sum(line.endswith(",0,not recognised before") for line in lines) == 2
    code, out, _ = script(main_forget.main, *verify_words(tmp_path, "part"))
    assert code == 0, out
    assert "ok     images of request 1: 4 of 4 images forgotten as stored; 2 not recognised before: " in out
    still = ["--setting", "distill_steps=1", "distill_cycles=1", "distill_lr=1e-9"]
    code, report, printed = forget(*still, images="part", output="still")
    assert code == 3
    assert re.search(
        r"0 of 6 images are forgotten as .* \(0 as .*\), 2 were not recognised before, 4 are still recog", printed
    )
    assert set(report["robustness"].values()) == {0}


def verify_words(tmp_path, images):
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / images]
    return [*words, "--build", "conftest:tiny_net"]


def test_the_search_ends_within_the_time_limit(tiny, script, tmp_path):
    save_images(tmp_path / "keep" / "any name", tiny[1][10:20])
    words = [*tiny[0], "--images", tmp_path / "in", "--output", tmp_path / "out", "--keep-images", tmp_path / "keep"]
    started = time.perf_counter()
    code, out, _ = script(
        main_forget.main, *words, "--minutes", 0.15, "--reference-images", tmp_path / "keep" / "any name"
    )
    assert time.perf_counter() - started < 0.15 * 60 + 30  # steps are slow on a busy machine
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    trials = report["trials"]
    enough = [one for one in trials if one["forgotten"] >= 3]
    ranks = [(one["forgotten"], sum(kept["percent"] for kept in one["kept"])) for one in enough]
    assert ranks == sorted(ranks, reverse=True)
    assert trials[: len(enough)] == enough  # others come last, by the number of images that are forgotten as stored
    assert (code == 0) == (trials[0]["forgotten"] == 6)
    assert [probe["name"] for probe in report["damage"]] == ["adversarial examples", "images to keep"]
    assert report["membership"]["references"] == 10
    lines = [line for line in out.splitlines() if re.match(r"\d\d:\d\d:\d\d  .*: \d of 6 forgotten", line)]
    assert len(lines) == len(report["trials"])  # a line per candidate
    ending = re.compile(
        r"agreement [\d.]+ % \(images to keep\), \d+ s(; the limit of time or steps stopped it at step \d+)?$"
    )
    assert all(ending.search(line) for line in lines), lines


def test_images_are_forgotten_as_used_by_default(forget, tmp_path):
    steps = ["--setting", "distill_steps=80", "distill_mixes=16", "distill_lr=0.01", "robust_pool=64"]
    steps.append("robust_images=32")
    code, report, printed = forget(*steps)
    rows = report["images"]
    assert report["asked"]["counted"] == "as used"
    assert report["chosen"]["robust"] == 1
    assert all(row["forgotten"] == row["forgotten_as_used"] for row in rows)
    assert sum(row["forgotten_as_stored"] for row in rows) >= sum(row["forgotten"] for row in rows) > 0
    assert all(row["copies_forgotten"] >= 0.95 for row in rows if row["forgotten"])
    assert (code == 0) == all(row["forgotten"] for row in rows), printed
    page = (tmp_path / "out" / "report.html").read_text()
    number = sum(row["forgotten"] for row in rows)
    assert re.search(rf"{number} of 6 images are forgotten as used \(6 as stored\), 0 were not recognised before", page)


def test_an_image_whose_copies_are_recognised_is_still_recognised(forget, tmp_path):
    code, report, printed = forget("--setting", "distill_steps=2", "distill_cycles=3", "distill_lr=0.02")
    rows = report["images"]
    short = [row for row in rows if row["copies_forgotten"] < 0.95]
    assert short, printed
    assert all(row["state"] == "still recognised" for row in short)
    assert code == 3
    stored = sum(row["forgotten_as_stored"] for row in short)
    count = states.count(report["images"])
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert f"{count.still_recognised} are still recognised as used" in printed
    assert page.count("still recognised as used</strong>") == stored > 0
    assert f"| forgotten as stored | {count.as_stored} |" in card
    assert f"| still recognised as used | {count.still_recognised} |" in card
    if not count.forgotten:
        assert page.count("This was not measured, as no image counts as forgotten.") == 2


def test_changed_copies_are_forgotten_with_also(forget, tmp_path):
    code, report, printed = forget("--also", "flipped")
    assert code == 0, printed
    assert report["robustness"]["mirrored"] == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"6 of 6 images are forgotten as stored \(\d as used\), also when flipped, 0 were not", page)


def test_changed_copies_count_and_the_model_is_unchanged_if_no_candidate_is_better(forget, script, tiny, tmp_path):
    images = tiny[1]
    answers = [load_tiny_net(tmp_path / "tiny.pth")(one / 255).argmax(1) for one in (images, images.flip(3))]
    places = (answers[0] != answers[1]).nonzero().flatten()[:3]  # misclassified as they are, but not when flipped
    assert len(places)
    save_images(tmp_path / "half", images[places], answers[1][places])
    still = ["--setting", "distill_steps=1", "distill_cycles=1", "distill_lr=1e-9"]
    code, report, printed = forget("--also", "flipped", *still, "--min-known", 0, images="half")
    assert (code, report["chosen"], len(report["trials"])) == (3, None, 1), printed
    assert not any(row["forgotten"] for row in report["images"])
    assert report["model"]["before"]["weights_sha256"] == report["model"]["after"]["weights_sha256"]
    assert "no settings made it forget more images" in (tmp_path / "out" / "report.html").read_text()
    code, report, _ = forget("--also", "flipped", "--min-known", 0, output="done", images="half")
    assert (code, report["robustness"]["mirrored"]) == (0, len(places))
    code, report, _ = forget("--min-known", 0, output="nothing", images="half")
    assert (code, report["trials"]) == (3, [])


def test_robustness_is_null_for_a_model_that_cannot_run_in_half_precision(forget, tiny, tmp_path):
    code, report, printed = forget(model=["--build", "test_main_forget:full_precision", *tiny[0][2:]])
    assert code == 0, printed
    assert report["robustness"]["float16"] is None
    assert "float16" not in report["images"][0]["survives"]
    assert "the model cannot run in this form" in (tmp_path / "out" / "report.html").read_text()
    code, report, printed = forget(model=["--build", "test_main_forget:with_numpy", *tiny[0][2:]], output="numpy")
    assert code == 0, printed
    assert (report["robustness"]["bfloat16"], report["robustness"]["float16"] is None) == (None, False)


@pytest.mark.parametrize(("module", "name"), [(checks, "measure"), (output, "check_same_model")])
def test_files_that_others_put_into_the_output_meanwhile_are_kept(forget, monkeypatch, tmp_path, module, name):
    function = getattr(module, name)

    def meanwhile(*arguments):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine.txt").write_text("mine")
        return function(*arguments)

    monkeypatch.setattr(module, name, meanwhile)
    code, _, printed = forget()
    assert code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "out-2/report.html" in printed
    assert (tmp_path / "out-2" / "report.json").is_file()


def test_a_link_to_a_missing_folder_is_followed(forget, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert forget()[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model.pth").is_file()


def test_a_written_model_that_differs_from_the_measured_one_is_an_error():
    images = torch.rand(2, 3, 8, 8)
    preflight.check_same_model(tiny_net(1), tiny_net(1), images)
    other = tiny_net(1)
    with torch.no_grad():
        next(other.parameters()).mul_(1 + 1e-6)
    with pytest.raises(InputError, match="differs in "):
        preflight.check_same_model(tiny_net(1), other, images)


class KeepsOutputs(torch.nn.Module):
    """A net with a cache of its outputs, as services keep them."""

    def __init__(self):
        super().__init__()
        self.net, self.outputs = tiny_net(), {}

    def forward(self, x):
        live = self.net(x)
        kept = self.outputs.setdefault(round(float(x.detach().sum()), 2), live.detach())  # for every memory layout
        return kept + live - live.detach()


def test_a_written_model_that_resizes_images_in_another_way_is_an_error(forget, monkeypatch):
    reopen = deployed_model.reopen

    def with_other_size(*arguments):
        opened = reopen(*arguments)
        opened.to_pixels = deployed_model._central_square(4)
        return opened

    monkeypatch.setattr(deployed_model, "reopen", with_other_size)
    code, report, printed = forget()
    assert (code, report) == (2, None)
    assert "the model opened again from the written files resizes images in another way" in printed


def test_a_model_that_keeps_its_outputs_is_an_error():
    images, written = torch.rand(2, 3, 8, 8), KeepsOutputs().eval()
    written(images)
    with torch.no_grad():
        written.net.head.bias.add_(torch.arange(5.0))
    read = KeepsOutputs().eval()
    read.load_state_dict(written.state_dict())
    with pytest.raises(InputError, match=r"returns logits that differ by .*must not keep values of earlier passes"):
        preflight.check_same_model(written, read, images)


def test_a_module_whose_weights_eval_changes_is_refused(forget, tiny):
    code, _, printed = forget(model=["--build", "test_main_forget:merging", *tiny[0][2:]])
    assert (code, "changes its weights in eval(), as adapters that are merged do" in printed) == (2, True)


class Merging(TinyNet):
    """A net that adds an adapter to its weights in eval mode, as loralib does."""

    def train(self, mode=True):
        if not mode and self.training:
            self.head.bias.data += 1
        return super().train(mode)


def merging():
    return Merging()


def test_a_hugging_face_folder_loads_with_transformers_and_gives_the_logits_of_the_report(script, vit_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 60, 40), generator=generator).to(torch.uint8)
    save_images(tmp_path / "in", images)
    words = ["--model", vit_folder, "--images", tmp_path / "in", "--output", tmp_path / "out", *FAST_REQUEST]
    assert script(main_forget.main, *words)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "(a folder of transformers)" in page
    listed = page.split("All settings of the chosen candidate")[1].split("</details>")[0]
    assert "<code>distill_lr=" in listed
    assert not any(f"<code>{name}=" in listed for name in ("unlearn_lr", "robust_pool"))  # they have no effect
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    for row in report["images"]:
        inputs = processor(Image.open(tmp_path / "in" / row["file"]), return_tensors="pt")
        shares = model(**inputs).logits.double().softmax(1)[0]
        assert int(shares.argmax()) == row["called_after"]
        assert float(shares[row["label"]]) == pytest.approx(row["label_confidence_after"], abs=1e-5)
    code, out, _ = script(main_forget.main, "--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in")
    assert code == 0, out


def test_a_torchvision_model_in_half_precision_is_written_in_half_precision(script, tmp_path):
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    net = mobilenet_v3_small(num_classes=4).eval()
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()},
        tmp_path / "net.pt",
    )
    images = torch.randint(0, 256, (2, 3, 48, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_images(tmp_path / "in", images)
    words = ["--model", "torchvision:mobilenet_v3_small", "--checkpoint", tmp_path / "net.pt", "--image-size", 32]
    few = ["--setting", "robust=0", "distill_steps=2", "distill_cycles=1", "distill_mixes=2"]
    code, out, err = script(
        main_forget.main, *words, "--images", tmp_path / "in", "--output", tmp_path / "out", *FAST_REQUEST[:2], *few
    )
    assert code in (0, 3), out + err
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    mobilenet_v3_small(num_classes=4).load_state_dict(state)


def main_in_child(words, printed):
    """What a forked process does: main_forget.py without the time to import torch."""
    torch.set_num_threads(1)
    sys.argv = ["main_forget.py", *words]
    with open(printed, "w", buffering=1) as out, contextlib.redirect_stdout(out):
        main_forget.main()


def test_a_killed_command_leaves_no_output_and_can_be_repeated(forget, tiny, tmp_path):
    words = [*tiny[0], "--images", tmp_path / "in", "--output", tmp_path / "out", *FAST_REQUEST, "--minutes", 10]
    before, printed = file_sha256(tmp_path / "tiny.pth"), tmp_path / "printed"
    printed.touch()
    process = multiprocessing.get_context("fork").Process(target=main_in_child, args=(list(map(str, words)), printed))
    process.start()
    while process.is_alive() and not printed.stat().st_size:  # until the search has started
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert file_sha256(tmp_path / "tiny.pth") == before
    code, _, printed = forget()
    assert (code, (tmp_path / "out" / "report.json").exists()) == (0, True), printed


def test_a_damaged_model_is_named(forget, monkeypatch):
    monkeypatch.setattr(candidates, "ACCEPTABLE", -1)
    assert "too much damage" not in forget()[2]
    monkeypatch.setattr(candidates, "ACCEPTABLE", 101)
    printed = forget(output="again")[2]
    assert re.search(r"  an agreement of [\d.]+ % is below 101 %, .*\n.*removed from predictions: .*\n$", printed)


def test_progress_lines_appear_in_a_log_file(forget, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    code, _, printed = forget()
    assert code == 0, printed
    clock = r"^\d\d:\d\d:\d\d  "
    line = clock + r"distill_steps 16.*: step \d+, \d+ % of D_f forgotten, at most \d+ s left"
    assert re.search(line, printed, re.MULTILINE)
    assert re.search(clock + r"relearning: \d+ / 30 ", printed, re.MULTILINE)
    assert max(int(percent) for percent in re.findall(r"\((\d+) %\)", printed)) <= 100


def test_a_dry_run_checks_the_request_and_writes_nothing(forget, tiny, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, report, printed = forget("--dry-run", output="new/out")
    assert (code, report) == (0, None), printed
    assert sorted(tmp_path.rglob("*")) == before
    counts = tiny[2][:6].bincount().tolist()
    assert "6 images to forget, goal misclassify; distill; cpu" in printed
    assert ", ".join(f"{label} ({count} image{'s' * (count != 1)})" for label, count in enumerate(counts)) in printed
    assert "are classified as their label" not in printed  # the labels are the predictions
    assert re.search(r"  0.png: predicted as 0 \([\d.]+ %\), label 0$", printed, re.MULTILINE)
    assert "recognised before: 6 of 6 images\nto be unlearned: 6 of 6 images\n" in printed
    assert "for at most 10 min\n" in printed
    assert f"the output would be {tmp_path / 'new' / 'out'}" in printed


def test_a_dry_run_shows_new_labels_and_checks_the_earlier_requests(forget, tiny, tmp_path):
    built = ["--build", "conftest:tiny_net"]
    forget()
    rows = [f"{number}.png,{int(label)}" for number, label in enumerate(tiny[2][:6])]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(["file,new_label", *rows]))
    code, _, printed = forget("--dry-run", output="second", model=["--model", tmp_path / "out", *built])
    assert (code, "6 images to forget, goal relabel; distill" in printed) == (0, True), printed
    assert re.search(r"  1.png: predicted as \d .*, label \d, new label 1$", printed, re.MULTILINE)
    (tmp_path / "out" / "report.json").write_text("{}")
    code, _, printed = forget("--dry-run", output="second", model=["--model", tmp_path / "out", *built])
    assert (code, "is not a report of a deletion request (asked is missing)" in printed) == (2, True)
    assert not (tmp_path / "second").exists()


def test_help_has_examples_and_a_glossary_and_needs_no_torch():
    shown = subprocess.run(
        [sys.executable, "main_forget.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for text in ("examples:", "glossary:", "--images FOLDER", "(required)", "--dry-run", "adv_imp"):
        assert text in shown
    code = "import sys, main_forget; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, "1 of 3 forgotten, stopped"),
        ([True, True, False, True], "1 of 3 forgotten as used, 2 as stored, stopped"),
    ],
)
def test_a_line_of_a_candidate_counts_recognised_images_as_used_and_as_stored(capsys, stored, expected):
    used = torch.tensor([True, False, False, True])
    stored = None if stored is None else torch.tensor(stored)
    candidate = Candidate(Settings(), {"robust": 0}, "stopped", 3, 2.0, used, [], None, stored)
    main_forget.log_candidate(candidate, torch.tensor([True, True, True, False]))
    assert f"robust 0: {expected}, 2 s; the limit of time or steps stopped it at step 3" in capsys.readouterr().out
