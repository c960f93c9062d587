"""Runs under torchrun: several processes give the result of one, and one of them prints."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

from conftest import CLASSES, FAST, ROOT, TinyNet, tiny_net
from PIL import Image
from processes import run_processes
import pytest
import torch
from torch import nn
import torch.distributed as dist

from l2ul import models
from l2ul.cli import exit_codes
from l2ul.common import distributed
from l2ul.common.cache import Cache
from l2ul.common.errors import Diverged, InputError
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
from l2ul.experiments.adversarial_sets import Attack
from l2ul.methods.settings import AttackSettings
from l2ul.metrics import accuracy
from l2ul.metrics.registry import EVALUATIONS, EvaluationGroup
from l2ul.training import loop
from l2ul.training.recipe import Recipe
import main_unlearn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

RECIPE = Recipe(epochs=3, lr=0.05, batch_size=13, crop_padding=1, flip=True, label_smoothing=0.1)  # 40: 13, 13, 13, 1


def plain_net() -> nn.Module:
    """Return a network without batch-norm and dropout, so that nothing depends on which images share a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES)
        return nn.Sequential(*layers)


def joined(work):
    """Return `work` with the error handling and process group of a script."""

    def inside(*arguments):
        with exit_codes.clean_exit("test.py", "go on", shared=True), distributed.process_group():
            return work(*arguments)

    return inside


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_every_item_once_and_have_nearly_equal_sizes(monkeypatch, size):
    for count in (0, 1, 2, 7, 24, 25):
        parts = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "size", lambda: size)
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(list(range(count))[distributed.shard(count)])
        assert sum(parts, []) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def predict_and_count(model, images, batch_size):
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    predictions = accuracy.predict(model, images, batch_size=batch_size, fold=False, shared=True)
    broken = images / 255
    broken[5] = torch.nan
    with pytest.raises(Diverged, match="1 of 37 images"):  # in all processes, whichever has the image
        accuracy.predict(model, broken, batch_size=batch_size, fold=False, shared=True)
    return predictions, sum(sizes) // 2


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batch_size", [5, 30])  # 8 batches; fewer batches than processes
def test_each_image_is_classified_once_and_all_processes_get_all_predictions(trained, tmp_path, size, batch_size):
    model, images, _ = trained
    expected = accuracy.predict(model, images[:37], batch_size=batch_size, fold=False)
    codes, found, *_ = run_processes(tmp_path / "all", size, joined(predict_and_count), model, images[:37], batch_size)
    assert codes == [0] * size
    assert all(torch.equal(classes, expected) for classes, _ in found)
    assert sum(seen for _, seen in found) == 37


def fit(net, images, labels, state_file, resume=False, recipe=RECIPE, dies=None):
    model = net()

    def on_epoch(row):
        if (row["epoch"], distributed.rank()) == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    split = Split(images, labels)
    options = {"state_file": state_file, "resume": resume, "on_epoch": on_epoch, "test_batch_size": 7}
    rows = loop.fit(model, split, split, recipe, seed=0, **options)
    return model.state_dict(), rows


def same(one, other, tolerance=0.0):
    return all(torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=tolerance) for name in one)


@pytest.mark.parametrize("size", [2, 3])
def test_training_in_several_processes_gives_the_weights_of_one_process(trained, tmp_path, size):
    _, images, labels = trained
    whole, rows = fit(plain_net, images, labels, tmp_path / "one.pt")
    first = fit(plain_net, images, labels, tmp_path / "short.pt", recipe=dataclasses.replace(RECIPE, epochs=1))[0]
    assert not same(whole, first, 1e-3)
    codes, found, *_ = run_processes(
        tmp_path / "all", size, joined(fit), plain_net, images, labels, tmp_path / "many.pt"
    )
    assert codes == [0] * size
    for state, own_rows in found:
        assert same(state, whole, 1e-6)
        assert same(state, found[0][0])
        assert [row["loss"] for row in own_rows] == pytest.approx([row["loss"] for row in rows], abs=1e-6)
        assert [row["acc"] for row in own_rows] == [row["acc"] for row in rows]


def fit_folder(images, labels, state_file):
    model, split = plain_net(), Split(images, labels)
    loop.fit(model, split, split, RECIPE, seed=0, state_file=state_file, workers=1)
    return model.state_dict()


def test_training_on_images_on_disk_gives_the_weights_of_one_process(tmp_path):
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    files, labels = [str(tmp_path / f"{number}.png") for number in range(20)], torch.arange(20) % CLASSES
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    images = FolderImages(files, 8, 8)
    expected = fit(plain_net, pixels, labels, tmp_path / "tensor.pt")[0]
    assert same(fit_folder(images, labels, tmp_path / "folder.pt"), expected)
    codes, found, *_ = run_processes(tmp_path / "all", 2, joined(fit_folder), images, labels, tmp_path / "many.pt")
    assert codes == [0, 0]
    assert all(same(state, expected, 1e-6) for state in found)


def test_batch_norm_has_equal_statistics_in_all_processes(trained, tmp_path):
    _, images, labels = trained
    recipe = dataclasses.replace(RECIPE, batch_size=16)
    codes, found, *_ = run_processes(
        tmp_path / "all", 2, joined(fit), TinyNet, images, labels, tmp_path / "state.pt", False, recipe
    )
    assert codes == [0, 0]
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    fresh = TinyNet().state_dict()
    assert not torch.equal(found[0][0]["features.1.running_mean"], fresh["features.1.running_mean"])


def test_a_killed_process_ends_the_run_and_any_number_of_processes_resumes_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVING", 1.0)  # after each epoch, however slow the disk is; the processes fork
    _, images, labels = trained
    given = plain_net, images, labels
    _, whole, *_ = run_processes(tmp_path / "whole", 2, joined(fit), *given, tmp_path / "whole.pt")
    codes, _, _, errors = run_processes(
        tmp_path / "killed", 2, joined(fit), *given, tmp_path / "state.pt", False, RECIPE, (2, 1)
    )
    assert codes == [1, -signal.SIGKILL]
    assert errors[0] == "test.py: another process of this run was lost; go on\n"
    kept = (tmp_path / "state.pt").read_bytes()
    assert len(torch.load(tmp_path / "state.pt", weights_only=True)["history"]) == 2
    for size, tolerance in ((2, 0.0), (3, 1e-6)):
        (tmp_path / "state.pt").write_bytes(kept)
        codes, found, *_ = run_processes(
            tmp_path / f"again {size}", size, joined(fit), *given, tmp_path / "state.pt", True
        )
        assert codes == [0] * size
        assert all(same(state, whole[0][0], tolerance) for state, _ in found)
        assert len(found[0][1]) == RECIPE.epochs
    assert same(fit(*given, tmp_path / "state.pt", True)[0], whole[0][0], 1e-6)


HOW = Attack(CLASSES, AttackSettings(4, eps=1.0, alpha=0.2, iterations=5), seed=3, batch_size=16)


def attack(model, images, labels, folder):
    made, done = [], []
    for known in (3, 10):  # of which the first are then in the cache
        options = {"cache": Cache(folder), "progress": done.append}
        made.append(HOW.make(model, images[:known], labels[:known], **options))
    return made, sum(done)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_make_the_adversarial_examples_of_one(trained, tmp_path, size):
    model, images, labels = trained
    (tmp_path / "one").mkdir()
    (tmp_path / "cache").mkdir()
    (few, many), done = attack(model, images, labels, tmp_path / "one")
    assert done == (3 + 10) * 4 * 5
    codes, found, *_ = run_processes(tmp_path / "all", size, joined(attack), model, images, labels, tmp_path / "cache")
    assert codes == [0] * size
    assert [made for made, _ in found[1:]] == [[None, None]] * (size - 1)
    made, own_done = found[0]
    assert own_done == done
    for one, other in zip((few, many), made, strict=True):
        assert torch.equal(one.targets, other.targets)
        assert torch.allclose(one.examples, other.examples, rtol=0, atol=1e-5)
        assert torch.equal(one.hits, other.hits)
    names = [{path.name for path in (tmp_path / where).glob("*.safetensors")} for where in ("one", "cache")]
    assert names[0] == names[1]
    assert len(names[0]) == 10


def diverge(model, images, labels):
    if distributed.rank() == 1:
        with torch.no_grad():
            model.head.bias[0] = torch.inf
    HOW.make(model, images, labels, cache=Cache(), progress=lambda count: None)


def test_an_attack_that_diverges_in_one_process_ends_in_all(trained, tmp_path):
    codes, _, _, errors = run_processes(tmp_path / "all", 2, expect_diverged, *trained)
    assert codes == [0, 0], errors


def expect_diverged(*arguments):
    with distributed.process_group(), pytest.raises(Diverged, match="not finite"):
        diverge(*arguments)


def copy_weights():
    model = tiny_net(distributed.rank()).to(memory_format=torch.channels_last)
    model.features[1].num_batches_tracked += distributed.rank()
    distributed.copy_from_first(model)
    return model.state_dict()


def test_weights_and_buffers_are_copied_from_the_first_process(tmp_path):
    codes, states, *_ = run_processes(tmp_path / "all", 3, joined(copy_weights))
    assert codes == [0] * 3
    assert all(same(state, tiny_net(0).state_dict()) for state in states)


def unlearn(arguments):
    sys.argv = ["main_unlearn.py", *map(str, arguments)]
    main_unlearn.main()


def test_records_equal_those_of_one_process_and_are_written_once(run, tmp_path, tmp_path_factory):
    words = ["--unlearn-k", 2, 5, "--method", "before", "neggrad", "adv_imp", "--seed", 1, "--threads", 1]
    assert run(*words)[0] == 0
    place = tmp_path_factory.mktemp("many")
    own = ["--result-dir", place, "--cache-dir", place / "cache", *FAST, *words]
    codes, _, out, err = run_processes(place / "all", 2, unlearn, own)
    assert codes == [0, 0], err
    assert "6 runs to do" in out[0]
    assert (out[1], err[1]) == ("", "")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == sorted(path.name for path in (place / "runs").iterdir())
    for name in (name for name in names if name.endswith(".json")):
        one, many = (json.loads((where / "runs" / name).read_text()) for where in (tmp_path, place))
        assert many["device"] == f"{one['device']} x 2"
        for key in one.keys() - {"device", "peak_memory_mib"}:
            assert key.startswith("seconds") or one[key] == pytest.approx(many[key], abs=1e-6), key
    codes, _, out, _ = run_processes(place / "again", 3, unlearn, own)
    assert codes == [0, 0, 0]
    assert "0 runs to do, 6 done" in out[0]


def test_a_group_of_the_user_compares_with_the_retrained_model(few_digits, tmp_path, monkeypatch):
    """The processes share its predictions, which the first one alone asks for."""

    def compare(outputs):
        agree = outputs.after["test"] == outputs.retrained.classes("test")
        return {"metric_own": 1.0, "metric_agreement": float(agree.float().mean())}

    group = EvaluationGroup("Compare.", compare, ("metric_own",), ("metric_agreement",))
    monkeypatch.setitem(EVALUATIONS, "own", group)
    models.save(models.build("resnet20", 10), tmp_path / "retrained.safetensors", {})
    words = ["--method", "before", "--evaluate", "own", "--retrained", tmp_path / "retrained.safetensors", *FAST]
    codes, _, _, err = run_processes(
        tmp_path / "all", 2, unlearn, ["--result-dir", tmp_path, "--device", "cpu", *words]
    )
    assert codes == [0, 0], err
    (path,) = (tmp_path / "runs").glob("*.json")
    assert 0 <= json.loads(path.read_text())["metric_agreement"] <= 1


@pytest.mark.parametrize("words", [["--seed", "x"], ["--forget-file", "nothing.txt"], ["--decoder", "gpu"]])
def test_bad_input_is_reported_once(few_digits, tmp_path, words):
    codes, _, out, err = run_processes(
        tmp_path / "all", 2, unlearn, ["--result-dir", tmp_path, "--device", "cpu", *words]
    )
    assert codes == [2, 2]
    assert sum(text.count("\n") for text in err) == 1, err
    assert out == ["", ""]


def fail_while_the_second_process_joins():
    join = dist.init_process_group

    def slowly(*arguments, store, **options):
        join(*arguments, store=store, **options)
        if os.environ["RANK"] == "1":
            time.sleep(1)
            store.add("still joining", 1)

    dist.init_process_group = slowly
    with exit_codes.clean_exit("test.py", "go on", shared=True), distributed.process_group():
        raise InputError("the model is missing; name it")


def test_a_process_that_fails_does_not_interrupt_the_joining_of_another(tmp_path):
    codes, _, _, err = run_processes(tmp_path / "all", 2, fail_while_the_second_process_joins)
    assert codes == [2, 2], err
    assert "".join(err) == "test.py: the model is missing; name it\n"


def test_the_loss_of_a_process_while_joining_has_no_traceback(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)

    def interrupted(*arguments, **options):
        raise dist.DistNetworkError("Connection closed by peer")

    monkeypatch.setattr(dist, "init_process_group", interrupted)
    with pytest.raises(SystemExit) as ended:
        joined(list)()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "test.py: another process of this run was lost; go on\n"


def fail_in_second_process():
    if distributed.rank() == 1:
        raise InputError("the image 7 cannot be read; mend it")
    distributed.broadcast(lambda: None)
    distributed.broadcast(lambda: distributed.all_reduce(torch.zeros(1)))


def test_an_error_in_one_process_ends_all(tmp_path):
    codes, _, _, err = run_processes(tmp_path / "all", 2, joined(fail_in_second_process))
    assert codes == [1, 2]
    assert err == ["", "test.py: the image 7 cannot be read; mend it\n"]


def test_a_script_runs_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(
        "import l2ul\n"
        "from l2ul.common import distributed\nfrom l2ul.cli import exit_codes\n"
        "import torch\n"
        "with exit_codes.clean_exit('script.py', 'go on', shared=True), distributed.process_group():\n"
        "    print(distributed.size(), distributed.all_reduce(torch.tensor([1.0 + distributed.rank()])).item())\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2 3.0\n"), done.stderr


def test_a_script_for_one_process_reports_torchrun(tmp_path):
    def alone():
        with exit_codes.clean_exit("alone.py", "go on"):
            raise AssertionError("got in")

    codes, _, _, err = run_processes(tmp_path / "all", 2, alone)
    assert codes == [2, 2]
    assert (
        "".join(err)
        == "alone.py: torchrun started this script in several processes, but it uses one; start it without torchrun\n"
    )
