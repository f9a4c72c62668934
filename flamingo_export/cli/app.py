"""The verbs put together, and how their errors reach the user. Heavy modules load inside the verbs, so `--help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flamingo_export.cli import (
    bench,
    build,
    calibrate,
    capacity,
    classify,
    debug,
    doctor,
    eval,
    generate,
    index,
    inspect,
    package,
    parity,
    refit,
    score,
    search,
    sensitivity,
    serve,
)
from flamingo_export.cli.common_options import MediaCommand
from flamingo_export.cli.groups import with_groups
from flamingo_export.cli.interrupts import EXIT_INTERRUPTED, Interrupts
from flamingo_export.cli.verb import Verb
from flamingo_export.errors import FlamingoExportError, InputError

EXIT_FAILURE = 1


class _App(typer.Typer):
    def command(self, *names: Any, cls: type[TyperCommand] | None = Verb, **settings: Any) -> Any:
        """As typer has it, but what is said of all verbs holds for each, and groups of options are shown as options."""
        register = super().command(*names, cls=cls, **settings)
        return lambda verb: register(with_groups(verb))


app = _App(
    name="flamingo-export",
    help="Turn a Flamingo checkpoint into compiled graphs that generate text, and prove that they compute what PyTorch computes.",
    epilog="First steps: flamingo-export build --size nano --out nano.bundle; flamingo-export generate nano.bundle --image FILE",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: quicker by 0.15 s than rich panels, narrower, and greppable.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("build", short_help="Make a bundle from a checkpoint or a size.")(build.build)
app.command("calibrate", short_help="Measure activations of the reference, for quantisation.")(calibrate.calibrate)
app.command("sensitivity", short_help="Measure what quantising each matrix costs, and what to keep in more bits.")(
    sensitivity.sensitivity
)
app.command("refit", short_help="Put other weights of the same shapes into a bundle.")(refit.refit)
app.command("generate", short_help="Describe images and videos, or answer a question about them.", cls=MediaCommand)(
    generate.generate
)
app.command("score", short_help="Rank candidate answers by their log-likelihood.", cls=MediaCommand)(score.score)
app.command("serve", short_help="Serve bundles over HTTP: OpenAI's API, a web page, metrics.")(serve.serve)
app.command("package", short_help="Write a folder that runs a bundle in containers, on Kubernetes, Ray or Triton.", cls=Verb)(
    package.package
)
app.command("eval", short_help="Score a bundle on a benchmark, few-shot, beside another.")(eval.eval_)
app.command("index", short_help="Encode examples once, to retrieve similar ones.")(index.index)
app.command("search", short_help="Find the pictures of an index that are most like an image or a text.")(search.search)
app.command("classify", short_help="Classify images by labels, zero-shot.")(classify.classify)
app.command("parity", short_help="Check a bundle's engines against the PyTorch reference or recorded values.")(parity.parity)
app.command("debug", short_help="Reduce a graph to the fewest nodes that a parser refuses, or that diverge.")(debug.debug)
app.command("inspect", short_help="Show what a bundle, a checkpoint or a size is made of.")(inspect.inspect)
app.command("doctor", short_help="Show what this machine can run, and what to install for the rest.")(doctor.doctor)
app.command("bench", short_help="Measure a bundle's speed on this machine.")(bench.bench)
app.command("capacity", short_help="Reckon replicas, GPUs and cost for a load, by simulation of the engine.")(capacity.capacity)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"flamingo-export {version('flamingo-export')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when something fails (anywhere in the line).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run(argv: Sequence[str] | None, interrupts: Interrupts) -> int:
    """Runs the verb that `argv` (None: the process's arguments) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --debug belongs to the whole command, but people add it to the end of the line that just failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _check_home(arguments)
        app(args=arguments, prog_name="flamingo-export")
    except SystemExit as stop:
        # What typer makes of a KeyboardInterrupt; versions differ in the code.
        if stop.code == EXIT_INTERRUPTED or (stop.code and interrupts.received is not None):
            return _interrupted(interrupts, debug)
        return stop.code if isinstance(stop.code, int) else EXIT_FAILURE
    except KeyboardInterrupt:
        return _interrupted(interrupts, debug)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): no fault. Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except FlamingoExportError as error:
        _complain(str(error), debug)
        return EXIT_FAILURE
    except OSError as error:
        _complain(_told(error), debug)
        return EXIT_FAILURE
    except Exception as error:
        if interrupts.received is not None:
            return _interrupted(interrupts, debug)
        _complain(f"unexpected {type(error).__name__}: {error}. {_likely_cause()}; --debug shows where.", debug)
        return EXIT_FAILURE
    return 0


def _check_home(arguments: list[str]) -> None:
    """Raises InputError where completion is to be installed for a user without a home folder."""
    from flamingo_export.machine import home

    if any(argument.partition("=")[0] == "--install-completion" for argument in arguments) and home() is None:
        raise InputError(
            "there is no home folder, in which the shell looks for completions. Set HOME, or put what --show-completion prints where the "
            "shell reads it."
        )


def _told(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.filename:
        return f"{error.strerror or error} ({error.filename})"
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:  # relative paths lead nowhere then, and the system names none
            return "the current folder was removed. Change to one that exists (cd), and run the command again."
    return str(error.strerror or error)


def _likely_cause() -> str:
    """A bug of ours, unless a package of a version that is not admitted is installed."""
    from flamingo_export.cli.probes import packages

    try:
        found = packages()
    except ImportError:  # what reads versions is missing itself
        return "This is a bug"
    return "This is a bug" if found.found else f"Python packages are {found.detail}. {found.remedy}"


def _interrupted(interrupts: Interrupts, debug: bool) -> int:
    code, word = interrupts.outcome()
    _complain(word, debug)
    return code


def _complain(message: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"flamingo-export: {message}", file=sys.stderr)
