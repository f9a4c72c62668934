"""The command as a whole: help, versions, exit codes, and that asking for help loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.main import get_command

import flamingo_export.cli.inspect as inspect_module
from flamingo_export.cli.app import app
from flamingo_export.errors import BundleError

VERBS = sorted(get_command(app).commands)
HEAVY = ("torch", "onnxruntime", "onnx", "onnx_ir", "matplotlib", "jinja2", "transformers", "PIL", "tokenizers", "numpy")


def test_help_names_every_verb(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    for verb in VERBS:
        assert verb in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(cli, verb):
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert "Usage: flamingo-export " + verb in outcome.out


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(arguments):
    """The half second that help may take goes by imports; names are a surer measure than a clock on a shared machine."""
    script = (
        "import json, sys\n"
        "from flamingo_export.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


def test_version(cli):
    outcome = cli("--version")
    assert (outcome.code, outcome.out.strip()) == (0, f"flamingo-export {version('flamingo-export')}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["inspect"],
        ["inspect", "a.bundle", "--size", "9b"],
        ["inspect", "--size", "10b"],
        ["build"],
        ["build", "--size", "nano", "--checkpoint", "ckpt"],
        ["build", "--size", "nano", "--precision", "fp7"],
        ["generate"],
        ["generate", "a.bundle", "--no-such-option"],
        ["generate", "a.bundle", "--beams", "0"],
        ["generate", "a.bundle", "--prompt", "<image>", "--question", "what?", "--image", "a.png"],
        ["generate", "a.bundle", "--prompt", "<image>", "--shots", "s.jsonl"],
        ["score", "a.bundle", "--prompt", "x"],
        ["doctor", "--folder", "/no/such/folder"],
    ],
)
def test_a_mistaken_line_exits_with_2_and_prints_no_result(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Usage" in outcome.err


def test_a_failure_exits_with_1_and_one_line(cli, tmp_path):
    outcome = cli("inspect", tmp_path / "missing.bundle")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert "does not exist" in outcome.err
    assert "flamingo-export build" in outcome.err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(cli, tmp_path, place):
    line = ["inspect", str(tmp_path / "missing.bundle")]
    line.insert(place, "--debug")
    outcome = cli(*line)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert BundleError.__name__ in outcome.err


def test_an_unexpected_error_is_called_a_bug_and_an_interruption_is_not(cli, monkeypatch):
    def fail(config):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(inspect_module, "components", fail)
    outcome = cli("inspect", "--size", "nano")
    assert outcome.code == 1
    assert "bug" in outcome.err
    assert "a fault of ours" in outcome.err
    assert "Traceback" not in outcome.err

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_module, "components", interrupt)
    outcome = cli("inspect", "--size", "nano")
    assert outcome.code == 130
    assert "interrupted" in outcome.err


def test_the_installed_command_and_a_closed_pipe():
    """`flamingo-export ... | head -1` ends without a complaint."""
    line = f"'{sys.executable}' -c 'import sys; from flamingo_export.cli import main; sys.exit(main())' inspect --size 9b --json | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{"
    assert done.stderr == ""
