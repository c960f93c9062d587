"""Whether a net still answers as another one does, asked without any image of D_r."""

from torch import Tensor, nn

from l2ul import attack, evaluate

# Of the examples that are asked about: no run trains on them, as no user's seed is this one.
SEED = 2**32 - 1
EXAMPLES, EPS, ALPHA, STEPS = 5, 4.0, 0.4, 20  # of each image; as the attack's flags of these names
MOST = 64  # images of D_f that examples are made of


def held_out(original: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Targeted adversarial examples, EXAMPLES each, of the first images (k, 3, H, W), and what the net calls them."""
    settings = {"num_adv_images": EXAMPLES, "eps": EPS, "alpha": ALPHA, "steps": STEPS, "seed": SEED}
    examples, _ = attack.adversarial_set(original, images[:MOST], labels[:MOST], num_classes, **settings)
    return examples, evaluate.predict(original, examples)


def percent(model: nn.Module, examples: Tensor, called: Tensor) -> float:
    """Percent of the examples that a model calls as they were `called`."""
    return evaluate.accuracy(evaluate.predict(model, examples), called)
