"""Compiled deployment of Flamingo-style visual language models.

    import flamingo_export

    flamingo_export.build("my-model/", out="my.bundle")
    model = flamingo_export.load("my.bundle")
    print(model.generate("<image>Output:", images=["a.png"]).text)

Names are imported when they are first used, so that `import flamingo_export` is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo_export.api import build as build
    from flamingo_export.api import load as load
    from flamingo_export.api import refit as refit
    from flamingo_export.errors import FlamingoExportError as FlamingoExportError
    from flamingo_export.runtime.model import Generation as Generation
    from flamingo_export.runtime.model import Model as Model
    from flamingo_export.runtime.prompts import Shot as Shot
    from flamingo_export.runtime.prompts import caption_prompt as caption_prompt
    from flamingo_export.runtime.prompts import qa_prompt as qa_prompt
    from flamingo_export.runtime.prompts import read_shots as read_shots
    from flamingo_export.runtime.request import Request as Request
    from flamingo_export.runtime.videos import Video as Video

# ONNX Runtime from 1.29 on sends its makers a device id, graph names and run times, and decides when it is imported. Here it is off unless
# the user asks for it: ORT_DISABLE_TELEMETRY=0. This is the one place that runs before any import of it in a process of ours.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "build": "api",
    "load": "api",
    "refit": "api",
    "FlamingoExportError": "errors",
    "Generation": "runtime.model",
    "Model": "runtime.model",
    "Shot": "runtime.prompts",
    "caption_prompt": "runtime.prompts",
    "qa_prompt": "runtime.prompts",
    "read_shots": "runtime.prompts",
    "Request": "runtime.request",
    "Video": "runtime.videos",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
