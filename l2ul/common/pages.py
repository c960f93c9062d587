"""Pages from templates: Markdown, and HTML that opens offline, with page.css and pictures as data URLs."""

import base64
import functools
import hashlib
from io import BytesIO
from typing import Literal

import jinja2
from torch import Tensor
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms

from l2ul.common.markup import markdown_text


def render(package: str, template: str, **values: object) -> str:
    """Return a page from a template of a package, which can include `page.css`.

    Values are escaped in HTML. A template of Markdown, `.md.j2`, escapes plain text with the filter `text`.

    Values in scripts are written with the filter `tojson`, and the filter `sha256` gives the hash of a script for a
    content security policy.
    """
    return _environment(package, not template.endswith(".md.j2")).get_template(template).render(values)


@functools.cache  # with its templates, which take longer to compile than to render
def _environment(package: str, is_html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "."), jinja2.PackageLoader("l2ul.common", ".")]),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["text"] = lambda value: markdown_text(str(value))
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment


def data_url(content: bytes, kind: str) -> str:
    """Return the content of an image file as a data URL. `kind` is its type, such as png."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: Tensor, longer_side: int, kind: Literal["png", "webp"] = "png") -> str:
    """Return an image (C, H, W), uint8 or float in [0,1] with 1 or 3 channels, as a data URL.

    longer_side  pixels; smaller images are enlarged without interpolation
    kind         png, or webp, which takes less space and is not exact
    """
    longer = max(image.shape[1:])
    size = [max(1, round(side * longer_side / longer)) for side in image.shape[1:]]
    mode = InterpolationMode.NEAREST if longer < longer_side else InterpolationMode.BILINEAR
    resized = image.cpu() if longer == longer_side else transforms.resize(image.cpu(), size, mode, antialias=True)
    encoded = BytesIO()
    transforms.to_pil_image(resized).save(encoded, kind)
    return data_url(encoded.getvalue(), kind)
