"""--push: what is uploaded to the Hugging Face Hub, checked against a server on this machine."""

import argparse
import base64
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import re
import shutil
import threading

import pytest
import torch

from l2ul import models
from l2ul.cli import push
from l2ul.common.errors import InputError
from l2ul.common.files import tensors_sha256
from l2ul.deletion import search
from l2ul.experiments import execution, model_card
from l2ul.models import checkpoint, hub, timm_models
import main_forget

USER = {"type": "user", "name": "jo", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """A stand-in for the hub.

    repositories  whether it is private, and its files (content by name), by the name of a repository
    requests      "METHOD path" of each request
    refuse        requests whose path contains this text get the status 403
    """

    def __init__(self):
        self.user, self.repositories, self.requests, self.refuse = USER, {}, [], None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(*fake.get(self.path))

            def do_POST(self):
                chunked = self.headers.get("Transfer-Encoding") == "chunked"
                length = int(self.headers.get("Content-Length") or 0)
                body = self.chunks() if chunked else self.rfile.read(length)
                self.answer(*fake.post(self.path, body))

            def chunks(self):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, status, content):
                fake.requests.append(f"{self.command} {self.path}")
                if self.headers.get("Authorization") != "Bearer hf_test":
                    status, content = 401, {"error": "Invalid credentials"}
                if fake.refuse and fake.refuse in self.path:
                    status, content = 403, {"error": "Forbidden: out of storage"}
                text = json.dumps(content).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *parts):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path):
        if path == "/api/whoami-v2":
            return 200, self.user
        name = path.removeprefix("/api/models/").split("?")[0]
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        private, files = self.repositories[name]
        return 200, {"id": name, "private": private, "siblings": [{"rfilename": file} for file in files]}

    def post(self, path, body):
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish.get('organization') or self.user['name']}/{wish['name']}"
            private = wish.get("private", wish.get("visibility") == "private")
            if self.refuse != path:
                self.repositories.setdefault(name, (private, {}))
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, action = re.match(r"/api/models/([^/]+/[^/]+)(/(preupload|commit))", path).groups()
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = [{"path": file, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in files]
            return 200, {"files": answer}
        lines = [json.loads(line) for line in body.splitlines()]
        if not (self.refuse and self.refuse in path):
            for line in lines[1:]:
                assert line["key"] == "file"
                content = base64.b64decode(line["value"]["content"])
                self.repositories[name][1][line["value"]["path"]] = content
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Return a `Hub` that huggingface_hub uses, with a login of the user jo."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_ENDPOINT", server.address)  # read when huggingface_hub is imported, so also here:
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no_tokens"))
    yield server
    server.server.shutdown()


def test_names_and_logins_that_cannot_work_are_refused(fake, monkeypatch):
    fake.repositories["jo/public"] = (False, {})
    for name, message in (
        ("a/b/c", "'a/b/c' is not a name on the Hugging Face Hub; expected NAME or OWNER/NAME"),
        ("other/model", "jo may not write to other; expected one of jo, lab"),
        ("public", "jo/public: this repository exists and is public; choose another name, or add --push-public"),
    ):
        with pytest.raises(InputError, match=message):
            hub.open_repository(name)
    assert hub.open_repository("public", public=True).files == ()
    assert hub.open_repository("lab/new") == hub.Repository("lab/new")
    fake.user = USER | {"auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(InputError, match="may only read; run `hf auth login`"):
        hub.open_repository("new")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(InputError, match=r"does not accept the login \(.*\); run `hf auth login`"):
        hub.open_repository("new")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="needs a login on the Hugging Face Hub"):
        hub.open_repository("new")
    assert not any(request.startswith("POST") for request in fake.requests)


def test_without_a_connection_nothing_starts(fake, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be reached \(.*\); leave out --push or try later$"):
        hub.open_repository("new")


def request(fake, forget, tmp_path, *words):
    fake.requests.clear()
    return forget("--push", "tiny", *words)


def test_a_request_uploads_model_and_card_and_nothing_else(fake, forget, script, tmp_path):
    code, _, printed = request(fake, forget, tmp_path, "--dry-run")
    assert (code, fake.repositories) == (0, {}), printed
    code, report, printed = request(fake, forget, tmp_path)
    assert code == 0, printed
    assert f"uploaded README.md, model.safetensors to {fake.address}/jo/tiny" in printed
    private, files = fake.repositories["jo/tiny"]
    assert private
    assert sorted(files) == ["README.md", "model.safetensors"]
    card = files["README.md"].decode()
    assert report["model"]["after"]["weights_sha256"] in card
    assert not any(row[key] in card for row in report["images"] for key in ("file", "sha256", "pixels_sha256"))


def test_a_failed_upload_loses_nothing_and_can_be_repeated(fake, forget, script, tmp_path):
    fake.refuse = "/commit/"
    code, report, printed = request(fake, forget, tmp_path)
    assert report["outcome"] == "removed from predictions"
    assert code == 1
    sentence = r"^main_forget.py: the upload to jo/tiny failed \(.*\); .* with: (python .*)$"
    words = re.search(sentence, printed, re.MULTILINE)[1].split()
    assert words.pop(0) == "python"
    assert words[1:3] == ["--verify", str(tmp_path / "out" / "report.json")]
    assert words[3] == "--build"  # the network has to be built, so that only its weights are uploaded
    assert words[5:] == ["--push", "jo/tiny"]
    fake.refuse = None
    code, out, err = script(main_forget.main, *words[1:])
    assert code == 0, out + err
    assert sorted(fake.repositories["jo/tiny"][1]) == ["README.md", "model.safetensors"]
    (tmp_path / "out" / "model.pth").write_bytes(b"another model")
    fake.requests.clear()
    code, out, err = script(main_forget.main, *words[1:])
    assert code == 3
    assert "not uploaded: model, weights failed" in out
    assert not any("commit" in one for one in fake.requests)


def test_a_model_that_still_recognises_an_image_is_not_uploaded(fake, forget, tmp_path):
    words = ["--setting", "distill_steps=1", "distill_lr=1e-9", "robust=0"]
    code, report, printed = request(fake, forget, tmp_path, *words)
    assert (code, fake.repositories) == (3, {}), printed
    assert "not uploaded: an image is not forgotten; this command uploads the model all the same: python " in printed


def test_of_a_hugging_face_folder_only_what_transformers_reads_is_uploaded(fake, vit_folder, tmp_path):
    folder = tmp_path / "model"
    models.save(models.load(f"hf:{vit_folder}", 10), folder, {})
    for name in ("report.html", "to_forget.csv", "optimizer.pt", "face.png"):
        (folder / name).write_text("private")
    (folder / "README.md").write_text("---\ntags:\n- machine-unlearning\n---\n")
    for name, key in (("config.json", "train_files"), ("preprocessor_config.json", "data_path")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: "/home/me/alice_0.png"}))
    (tmp_path / "up").mkdir()
    opened = models.load(f"hf:{folder}", 10)
    files = hub.write_files(tmp_path / "up", opened, "the card", is_folder=True)
    assert files["README.md"].read_text() == "the card"
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    private = (str(vit_folder), str(folder), "alice")
    assert not any(one.encode() in path.read_bytes() for path in files.values() for one in private)
    again, pixels = models.load(f"hf:{tmp_path / 'up'}", 10), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), opened(pixels))
    fake.repositories["lab/vit"] = (True, {"pytorch_model.bin": b"", ".gitattributes": b""})
    repository = hub.open_repository("lab/vit")
    assert hub.upload(files, repository) == f"{fake.address}/lab/vit"
    assert repository.files == ("pytorch_model.bin", ".gitattributes")
    assert fake.repositories["lab/vit"][1].keys() >= files.keys()


def test_a_run_uploads_its_saved_model_and_the_same_command_tries_again(fake, run, tmp_path):
    words = ["--method", "neggrad", "--save-model", "--push", "lab/digits", "--push-public"]
    fake.refuse = "/commit/"
    code, out, err = run(*words)
    assert (code, "the upload to lab/digits failed" in err) == (1, True), out + err
    (model,) = (tmp_path / "models").glob("*.safetensors")
    fake.refuse = None
    code, out, err = run(*words)
    assert code == 0, out + err
    assert "0 runs to do" in out
    private, files = fake.repositories["lab/digits"]
    assert not private
    assert sorted(files) == ["README.md", "model.safetensors"]
    here = files["README.md"].replace(b'"model.safetensors"', f'"{model.name}"'.encode())
    assert here == model.with_suffix(".md").read_bytes() != files["README.md"]
    uploaded = tmp_path / "uploaded.safetensors"
    uploaded.write_bytes(files["model.safetensors"])
    state, metadata = checkpoint.read(uploaded)
    assert sorted(metadata) == ["mean", "std"]
    assert tensors_sha256(state) in files["README.md"].decode()
    card, path = files["README.md"].decode(), tmp_path / "runs" / f"{model.stem}.json"
    record = json.loads(path.read_text())
    assert f"| predicted as their label by this model | {round(2 * record['acc_forget'] / 100)} |" in card
    assert f"{record['acc_test']:.2f} %" in card
    indices = (tmp_path / "runs" / f"{model.stem}.txt").read_text().split()
    assert not any(re.search(rf"\b{index}\b", card.split("## Method")[0]) for index in indices if len(index) > 2)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("model.safetensors", str(uploaded))
    scope = {}
    exec(code, scope)
    with torch.no_grad():
        assert scope["model"](torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_an_upload_that_cannot_be_written_is_refused_before_any_work(fake, run, forget, monkeypatch):
    def write_files(*arguments, **options):
        raise KeyError("no such key")

    monkeypatch.setattr(hub, "write_files", write_files)
    monkeypatch.setattr(execution.Experiment, "carry_out", lambda experiment, runs: pytest.fail("work was begun"))
    monkeypatch.setattr(search, "find_candidates", lambda *arguments, **options: pytest.fail("work was begun"))
    code, _, err = run("--method", "neggrad", "--save-model", "--push", "digits")
    assert (code, "resnet20 cannot be written again in its form (KeyError: 'no such key')" in err) == (2, True), err
    code, _, printed = forget("--push", "digits")
    assert (code, "cannot be written again in its form (KeyError: 'no such key')" in printed) == (2, True), printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "neggrad"], "uploads the unlearned model, which is not saved; add --save-model"),
        (["--method", "neggrad", "--save-model", "--seed", 0, 1], "uploads one model, but --seed is 0 1"),
        (["--method", "neggrad", "adv", "--save-model"], "uploads one model, but --method is neggrad adv"),
        (["--method", "before", "--save-model"], "before makes none"),
    ],
)
def test_push_of_anything_but_one_saved_model_is_refused(fake, run, words, message):
    code, _, err = run("--push", "digits", *words)
    assert (code, message in err) == (2, True), err
    assert not fake.requests


def test_public_alone_is_refused(forget):
    code, _, printed = forget("--push-public")
    assert (code, "--push-public is for --push" in printed) == (2, True)


def test_a_card_of_a_run_shows_no_path_of_a_local_model(vit_folder):
    record = {
        "goal": "relabel",
        "k": 32,
        "continual_size": 16,
        "model": f"hf:{vit_folder}",
        "dataset": "alice_pets",
        "acc_forget": 0.0,
        "acc_forget_before": 100.0,
        "acc_relabel": 75.0,
        "acc_retain": 90.0,
        "acc_test": None,
        "acc_retain_before": 99.0,
        "acc_test_before": 95.0,
        "status": "cap",
        "method": "distill",
        "seed": 3,
        "checkpoint_sha256": "a" * 64,
        "unlearn_lr": None,
        "distill_lr": 0.003,
    }
    text = model_card.of_record(record, 10, "b" * 64, is_folder=True).text()
    assert str(vit_folder) not in text
    assert vit_folder.name not in text
    assert text.count("a data set in a local folder") == 2  # a folder in --data-dir, whose name is the user's
    for name in ("hf:/home/alice/photos", "alice_photos", "hf:alice_photos", "hf:alice_photos:default"):
        assert "alice" not in model_card.of_record(record | {"dataset": name}, 10, "b" * 64).text()
    assert "trained on hf:ylecun/mnist " in model_card.of_record(record | {"dataset": "hf:ylecun/mnist"}, 10, "").text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "| to relabel | 16 |\n| of earlier steps | 16 |" in text
    assert "| predicted as their new label by this model | 12 |" in text
    assert "`distill` with seed 3: `distill_lr=0.003`." in text
    assert "| test images | 95.00 % | – |" in text
    assert "had to relabel 16 of its training images. " in text
    assert "| other training images | 99.00 % | 90.00 % |" in text
    text = model_card.of_record(record | {"forget_dir": "holiday"}, 10, "b" * 64).text()
    assert "had to relabel 16 images of a folder. " in text
    assert "| training images | 99.00 % | 90.00 % |" in text
    assert "holiday" not in text


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"status": "forgotten"}, "16 of 16 images are forgotten as stored"),
        ({"status": "forgotten", "acc_forget_before": 87.5}, "as stored; the original model misclassified 2 of them"),
        ({"status": "done", "acc_forget": 25.0}, "12 of 16 images are forgotten as stored"),
        ({"status": "cap", "acc_forget": 6.25}, "15 of 16 images are forgotten as stored; the limit of steps was"),
        (
            {"status": "forgotten", "robust": 1},
            "16 of 16 images are forgotten as stored, at least 95 % of them also in changed copies; how many are as "
            "used was not measured",
        ),
        (
            {"status": "cap", "robust": 1},
            "16 of 16 images are forgotten as stored, not all of them as used; the limit of steps was reached; how "
            "many are as used was not measured",
        ),
        (
            {"status": "forgotten", "robust": 1, "metric_forgotten_as_used": 81.25},
            "16 of 16 images are forgotten as stored, 13 as used",
        ),
        ({"status": "forgotten", "robust": 0, "metric_forgotten_as_used": 0.0}, "forgotten as stored, 0 as used"),
        (
            {"status": "forgotten", "goal": "relabel", "acc_relabel": 100.0, "acc_forget": 0.0},
            "16 of 16 images are relabelled as stored",
        ),
        (
            {"status": "forgotten", "k": 48, "continual_size": 16, "acc_forget_earlier": 12.5},
            "16 of 16 images are forgotten as stored; 4 of 32 images of earlier steps are predicted as their label",
        ),
    ],
)
def test_the_outcome_of_a_run_claims_no_more_than_was_measured(facts, expected):
    record = {"goal": "misclassify", "k": 16, "acc_forget": 0.0, "acc_forget_before": 100.0} | facts
    number = record.get("continual_size") or record["k"]
    text = model_card.outcome(record, number)
    assert expected in text
    assert "all images are forgotten" not in text
    if not record.get("robust"):
        assert "changed copies" not in text


def test_the_card_of_a_kept_model_gets_metrics_that_are_added_later(run, tmp_path):
    words = ["--method", "neggrad", "--save-model"]
    code, out, _ = run(*words)
    assert (code, f"\nmodels and their cards: {tmp_path / 'models'}\n" in out) == (0, True)
    (card,) = (tmp_path / "models").glob("*.md")
    assert "as used" not in card.read_text()
    assert f'"{card.with_suffix(".safetensors").name}"' in card.read_text()
    code, _, err = run(*words, "--evaluate", "robustness")
    assert code == 0, err
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json"))
    used = round(record["k"] * record["metric_forgotten_as_used"] / 100)
    text = card.read_text()
    assert f" images are forgotten as stored, {used} as used" in text
    assert f"| forgotten as used, {model_card.CHANGED} | {used} |" in text


def test_an_interrupted_upload_says_where_the_model_is(fake, monkeypatch, tmp_path, capsys):
    def interrupt(files, repository):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "upload", interrupt)
    model, path = models.build("lenet", 10), tmp_path / "model.pth"
    with pytest.raises(SystemExit) as stop:
        push.push("main_forget.py", path, model, "the card", hub.Repository("jo/tiny"), "again")
    assert stop.value.code == 130
    assert f"the model is in {tmp_path / 'model.pth'}; upload it again with: again" in capsys.readouterr().err


def test_an_interruption_between_report_and_upload_says_that_the_report_is_there(monkeypatch, tmp_path, capsys):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2ul.deletion.report_schema.read_report", interrupt)
    options = argparse.Namespace(verify=True, model=str(tmp_path / "model.pth"), build=None, push_public=False)
    with pytest.raises(SystemExit) as stop:
        main_forget.upload(options, tmp_path / "report.json", hub.Repository("jo/tiny"))
    assert stop.value.code == 130
    expected = f"the report is {tmp_path / 'report.json'}; this command uploads the model: "
    assert expected in capsys.readouterr().err


def test_of_a_timm_configuration_only_what_timm_defines_is_uploaded(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=10)
    timm_models.save(net, "timm:test_resnet", tmp_path / "model", [0.5] * 3, [0.5] * 3)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"train_files": ["alice_0.png"], "pool_size": {"author": "alice@home.org"}}
    config["pretrained_cfg"] |= {"file": "/home/alice/weights.pt", "paper_name": "alice"}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "README.md").write_text("alice")
    (tmp_path / "up").mkdir()
    opened = models.load(f"timm:{tmp_path / 'model'}", 10)
    files = hub.write_files(tmp_path / "up", opened, "the card", is_folder=True)
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert not any(one in path.read_bytes() for path in files.values() for one in (b"alice", b"home"))
    again, pixels = models.load(f"timm:{tmp_path / 'up'}", 10), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), opened(pixels))


def test_libraries_of_models():
    names = ("timm:resnet18", "hf:", "resnet20")
    assert [model_card.library_of(name) for name in names] == ["timm", "transformers", None]


def test_of_a_file_with_tied_half_precision_weights_only_the_weights_are_uploaded(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    dtypes = dict.fromkeys(net.state_dict(), torch.float16)
    checkpoint.write(tmp_path / "model.safetensors", net, {}, dtypes)
    state, metadata = checkpoint.read(tmp_path / "model.safetensors")
    assert (sorted(state), metadata) == (["0.bias", "0.weight", "1.bias"], {})
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_the_card_is_made_from_the_report_not_read_from_a_folder(fake, forget, script, tmp_path):
    code, report, printed = forget()
    assert code == 0, printed
    source = tmp_path / "out" / "model.pth"
    copy = tmp_path / "alice.folder" / "model.pth"
    copy.parent.mkdir()
    shutil.copy(source, copy)
    (copy.parent / "README.md").write_text("alice")
    (tmp_path / "out" / "README.md").write_text("alice")
    words = [
        "--verify",
        tmp_path / "out" / "report.json",
        "--model",
        copy,
        "--build",
        "conftest:tiny_net",
        "--push",
        "tiny",
    ]
    code, out, err = script(main_forget.main, *words)
    assert code == 0, out + err
    files = fake.repositories["jo/tiny"][1]
    assert sorted(files) == ["README.md", "model.safetensors"]
    assert not any(b"alice" in content for content in files.values())
    assert report["model"]["after"]["weights_sha256"] in files["README.md"].decode()


def test_other_entries_of_a_checkpoint_stay_on_this_machine(tmp_path):
    model = models.build("lenet", 10)
    state = {f"module.{name}": tensor for name, tensor in model.net.state_dict().items()}
    state |= {"train_labels": torch.arange(4), "train_files": ["alice_0.png"]}
    torch.save({"state_dict": state, "args": argparse.Namespace(data="/home/alice")}, tmp_path / "alice.v1.2.pt")
    opened = models.load("lenet", 10, tmp_path / "alice.v1.2.pt")
    (tmp_path / "up").mkdir()
    files = hub.write_files(tmp_path / "up", opened, "the card", is_folder=False)
    assert sorted(files) == ["README.md", "model.safetensors"]
    state, metadata = checkpoint.read(files["model.safetensors"])
    assert (state.keys(), sorted(metadata)) == (model.net.state_dict().keys(), ["mean", "std"])
    assert not any(b"alice" in path.read_bytes() for path in files.values())


def test_an_empty_name_is_refused(fake, forget, run):
    code, _, printed = forget("--push", "")
    assert (code, "--push '' is not a name" in printed) == (2, True), printed
    code, _, err = run("--push", "", "--method", "neggrad", "--save-model")
    assert (code, "--push '' is not a name" in err) == (2, True), err


def test_of_a_configuration_with_others_inside_only_what_transformers_defines_is_uploaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(
        text_config=size, vision_config=size | {"image_size": 32, "patch_size": 16}, num_labels=3
    )
    config.id2label = {0: "cat", 1: "dog", 2: "horse"}
    config.vision_config.curator = {"mail": "alice@home.org"}
    config.text_config.id2label = {0: "/home/alice/0.png"}
    config.author = "alice"
    net = transformers.CLIPForImageClassification(config).eval()
    net.save_pretrained(tmp_path / "model")
    transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(
        tmp_path / "model"
    )
    assert "alice" in (tmp_path / "model" / "config.json").read_text()
    opened = models.load(f"hf:{tmp_path / 'model'}", 3)
    (tmp_path / "up").mkdir()
    files = hub.write_files(tmp_path / "up", opened, "the card", is_folder=True)
    assert not any(b"alice" in path.read_bytes() for path in files.values())
    again, pixels = models.load(f"hf:{tmp_path / 'up'}", 3), torch.rand(2, 3, 32, 32)
    assert again.net.config.id2label == config.id2label
    with torch.no_grad():
        assert torch.equal(again(pixels), opened(pixels))
