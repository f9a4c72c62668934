"""An engine's loop, carried on a step at a time."""

from __future__ import annotations

from flamingo_export.runtime.loop import Loop
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request


def submitted(model: Model, asked: Request, width: int) -> Loop:
    """The model's loop with a request that nobody else carries on."""
    options = GenerateOptions(beams=width, max_new_tokens=12)
    model.engine.submit(model.prepare(asked), options, wake=False)
    return model.engine.loop


def decode(loop: Loop, steps: int) -> None:
    """Carries on until so many more steps were decoded."""
    wanted = loop.counts["steps"] + steps
    while loop.counts["steps"] < wanted:
        assert loop.tick()


def until_prefilled(loop: Loop) -> None:
    """Carries on until a request's first token was chosen."""
    while not loop.counts["generated_tokens"]:
        assert loop.tick()
