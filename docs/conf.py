"""The documentation as a site: `make docs`. Strict: a broken link, or a public name without a page, fails the build."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT), str(ROOT / "reference"), str(ROOT / "calibration")]

project = "flamingo-export"
author = "the flamingo-export authors"
release = version = _version("flamingo-export")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "flamingo-export"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

_FIELD = re.compile(r"^(\w+(?:, \w+)*): (.*)")


def _fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """`beams: 3 unless sampling` at the beginning of a line is a parameter or field of that name; `Raises X` begins a paragraph."""
    try:
        known = set(inspect.signature(obj).parameters) | set(getattr(obj, "__annotations__", {}))
    except (TypeError, ValueError):
        return
    made: list[str] = []
    inside = False
    for line in lines:
        found = _FIELD.match(line)
        if found and set(found[1].split(", ")) <= known:
            if made and made[-1] and not inside:
                made.append("")
            made.append(f":param {found[1]}: {found[2]}")
            inside = True
        elif line.startswith(("Raises ", "Returns ")) and made and made[-1]:
            made += ["", line]
            inside = False
        elif inside and line.strip():
            made.append(f"    {line}")
        else:
            inside = inside and bool(line.strip())
            made.append(line)
    lines[:] = made


def setup(app: Any) -> None:
    from flamingo_export.pipeline import run
    from flamingo_export.validate.report.parity_report import ParityReport

    run.ParityReport = ParityReport  # type: ignore[attr-defined]  # a name in BuildResult's annotations, imported for type checkers only
    app.connect("autodoc-process-docstring", _fields)
