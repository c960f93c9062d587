"""A model that cannot be unlearned is refused with one sentence before any work."""

from dataclasses import dataclass
import types

from conftest import tiny_net
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from l2ul.common import precision
from l2ul.common.errors import InputError
from l2ul.metrics import preflight
from l2ul.models import checkpoint
from l2ul.models.classifier import Classifier, Normalize, check_weights

IMAGES = torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution and a linear layer; `change` maps the pixels or the logits to something else."""

    def __init__(self, before=lambda x: x, after=lambda logits: logits, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, classes)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.head(self.conv(self.before(x)).relu().mean((2, 3))))


class Buffers(Net):
    """A net that uses copies of its weights."""

    def forward(self, x):
        return F.linear(x.mean((2, 3)), self.head.weight.data[:, :3])


class Uncopied(Net):
    """A net with an attribute that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.numbers = (number for number in range(3))


def mixes_devices(x):
    raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")


def fails(x):
    raise KeyError("my own words")


@dataclass
class Output:
    logits: torch.Tensor


class Capacity:
    """Drop the logits of all images of a batch but the first two, as mixtures of experts do."""

    def __call__(self, logits):
        return torch.cat([logits[:2], 0 * logits[2:]])


class Sometimes:
    """Negate the logits of the fourth pass and of later ones."""

    passes = 0

    def __call__(self, logits):
        self.passes += 1
        return logits if self.passes < 4 else -logits


class History(Net):
    """A net that keeps the logits of all its passes."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def forward(self, x):
        self.outputs.append(super().forward(x))
        return self.outputs[-1]


class Averaged(Net):
    """A net with averaged weights, which it uses in eval mode, and others that it never uses."""

    def __init__(self):
        super().__init__()
        self.average = Net()
        self.average.requires_grad_(False)
        self.token = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return super().forward(x) if self.training else self.average(x)


class InPlace(Net):
    """A net that changes a weight without a gradient in its forward."""

    def __init__(self):
        super().__init__()
        self.last = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.spare = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.last.mul_(0).add_(x.detach().mean())
        return super().forward(x)


class Counting(Net):
    """A net that counts its passes in a buffer, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


class CopiesItself(Net):
    """A net whose copies are itself."""

    def __deepcopy__(self, memo):
        return self


def refers_to_itself():
    """Return a net with a function that contains it, so that copies use its weights."""
    net = Net()
    net.forward = lambda x: net.head(net.conv(x).relu().mean((2, 3)))
    return net


class Root(torch.autograd.Function):
    """A function without a backward pass."""

    @staticmethod
    def forward(context, x):
        return x * 2


def classifier(net, channels=3):
    return Classifier("net", 4, net, nn.Sequential(Normalize([0.5] * channels, [0.5] * channels)))


@torch.no_grad()
def without_gradient(x):
    return x * 2


NETS = {
    "random in eval mode: two passes": Net(after=lambda logits: F.dropout(logits, 0.4)),
    "random in eval": Net(after=lambda logits: logits * (1 + 9 * (torch.rand(len(logits), 1) < 0.5))),
    "the logits of the model have no gradient": Net(after=without_gradient),
    "no gradient; remove": Net(after=torch.Tensor.detach),
    "with respect to the pixels is zero": Net(before=torch.round),
    "pixels is zero": Net(before=without_gradient),
    "no gradient reaches a weight": Buffers(),
    "the backward pass of the model fails": Net(after=Root.apply),
    "gradients of the model are not finite": Net(after=lambda logits: logits + 0 * (logits - logits).sqrt()),
    "shape 2 x 4 x 1 x 1 for 2 images.*flatten": Net(after=lambda logits: logits[:, :, None, None]),
    "shape 4 x 2 for 2 images": Net(after=lambda logits: logits.T),
    "shape 1 x 4 for 2 images": Net(after=lambda logits: logits[:1]),
    "one logit per image": Net(classes=1),
    "returns one logit per image": Net(after=lambda logits: logits[:, 0]),
    "type int64 and shape 2, which are class numbers": Net(after=lambda logits: logits.argmax(1)),
    "which are class numbers": Net(after=lambda logits: logits > 0),
    "a tuple of 2 x 4, 2 x 8, where several entries": Net(after=lambda logits: (logits, logits.repeat(1, 2))),
    "a dict with 'out', from which no logits": Net(after=lambda logits: {"out": logits}),
    "a list of no entries": Net(after=lambda logits: []),
    "returns a NoneType": Net(after=lambda logits: None),
    "batch of one image": Net(after=lambda logits: logits.squeeze(0)),
    "does not accept a batch of one": Net(after=lambda logits: logits[[0, 1]]),
    "depend on the other images of its batch": Net(after=lambda logits: logits - logits.mean(0)),
    r"does not accept images of 6 x 6 pixels and 3 channels.*\('my own words'\)": Net(before=fails),
    "forward must not convert to other types": Net(before=torch.Tensor.half),
    "same device.*as a parameter or buffer": Net(before=mixes_devices),
    "cannot be copied": Uncopied(),
    "cannot be copied.*no tensors with a history": History(),
    "returns a model with the same weights": CopiesItself(),
    "a pass in eval mode changes passes, a buffer": Counting(),
    "so none can be unlearned; its forward must use its parameters.*by self": refers_to_itself(),
}


@pytest.mark.parametrize("message", NETS)
def test_a_model_that_cannot_be_unlearned_is_refused(message):
    net = NETS[message]
    for model in (classifier(net), net):
        with pytest.raises(InputError, match=message) as raised:
            preflight.check_model(model, IMAGES)
        assert "\n" not in str(raised.value)
        assert not any(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits,
        Output,
        lambda logits: {"logits": logits, "features": logits},
        lambda logits: (logits, (logits, logits), logits[:, :, None]),
        lambda logits: [logits],
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_outputs_with_logits_are_accepted(after, count):
    model = classifier(Net(after=after)).train()
    assert preflight.check_model(model, IMAGES[:count]) == 4
    assert model(IMAGES / 255).shape == (3, 4)
    assert model.net.training
    with pytest.raises(InputError, match="the model has 4 classes, but the data set has 10"):
        preflight.check_fit(model, IMAGES, 10)


def test_modules_that_keep_a_tensor_of_the_last_pass_are_accepted():
    net = Net()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net.head)
    assert preflight.check_model(classifier(net), IMAGES) == 4


def test_weights_that_no_gradient_reaches_are_named():
    assert preflight.unreached_weights(classifier(Net()), IMAGES) == []
    net = Averaged()
    assert preflight.unreached_weights(classifier(net), IMAGES) == ["token", "conv.*", "head.*"]
    assert (net.training, net.average.conv.weight.requires_grad) == (True, False)
    net = Net()
    net.tied = net.head
    net.register_buffer("bank", torch.rand(3, 2))
    net.register_buffer("mask", torch.rand(3, 2), persistent=False)
    net.register_buffer("scale", torch.rand(1, 3, 1, 1))
    assert preflight.unreached_weights(classifier(net), IMAGES) == ["bank"]
    wrapped = nn.ModuleDict({"first": Net(), "second": Net()})
    wrapped.forward = types.MethodType(lambda self, x: self["second"](x), wrapped)
    assert preflight.unreached_weights(classifier(wrapped), IMAGES) == ["first.*"]
    assert preflight.unreached_weights(classifier(InPlace()), IMAGES) == ["spare"]


def test_buffers_that_are_no_numbers_do_not_count_as_changed():
    net = Net()
    net.register_buffer("unused", torch.tensor([float("nan"), 1.0]))
    assert preflight.check_model(classifier(net), IMAGES) == 4
    preflight.check_same_model(classifier(net), classifier(net), IMAGES)


def test_random_numbers_without_effect_are_accepted():
    model = classifier(Net(before=lambda x: x + 0 * torch.rand(())))
    assert preflight.check_model(model, IMAGES) == 4


@pytest.mark.parametrize("after", [Capacity(), Sometimes()])
def test_single_images_must_have_the_logits_of_the_batch(after):
    model, images = classifier(Net(after=after)), IMAGES.repeat(9, 1, 1, 1)
    logits = model(images / 255)
    with pytest.raises(InputError, match="depend on the other images of its batch, on earlier passes or on chance"):
        preflight.check_alone(model, images, logits)
    same = classifier(Net())
    preflight.check_alone(same, images, same(images / 255))


def test_modules_with_the_weight_of_another_pass_can_be_copied_after_a_pass_without_gradients():
    net = Net()
    prune.l1_unstructured(net.head, "weight", 0.5)
    with pytest.raises(InputError, match=r"cannot be copied .*run a pass under torch.no_grad\(\) first"):
        preflight.copied(net)
    with torch.no_grad():
        net(IMAGES / 255)
    preflight.copied(net)


def test_out_of_memory_is_not_a_fault_of_the_model():
    def before(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        preflight.check_model(classifier(Net(before=before)), IMAGES)


class Packed(nn.Module):
    """Weights as integers with a scale, as libraries for quantisation keep them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, 108, dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), r"the net has lazy weights without a shape \(0.weight"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d()), "lazy weights"),
        (Packed, "the net has quantised or integer weights,"),
        (lambda: nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=torch.cfloat))}), r"complex weights \(w\)"),
        (lambda: nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=torch.int8), False)}), r"weights \(w\)"),
    ],
)
def test_lazy_and_integer_weights_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        check_weights(build(), "the net")


def test_dynamic_quantisation_is_refused():
    net = torch.ao.nn.quantized.dynamic.Linear(3, 4)
    with pytest.raises(InputError, match=r"quantised or integer weights \(0\)"):
        check_weights(nn.Sequential(net), "the net")


def test_integer_buffers_of_indices_are_accepted():
    net = Net()
    net.register_buffer("index", torch.zeros(1000, dtype=torch.int64))
    check_weights(net, "the net")


def test_integer_weights_of_a_file_do_not_fit_a_floating_point_network():
    net = Net()
    state = net.state_dict() | {"head.weight": torch.ones(4, 5, dtype=torch.int8)}
    assert checkpoint.load_into(net, state) == "head.weight is int8, not float32"


def test_models_are_compared_in_fp32_whatever_the_precision_of_the_command():
    net, seen = tiny_net(), []
    net.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    with precision.temporarily(torch.device("cuda"), "tf32"):
        preflight.check_same_model(net, net, torch.rand(2, 3, 8, 8))
        assert torch.backends.cuda.matmul.allow_tf32
    assert seen
    assert not any(seen)
