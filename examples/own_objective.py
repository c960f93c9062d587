"""Put the parts of the paper's method together by hand, with an objective of your own.

    python -m examples.own_objective

The parts are functions on tensors and modules: `pgd_l2` and `adversarial_set` make adversarial examples,
`mas_importance` computes the importance of each weight, and `unlearn` runs the loop.
"""

import l2ul  # isort: skip  # noqa: F401  # first: it sets the environment before torch is imported

import torch
import torch.nn.functional as F

from examples.forget_tensors import accuracy, load, train
from l2ul.attack import adversarial_set, pgd_l2
from l2ul.importance import mas_importance
from l2ul.methods.registry import Step, Terms, method
from l2ul.methods.settings import Settings
from l2ul.unlearn import unlearn


@method("unlikelihood", "adv", "importance")  # D_adv and the importance penalty, no images of D_r
def unlikelihood(step: Step) -> Terms:
    """Minimise -log(1 - p_label) on D_f + CE on D_adv + λ · the importance penalty"""
    log_probabilities = step.model(step.forget.images).log_softmax(1)
    of_labels = log_probabilities.gather(1, step.forget.labels[:, None])
    return {
        "forget": -torch.log(1e-6 - torch.expm1(of_labels)).mean(),
        "adv": F.cross_entropy(step.model(step.adv.images), step.adv.labels),
        "penalty": step.reg_lamb * step.penalty(),
    }


def main() -> None:
    (images, labels), test = load()
    model = train(images, labels)
    forget_images, forget_labels = images[:8], labels[:8]

    # One targeted adversarial example of an image, in a ball of radius 1 (L2 norm over pixels in [0,1]).
    target = (forget_labels[:1] + 1) % 10
    example = pgd_l2(model, forget_images[:1], target, eps=1.0, alpha=0.1, steps=30)
    print(f"class {int(forget_labels[0])}, example for class {int(target)}: {int(model(example).argmax())} predicted")

    # D_adv: 20 examples of each image with random targets. Ω: how much the outputs depend on each weight.
    attack = {"num_adv_images": 20, "eps": 1.0, "alpha": 0.1, "steps": 30}
    adv = adversarial_set(model, forget_images, forget_labels, 10, **attack, seed=0)
    importance = mas_importance(model, forget_images)

    settings = Settings(unlearn_lr=0.003, max_passes=200, bn="eval")
    outcome = unlearn(
        model, forget_images, forget_labels, "unlikelihood", adv=adv, importance=importance, settings=settings
    )
    print(f"{outcome.status} after {outcome.steps} steps; last row of the curve: {outcome.curve[-1]}")
    with torch.no_grad():
        print("predicted now:", outcome.model(forget_images).argmax(1).tolist(), "labels:", forget_labels.tolist())
    for name, one in (("before", model), ("after", outcome.model)):
        print(f"accuracy on the test images {name}: {accuracy(one, *test):.1f} %")


if __name__ == "__main__":
    main()
