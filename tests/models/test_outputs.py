"""Outputs that are not logits: probabilities are used by their logarithms, others are refused."""

import shutil

from conftest import CLASSES, tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul.common.errors import InputError
from l2ul.models import huggingface, outputs
from l2ul.models.classifier import Classifier, Normalize
import main_forget

LOGITS = 5 * torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))


def classifier(*last):
    net = nn.Sequential(tiny_net(), *last)
    return Classifier("tiny", CLASSES, net, nn.Sequential(Normalize((0,) * 3, (1,) * 3))).eval()


def soft_net():
    return nn.Sequential(tiny_net(), nn.Softmax(1))


def sigmoid_net():
    return nn.Sequential(tiny_net(), nn.Sigmoid())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (LOGITS, outputs.LOGITS),
        (LOGITS.log_softmax(1), outputs.LOGITS),
        (LOGITS.softmax(1), outputs.PROBABILITIES),
        (LOGITS.softmax(1).half(), outputs.PROBABILITIES),
        (LOGITS.relu(), outputs.LOGITS),
        (LOGITS * torch.nan, outputs.LOGITS),  # named elsewhere, with the image
    ],
)
def test_kinds_of_outputs(values, kind):
    assert outputs.output_kind(values) == kind


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LOGITS.sigmoid(), "as a Sigmoid does"),
        (LOGITS.argmax(1, keepdim=True).expand(-1, CLASSES), r"whole numbers \(int64\)"),
        (nn.functional.one_hot(LOGITS.argmax(1)).float(), "only zeros and ones"),
        (LOGITS * 0, "returns 0 for every class"),
    ],
)
def test_other_outputs_are_refused(values, expected):
    with pytest.raises(InputError, match=expected):
        outputs.output_kind(values)


def test_logarithms_of_probabilities_are_logits_up_to_a_constant():
    pixels = torch.rand(6, 3, 8, 8)
    plain, soft = classifier(), classifier(nn.Softmax(1))
    assert outputs.adapt(plain, pixels) == outputs.LOGITS
    assert outputs.adapt(soft, pixels) == soft.outputs == outputs.PROBABILITIES
    torch.testing.assert_close(soft(pixels), plain(pixels).log_softmax(1))
    assert outputs.adapt(soft, pixels) == outputs.PROBABILITIES  # also if it was adapted before
    assert outputs.log_probabilities(torch.tensor([[1.0, 0.0]])).isfinite().all()


def test_probabilities_in_eval_mode_only_are_refused():
    class Only(nn.Softmax):
        def forward(self, x):
            return x if self.training else super().forward(x)

    with pytest.raises(InputError, match="probabilities in eval mode and other values in train mode"):
        outputs.adapt(classifier(Only(1)), torch.rand(1, 3, 8, 8))


class ToHalf(nn.Module):
    def forward(self, x):
        return x.half()


def test_probabilities_in_half_precision_are_refused():
    with pytest.raises(InputError, match="the model returns probabilities in float16, which round"):
        outputs.adapt(classifier(nn.Softmax(1), ToHalf()), torch.rand(6, 3, 8, 8))


@pytest.mark.usefixtures("fast_report")
def test_a_net_that_ends_in_softmax_is_unlearned_and_written_with_its_softmax(trained, forget, tmp_path, script):
    state = {f"0.{name}": tensor for name, tensor in trained[0].state_dict().items()}
    torch.save(state, tmp_path / "soft.pt")
    built = ["--build", "test_outputs:soft_net", "--checkpoint", tmp_path / "soft.pt"]
    code, report, printed = forget(model=built)
    assert code == 0, printed
    assert report["model"]["opened_by"]["outputs"] == "probabilities"
    assert min(row["confidence_before"] for row in report["images"]) > 0.5  # softmax of softmax: below 0.41
    assert "their logarithms are used as logits" in (tmp_path / "out" / "report.html").read_text()
    written = soft_net()
    written.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    probabilities = written(trained[1][:6] / 255).detach()
    for row, own in zip(report["images"], probabilities, strict=True):
        assert float(own[row["label"]]) == pytest.approx(row["label_confidence_after"], abs=1e-5)
    verify = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", *built[:2]]
    code, out, _ = script(main_forget.main, *verify)
    assert code == 0, out


def test_a_net_that_ends_in_sigmoid_is_refused(forget, tmp_path):
    code, report, printed = forget("--dry-run", model=["--build", "test_outputs:sigmoid_net"])
    assert (code, report, printed.count("\n")) == (2, None, 1)
    assert "as a Sigmoid does" in printed


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_hugging_face_model_of_another_problem_is_refused(script, vit_folder, tmp_path, problem):
    copy = shutil.copytree(vit_folder, tmp_path / "vit")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", f'{{"problem_type": "{problem}",', 1))
    with pytest.raises(InputError, match=f"problem_type {problem}"):
        huggingface.load(f"hf:{copy}", 10)
    words = ["--images", tmp_path / "in", "--output", tmp_path / "out"]
    code, _, err = script(main_forget.main, "--model", copy, *words)
    assert (code, problem in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    "norm",
    [nn.Identity(), nn.LayerNorm(3 * 8 * 8)],  # with the latter, logits are bounded for all pixels
)
def test_small_logits_of_an_untrained_net_are_no_sigmoid_outputs(norm):
    last = nn.Linear(3 * 8 * 8, 2)
    classifier = nn.Sequential(nn.Flatten(), norm, last)
    with torch.no_grad():
        last.weight.normal_(0, 1e-3, generator=torch.Generator().manual_seed(0))
        last.bias.fill_(0.4)
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = classifier(pixels)
    before = [weights.clone() for weights in classifier.parameters()]
    assert 0 < logits.min() < logits.max() < 1
    assert outputs.adapt(classifier, pixels) == outputs.LOGITS
    assert all(map(torch.equal, classifier.parameters(), before))
    with pytest.raises(InputError, match="as a Sigmoid does"):
        outputs.adapt(nn.Sequential(*classifier, nn.Sigmoid()), pixels)
    assert outputs.adapt(nn.Sequential(*classifier, nn.Softmax(1)), pixels) == outputs.PROBABILITIES


def test_a_forward_that_refuses_other_weights_is_accepted():
    class Scaled(nn.Linear):
        """A layer whose weights must be positive definite."""

        def forward(self, x):
            return x @ torch.linalg.cholesky(self.weight)

    layer = Scaled(4, 4, bias=False)
    layer.weight.data = torch.eye(4)
    pixels = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert outputs.adapt(nn.Sequential(nn.Flatten(), layer, nn.Softmax(1)), pixels) == outputs.PROBABILITIES


def test_logits_of_single_label_models_do_not_look_like_several_labels():
    generator = torch.Generator().manual_seed(0)
    labels = F.one_hot(torch.arange(20) % 10, 10)
    noise = torch.randn(20, 10, generator=generator)
    for logits in (noise, 8 * labels + noise, 8 * labels - 4 + noise, 3 * labels + 2 + noise, 0.01 * noise):
        assert not outputs.is_multi_label(logits.double())
    both = labels + labels.roll(1, 1)
    assert outputs.is_multi_label((7 * both - 4 + 0.3 * noise).double())
