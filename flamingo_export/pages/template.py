"""Rendering of pages: every template extends `base.html.j2`, which brings the style."""

from __future__ import annotations

import base64
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

Filters = dict[str, Callable[..., object]]


def render(package_or_folder: str | Path, name: str, filters: Filters | None = None, **context: Any) -> str:
    """The page that a template makes of its context.

    package_or_folder: where the template `name` is: a package's name, or a folder.
    filters: of the template, besides `picture`, which makes an `<img>` address of a PNG file's bytes.
    """
    import jinja2
    from markupsafe import Markup

    folder = Path(str(resources.files(package_or_folder))) if isinstance(package_or_folder, str) else package_or_folder
    here = Path(str(resources.files(__package__)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": picture} | (filters or {})
    environment.globals["style"] = Markup((here / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(name).render(**context)


def picture(png: bytes) -> str:
    """A PNG file as the address of an `<img>`."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
