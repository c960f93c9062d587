"""HTML pages from templates: files that open offline, with the style of page.css."""

import base64
import hashlib

import jinja2


def render(package: str, template: str, **values: object) -> str:
    """Return a page from a template of a package, which can include `page.css`. Values are escaped.

    Values in scripts are written with the filter `tojson`, and the filter `sha256` gives the hash of a script for a
    content security policy.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "."), jinja2.PackageLoader("l2ul.common", ".")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template(template).render(values)
