"""What the main_pretrain_*.py scripts share: a recipe → a trained classifier, saved where main_unlearn.py looks."""

import dataclasses
import hashlib
from pathlib import Path

from l2ul import data, evaluate, options, pretrain, running, seeds
from l2ul.errors import InputError
from l2ul.files import require_writable
import models
from models import checkpoint


def main(program: str, description: str, dataset: str, model: str, recipe: pretrain.Recipe) -> None:
    """Parse the command line over the recipe, train, save; a sentence and an exit code where that cannot be."""
    with running.ending(program):
        parser = options.Parser(description, prog=program)
        options.add_data(parser, dataset=dataset, model=model)
        options.add_pretraining(parser, recipe)
        options.add_machine(parser)
        opts = parser.parse_args()
        models.check_name(opts.model)
        if opts.model.startswith("hf:"):
            raise InputError(f"--model is {opts.model}; Hugging Face models are trained with transformers, not here")
        asked = {field.name: getattr(opts, field.name, None) for field in dataclasses.fields(recipe)}
        recipe = dataclasses.replace(recipe, **{name: value for name, value in asked.items() if value is not None})
        train(opts, recipe)


def train(opts, recipe: pretrain.Recipe) -> None:
    device = running.choose_device(opts.device, opts.no_cuda, opts.threads)
    images = data.load(opts.dataset, opts.data_dir, image_size=opts.image_size)
    excluded = forget.read_forget(opts.exclude, len(images.train)) if opts.exclude else None
    output = opts.output or default_output(opts, excluded)
    if output.suffix != ".safetensors":
        raise InputError(f"--output is {output}; expected a name that ends in .safetensors")
    if output.exists() and not opts.rerun:
        print(f"{output} exists already; --rerun trains it again")
        return
    require_writable(output.parent)
    if excluded is not None:
        kept = evaluate.complement(excluded, len(images.train))
        images = dataclasses.replace(images, train=images.train.subset(kept))
    images = images.to(device)
    with seeds.drawing(device, opts.seed, "first weights"):
        classifier = models.build(opts.model, images.num_classes, opts.mean, opts.std).to(device)
    identity = {
        "model": opts.model,
        "dataset": opts.dataset,
        "statistics": [opts.mean, opts.std],
        "excluded": excluded.tolist() if excluded is not None else None,
    }
    state_file = output.with_suffix(".training.pt")
    with running.progress("train", recipe.epochs * len(images.train), estimate=True) as advance:
        history = pretrain.fit(
            classifier,
            images.train,
            images.test,
            recipe,
            seed=opts.seed,
            state_file=state_file,
            identity=identity,
            resume=opts.resume,
            test_batch_size=opts.test_batch_size,
            on_epoch=report,
            progress=advance,
        )
    described = {"dataset": opts.dataset, "seed": opts.seed, "acc_test": history[-1]["acc_test"]}
    if excluded is not None:
        described["excluded"] = excluded.tolist()
    models.save(classifier, output, described | dataclasses.asdict(recipe))
    state_file.unlink(missing_ok=True)
    print(f"D_test {history[-1]['acc_test']:.2f} %: {output}")


def report(row: dict[str, float]) -> None:
    print(f"epoch {row['epoch']}: loss {row['loss']:.4f}, D_test {row['acc_test']:.2f} %", flush=True)


def default_output(opts, excluded) -> Path:
    """Where main_unlearn.py looks; a net trained without some images gets a name of its own beside it."""
    usual = checkpoint.candidates(opts.dataset, opts.model, opts.data_dir)[0]
    if excluded is None:
        return usual
    digest = hashlib.sha256(excluded.sort().values.numpy().tobytes()).hexdigest()[:8]
    return usual.with_stem(f"{usual.stem}_without_{len(excluded)}_{digest}")
