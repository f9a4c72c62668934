"""What all verbs have in common: options that were renamed keep working, and names of other libraries lead to ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

RENAMED = {
    "--force": "--overwrite",
    "--frames": "--num-frames",
    "--n-best": "--num-return",
    "--precision": "--storage",
}
"""Options of 0.1.0 by the names they have now, which are those of the Python interface."""


class Verb(TyperCommand):
    """A verb of the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        known |= set(ctx.help_option_names)
        args = [_renamed(argument, known) for argument in args]
        left = super().parse_args(ctx, list(args))
        self._check_paths(ctx, args)
        return left

    def _check_paths(self, ctx: Any, args: list[str]) -> None:
        """Raises typer.BadParameter for an empty path, as `--image "$UNSET"` gives: Python takes it for the folder that the command is called
        from, which would be read, or written into."""
        if "." in args or not any(not argument or (argument.startswith("--") and argument.endswith("=")) for argument in args):
            return
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            values = value if isinstance(value, list | tuple) else [value]
            # Earlier versions of Typer make paths of texts only after this, and say here which are to be paths.
            kind = getattr(getattr(parameter, "type", None), "name", "")
            if any(each == Path() or (each == "" and kind == "path") for each in values):
                raise typer.BadParameter("the path is empty", ctx=ctx, param_hint=parameter.opts[0])


def _renamed(argument: str, known: set[str]) -> str:
    """The argument with an option's present name. Raises typer.BadParameter for what other libraries call an option of this verb."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name in known:
        return argument
    if (now := RENAMED.get(name)) in known:
        print(f"flamingo-export: {name} is called {now} now; the old name goes with the next release", file=sys.stderr)
        return f"{now}{equals}{value}"
    if "--beams" in known and (hint := _hint(name)):
        raise typer.BadParameter(hint, param_hint=name)
    return argument


def _hint(option: str) -> str | None:
    from flamingo_export.runtime.options import OTHER_NAMES, spelled

    text = OTHER_NAMES.get(option[2:].replace("-", "_"))
    return spelled(text, as_option) if text else None


def as_option(setting: str) -> str:
    """How the command line spells a setting of the Python interface."""
    return f"--{setting.replace('_', '-')}"
