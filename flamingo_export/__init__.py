"""Compiled deployment of Flamingo-style visual language models.

    import flamingo_export

    flamingo_export.build("my-model/", out="my.bundle")
    model = flamingo_export.load("my.bundle")
    print(model.caption("a.png").text)

Names are imported when they are first used, so that `import flamingo_export` is quick.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# ONNX Runtime from 1.29 on sends its makers a device id, graph names and run times, and decides when it is imported. Here it is off unless
# the user asks for it: ORT_DISABLE_TELEMETRY=0. This is the one place that runs before any import of it in a process of ours.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from flamingo_export.api import build as build
    from flamingo_export.api import load as load
    from flamingo_export.api import load_encoder as load_encoder
    from flamingo_export.api import refit as refit
    from flamingo_export.bundle.manifest import ShapeLimits as ShapeLimits
    from flamingo_export.errors import BackendError as BackendError
    from flamingo_export.errors import BackendLost as BackendLost
    from flamingo_export.errors import BuildError as BuildError
    from flamingo_export.errors import BundleError as BundleError
    from flamingo_export.errors import CalibrationError as CalibrationError
    from flamingo_export.errors import CapacityError as CapacityError
    from flamingo_export.errors import CheckpointError as CheckpointError
    from flamingo_export.errors import DeadlineExceeded as DeadlineExceeded
    from flamingo_export.errors import EngineClosed as EngineClosed
    from flamingo_export.errors import EvaluationError as EvaluationError
    from flamingo_export.errors import FlamingoExportError as FlamingoExportError
    from flamingo_export.errors import ImageError as ImageError
    from flamingo_export.errors import IncompatibleEngine as IncompatibleEngine
    from flamingo_export.errors import InputError as InputError
    from flamingo_export.errors import NoMemory as NoMemory
    from flamingo_export.errors import ParityError as ParityError
    from flamingo_export.errors import PromptError as PromptError
    from flamingo_export.errors import QueueFull as QueueFull
    from flamingo_export.errors import RequestRefused as RequestRefused
    from flamingo_export.errors import UnsupportedModel as UnsupportedModel
    from flamingo_export.evaluation.run import evaluate as evaluate
    from flamingo_export.pipeline.run import BuildResult as BuildResult
    from flamingo_export.runtime.chat import chat_prompt as chat_prompt
    from flamingo_export.runtime.contrastive import ContrastiveEncoder as ContrastiveEncoder
    from flamingo_export.runtime.contrastive import LabelScore as LabelScore
    from flamingo_export.runtime.model import Model as Model
    from flamingo_export.runtime.options import Settings as Settings
    from flamingo_export.runtime.prompts import Shot as Shot
    from flamingo_export.runtime.prompts import caption_prompt as caption_prompt
    from flamingo_export.runtime.prompts import qa_prompt as qa_prompt
    from flamingo_export.runtime.prompts import read_shots as read_shots
    from flamingo_export.runtime.prompts import without_media as without_media
    from flamingo_export.runtime.request import Request as Request
    from flamingo_export.runtime.stream import Stream as Stream
    from flamingo_export.runtime.texts import Generation as Generation
    from flamingo_export.runtime.texts import Score as Score
    from flamingo_export.runtime.texts import Text as Text
    from flamingo_export.runtime.videos import Video as Video

    __version__: str

_HOME = {
    "build": "api",
    "load": "api",
    "load_encoder": "api",
    "refit": "api",
    "ShapeLimits": "bundle.manifest",
    "BackendError": "errors",
    "BackendLost": "errors",
    "BuildError": "errors",
    "BundleError": "errors",
    "CalibrationError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "DeadlineExceeded": "errors",
    "EngineClosed": "errors",
    "NoMemory": "errors",
    "EvaluationError": "errors",
    "FlamingoExportError": "errors",
    "ImageError": "errors",
    "IncompatibleEngine": "errors",
    "InputError": "errors",
    "ParityError": "errors",
    "PromptError": "errors",
    "QueueFull": "errors",
    "RequestRefused": "errors",
    "UnsupportedModel": "errors",
    "evaluate": "evaluation.run",
    "BuildResult": "pipeline.run",
    "Generation": "runtime.texts",
    "ContrastiveEncoder": "runtime.contrastive",
    "LabelScore": "runtime.contrastive",
    "Model": "runtime.model",
    "Score": "runtime.texts",
    "Stream": "runtime.stream",
    "Text": "runtime.texts",
    "Settings": "runtime.options",
    "Shot": "runtime.prompts",
    "caption_prompt": "runtime.prompts",
    "chat_prompt": "runtime.chat",
    "qa_prompt": "runtime.prompts",
    "read_shots": "runtime.prompts",
    "without_media": "runtime.prompts",
    "Request": "runtime.request",
    "Video": "runtime.videos",
}
__all__ = sorted([*_HOME, "__version__"])


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value = version("flamingo-export")
        elif name in _HOME:
            import importlib

            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
