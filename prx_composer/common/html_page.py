"""Pages that are one file: templates over a common page, everything escaped, pictures inside, nothing fetched."""

import base64
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape


def render(package: str, template: str, **values: Any) -> str:
    """A template of `package` that extends `page.html`, which has the common style."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("prx_composer.common", ".")])
    return Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True).get_template(template).render(**values)


def data_uri(content: bytes, kind: str) -> str:
    """A picture for `src`; `kind` as in "png"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
