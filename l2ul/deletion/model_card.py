"""Write the model card of a model in a folder of its library: what was forgotten in numbers, never which images."""

import jinja2

from l2ul.deletion import states
from l2ul.deletion.report_schema import Report
from l2ul.methods import registry

CARD = "README.md"  # in the folder of the model, where the Hugging Face Hub looks for it


def card(report: Report, weights_sha256: str) -> str:
    """Return the model card in Markdown, from a report and the hex sha256 of the unlearned weights."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("l2ul.deletion", "."),
        autoescape=False,  # Markdown of numbers and of texts of this project
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        report=report,
        counts=states.count(report["images"]),
        weights_sha256=weights_sha256,
        settings=registry.loop_settings(report["asked"]["method"], report["chosen"] or {}),
    )
